"""LoRA: W + (alpha / r) B A, with A in R^{r x in}, B in R^{out x r} (Hu et al. 2021, arXiv 2106.09685, section 4.1).

A is Kaiming-uniform and B zero at the start, so the first step leaves from the base. Modules and file format are
PEFT's; rsLoRA and DoRA differ in its config alone.
"""

from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from torch import nn

from methods.base import Method
from methods.options import Dora, Lora, RsLora

L = TypeVar("L", Lora, RsLora, Dora)


class LowRank(Method[L]):
    """The LoRA family, as PEFT has it."""

    def config(self) -> dict[str, Any]:
        """What this member of the family adds to PEFT's config."""
        return {}

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base and add adapters with fp32 weights."""
        options = self.options
        target = options.target if options.target == "all-linear" else list(options.target)
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.scale_numerator,
            lora_dropout=options.dropout,
            target_modules=target,
            task_type="CAUSAL_LM",
            **self.config(),
        )
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted

    def export(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors."""
        model.save_pretrained(folder, state_dict=weights)

    def merge(self, model: nn.Module) -> nn.Module:
        """The base with W + scale B A in place of W; refuses weights that are not finite."""
        merged: nn.Module = model.merge_and_unload(safe_merge=True)
        return merged


class LoraTuning(LowRank[Lora]):
    """Plain LoRA."""
