"""A method without the trainer: a tiny random Llama, and a plain training loop to compare with PEFT used alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from llamas import random_llama
from torch import nn
from transformers import LlamaForCausalLM

from methods.base import Fragment, Setup
from methods.options import Options
from methods.registry import create

STEPS = 20


@dataclass(frozen=True)
class Whole:
    """A trained parameter that this process holds all of."""

    name: str
    parameter: nn.Parameter
    start: int = 0

    @property
    def stop(self) -> int:
        """Its size."""
        return self.parameter.numel()


class Alone:
    """The view of a process that holds everything."""

    replicated = True

    def __init__(self, model: nn.Module, flat: bool = False) -> None:
        """The trained parameters as they are, or `flat`: 1-D parameters that share their memory."""
        self.model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._shapes = {name: p.shape for name, p in named}
        self._held = [Whole(name, nn.Parameter(p.data.view(-1)) if flat else p) for name, p in named]
        self.optimizer: torch.optim.Optimizer

    def fragments(self) -> list[Whole]:
        """Every trained parameter."""
        return self._held

    def state(self, fragment: Fragment) -> dict[str, Any]:
        """What the optimizer keeps of it."""
        state: dict[str, Any] = self.optimizer.state[fragment.parameter]
        return state

    def shape(self, name: str) -> torch.Size:
        """Its shape."""
        return self._shapes[name]

    def whole(self, name: str, part: Callable[[Fragment], torch.Tensor]) -> torch.Tensor:
        """The part of it that this process holds is all of it."""
        (fragment,) = (fragment for fragment in self._held if fragment.name == name)
        return part(fragment).view(self.shape(name))


def llama(tied: bool = True) -> LlamaForCausalLM:
    """A random Llama of two layers, the same at every call, fp32."""
    model = random_llama(tie_word_embeddings=tied)
    torch.manual_seed(1)  # what a method draws then does not depend on the base
    return model


def attached(options: Options, model: nn.Module) -> tuple[Any, nn.Module]:
    """The method of these options, and the model with it attached."""
    method = create(options, Setup(STEPS))
    return method, method.attach(model)


def optimizer_of(method: Any, model: nn.Module, lr: float, **adam: Any) -> torch.optim.Optimizer:
    """The method's optimizer at its learning rates, as the trainer sets them."""
    optimizer: torch.optim.Optimizer = method.optimizer(Alone(model), lr, **{"weight_decay": 0.0, **adam})
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    return optimizer


def batches() -> Iterator[torch.Tensor]:
    """The token ids of every step: two batches in turn, so that there is something to learn."""
    both = torch.randint(320, (2, 2, 24), generator=torch.Generator().manual_seed(2))
    for step in range(STEPS):
        yield both[step % 2]


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], None] = lambda: None
) -> list[float]:
    """Train on `batches` and give the loss of each step."""
    curve = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        curve.append(loss.item())
    return curve


def logits(model: nn.Module) -> torch.Tensor:
    """What a model says of one fixed batch."""
    model.eval()
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(48).view(2, 24) * 5 % 320).logits
    model.train()
    return out


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained weights by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
