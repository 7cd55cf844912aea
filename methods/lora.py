"""LoRA: W + (alpha / r) B A, with A in R^{r x in}, B in R^{out x r} (Hu et al. 2021, arXiv 2106.09685, section 4.1).

A is Kaiming-uniform and B zero at the start, so the first step leaves from the base; other starts: parts/initial.py,
parts/eva.py. LoRA+ gives B a learning rate of its own (Hayou et al. 2024, arXiv 2402.12354, section 4).
Modules and file format are PEFT's; rsLoRA, DoRA and QLoRA differ in its config and their base.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import peft
import torch
from torch import nn

from methods.base import Setup, View
from methods.options.lora_family import LowRankOptions
from methods.options.low_rank import Lora
from methods.parts import initial
from methods.parts.eva import start_from_inputs
from methods.parts.peft_adapter import ADAPTER, PeftAdapter

L = TypeVar("L", bound=LowRankOptions)
# What PEFT's LoRA+ optimizer gives the ratio to: B, and DoRA's magnitude (as every vector).
FAST = ("lora_B", "lora_embedding_B", "lora_magnitude_vector")

START = "start."  # a checkpoint has these names for the weights as they are now


class LowRank(PeftAdapter[L]):
    """The LoRA family, as PEFT has it."""

    _tokens: Mapping[str, list[int]] = MappingProxyType({})  # by module: the rows of it that are trained

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base and add adapters; of embeddings and head, the rows of new tokens are trained."""
        if self.new_tokens:
            self._tokens = {name: list(self.new_tokens) for name in vocabulary_modules(model)}
        return super().attach(model)

    def config(self) -> dict[str, Any]:
        """What this member of the family adds to PEFT's config."""
        return {}

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Rank, scale, dropout, and what the member adds."""
        return peft.LoraConfig(
            r=self.options.rank,
            lora_alpha=self.options.scale_numerator,
            lora_dropout=self.options.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            trainable_token_indices=dict(self._tokens) or None,
            **self.config(),
        )

    def optimizer(self, view: View, lr: float, **adam: Any) -> torch.optim.Optimizer:
        """AdamW, with LoRA+'s rate for B."""
        slow = [f.parameter for f in view.fragments() if not any(name in f.name for name in FAST)]
        fast = [f.parameter for f in view.fragments() if any(name in f.name for name in FAST)]
        groups: list[dict[str, Any]] = [{"params": slow}, {"params": fast, "lr_ratio": self.options.lr_ratio}]
        return torch.optim.AdamW(groups, lr=lr, **adam)


def vocabulary_modules(model: Any) -> list[str]:
    """The names of the embedding and, where it has weights of its own, of the head."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = [inputs] if head is None or head.weight is inputs.weight else [inputs, head]
    return [name for name, module in model.named_modules() if any(module is one for one in own)]


class LoraTuning(LowRank[Lora]):
    """Plain LoRA, with its starts."""

    def __init__(self, options: Lora, setup: Setup) -> None:
        super().__init__(options, setup)
        self._start: initial.Factors = {}

    @property
    def moves_base(self) -> bool:
        """Whether the start takes its directions out of the base."""
        return self.options.init in ("pissa", "olora")

    def config(self) -> dict[str, Any]:
        """The starts that PEFT draws."""
        return {"init_lora_weights": self.options.init} if self.options.init in ("gaussian", "orthogonal") else {}

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base and add adapters; a start of the base's own directions leaves the rest as the base."""
        adapted = super().attach(model)
        if self.moves_base:
            self._start = initial.move_base(adapted, self.options.init, self._start, self.setup.gather)
        return adapted

    def initialise(self, model: nn.Module, examples: Iterable[torch.Tensor]) -> None:
        """Take A from the data where it shall come from there."""
        if self.options.init == "eva":
            start_from_inputs(model, examples, self.options.rank, self.setup.gather)

    def state(self) -> dict[str, torch.Tensor]:
        """The start, where the base depends on it."""
        return {START + name: value for name, value in self._start.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take the start back."""
        self._start = {name.removeprefix(START): value for name, value in state.items()}

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """The base as it was; where the start has moved it, with what it gave to the factors."""
        with super().reference(model), initial.restored(model, self._start):
            yield

    def export(self, model: peft.PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the adapter for the base as it was: of twice the rank where the start moved the base."""
        if not self.moves_base:
            super().export(model, weights, folder)
            return
        own = model.peft_config[ADAPTER]
        # Twice the rank and twice alpha leave the scale as it is.
        doubled = replace(own, r=2 * own.r, lora_alpha=2 * own.lora_alpha)
        model.peft_config[ADAPTER] = doubled
        super().export(model, initial.differences(weights, self._start), folder)
        model.peft_config[ADAPTER] = own
