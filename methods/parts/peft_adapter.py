"""What methods whose modules and file format are PEFT's have in common."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import peft
from peft.utils import ModulesToSaveWrapper
from torch.nn import Module

from methods.base import Method, Tensors
from methods.options.base import ModuleOptions
from methods.parts.tied import untie
from methods.parts.weights import shapes

ADAPTER = "default"  # PEFT's name for the one adapter of a model
T = TypeVar("T", bound=ModuleOptions)


class PeftAdapter(Method[T]):
    """A method that PEFT has; `peft_config` says which one, and with which options."""

    config_is_fixed = True

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """PEFT's description of the adapter, for the modules of these names."""
        raise NotImplementedError

    def attach(self, model: Module) -> Module:
        """Freeze the base and add adapters with fp32 weights."""
        # The names are given one by one: PEFT knows neither patterns nor what the base's own files count as linear.
        linears, others = shapes(model, self.setup.gather)
        targets = self.options.targets(linears, others)
        config = self.peft_config(list(targets))
        adapted: Module = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted

    def reference(self, model: Module) -> AbstractContextManager[None]:
        """The base alone, from which the first step leaves."""
        without: AbstractContextManager[None] = cast(peft.PeftModel, model).disable_adapter()
        return without

    def export(self, model: peft.PeftModel, weights: Tensors, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT reads them."""
        # "auto" would save the base's embeddings beside a factor of theirs, and ask the hub about them.
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)

    def merge(self, model: peft.PeftModel) -> Module:
        """The base with the update in its weights; refuses weights that are not finite."""
        untie(model)
        merged: Module = model.merge_and_unload(safe_merge=True)
        return merged


def base_under(model: Any) -> Any:
    """The model of transformers that an adapter of PEFT was put into; one without an adapter as it is."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def trained_in_place_of(module: Any) -> Any:
    """The copy of a module that PEFT trains and computes with in its place; a module without one as it is."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[ADAPTER]
    return module


def name_in_base(name: str) -> str:
    """The name that a weight of PEFT's model has in the base without adapters."""
    in_base = name.removeprefix("base_model.model.")
    return in_base.replace(".base_layer", "")
