"""What a fine-tuning method is: hooks that follow the life of a step. A method overrides the few it needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from methods.options import Options

O = TypeVar("O", bound=Options)  # noqa: E741


class Fragment(Protocol):
    """The part [start, stop) of one flattened trained parameter that this rank holds; all tensors 1-D."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def master(self) -> torch.Tensor: ...
    @property
    def grad(self) -> torch.Tensor | None: ...
    @property
    def state(self) -> dict[str, torch.Tensor]: ...


class View(Protocol):
    """Gradients, masters and optimizer state by parameter name, whatever the ZeRO stage."""

    def fragments(self) -> Sequence[Fragment]:
        """What this rank holds."""
        ...

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a parameter."""
        ...


class Method(Generic[O]):
    """A fine-tuning method with its options."""

    def __init__(self, options: O) -> None:
        self.options = options

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, before the model exists."""
        return {}

    def attach(self, model: nn.Module) -> nn.Module:
        """Prepare the base for training: freeze, add adapters. The trained parameters end as fp32."""
        raise NotImplementedError

    def optimizer(
        self, named_parameters: list[tuple[str, nn.Parameter]], lr: float, **adam: Any
    ) -> torch.optim.Optimizer:
        """The client optimizer; AdamW unless the method says otherwise."""
        return torch.optim.AdamW([{"params": [p for _, p in named_parameters]}], lr=lr, **adam)

    def penalty(self, model: nn.Module) -> torch.Tensor | None:  # noqa: ARG002
        """A term for the objective, once per optimizer step."""
        return None

    def before_step(self, view: View) -> None:
        """Between the last backward pass and the optimizer's step."""

    def after_step(self, view: View) -> None:
        """After the optimizer's step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer state."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def export(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the trained weights as PEFT or transformers load them.

        `weights` holds every trained parameter, whole, by its name in `model`.
        """
        raise NotImplementedError

    def merge(self, model: nn.Module) -> nn.Module:
        """The base with the update merged into its weights."""
        raise NotImplementedError
