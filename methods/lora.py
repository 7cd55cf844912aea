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
from torch import Tensor
from torch.nn import Module, Parameter

from methods.base import Keywords, Setup, Tensors, View
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
    """The LoRA family: PEFT's modules and file format, with LoRA+ and embeddings of new tokens."""

    _tokens: Mapping[str, list[int]] = MappingProxyType({})  # by module: the rows of it that are trained

    def attach(self, model: Module) -> Module:
        """Freeze the base and add adapters; of embeddings and head, the rows of new tokens are trained."""
        if self.new_tokens:
            names = vocabulary_modules(model)
            self._tokens = {name: list(self.new_tokens) for name in names}
        return super().attach(model)

    def config(self) -> Keywords:
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
        """AdamW with two groups: B and DoRA's magnitude have `lr_ratio` times the learning rate of A."""
        slow: list[Parameter] = []
        fast: list[Parameter] = []
        for fragment in view.fragments():
            is_fast = any(part in fragment.name for part in FAST)
            if is_fast:
                fast.append(fragment.parameter)
            else:
                slow.append(fragment.parameter)
        slow_group: dict[str, Any] = {"params": slow}
        fast_group = {"params": fast, "lr_ratio": self.options.lr_ratio}
        return torch.optim.AdamW([slow_group, fast_group], lr=lr, **adam)


def vocabulary_modules(model: Any) -> list[str]:
    """The names of the embedding and, where it has weights of its own, of the head."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        head = embedding
    names = []
    for name, module in model.named_modules():
        if module is embedding or module is head:
            names.append(name)
    return names


class LoraTuning(LowRank[Lora]):
    """Plain LoRA, with all the starts that its A and B may have."""

    def __init__(self, options: Lora, setup: Setup) -> None:
        super().__init__(options, setup)
        self._start: initial.Factors = {}

    @property
    def moves_base(self) -> bool:
        """Whether the start takes its directions out of the base."""
        return self.options.init in ("pissa", "olora")

    def config(self) -> Keywords:
        """Name the start to PEFT where PEFT draws it."""
        init = self.options.init
        if init in ("gaussian", "orthogonal"):
            return {"init_lora_weights": init}
        return {}

    def attach(self, model: Module) -> Module:
        """Freeze the base and add adapters; a start of the base's own directions leaves the rest as the base."""
        adapted = super().attach(model)
        if self.moves_base:
            self._start = initial.move_base(adapted, self.options.init, self._start, self.setup.gather)
        return adapted

    def initialise(self, model: Module, examples: Iterable[Tensor]) -> None:
        """Take A from the inputs of the targets where the job asks for it."""
        options = self.options
        if options.init == "eva":
            start_from_inputs(model, examples, options.rank, self.setup.gather)

    def state(self) -> Tensors:
        """A and B at the start, where the base depends on them."""
        state: Tensors = {}
        for name, value in self._start.items():
            state[START + name] = value
        return state

    def load_state(self, state: Tensors) -> None:
        """Take back A and B at the start."""
        self._start = {}
        for name, value in state.items():
            factor = name.removeprefix(START)
            self._start[factor] = value

    @contextmanager
    def reference(self, model: Module) -> Iterator[None]:
        """The base as it was; where the start has moved it, with what it gave to the factors."""
        with super().reference(model), initial.restored(model, self._start):
            yield

    def export(self, model: peft.PeftModel, weights: Tensors, folder: Path) -> None:
        """Write the adapter for the base as it was: of twice the rank where the start moved the base."""
        if not self.moves_base:
            super().export(model, weights, folder)
            return
        config = model.peft_config[ADAPTER]
        # Twice the rank and twice alpha leave the scale as it is.
        rank = 2 * config.r
        alpha = 2 * config.lora_alpha
        doubled = replace(config, r=rank, lora_alpha=alpha)
        differences = initial.differences(weights, self._start)
        model.peft_config[ADAPTER] = doubled
        try:
            super().export(model, differences, folder)
        finally:
            model.peft_config[ADAPTER] = config
