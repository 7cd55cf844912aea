"""ReLoRA: W <- W + s B A and a new start of A and B, again and again (Lialin et al. 2023, arXiv 2307.05695).

The sum of several updates of rank r has a higher rank. A restart comes after every share of the steps, once the job's
warm-up is over, if steps enough for its own warm-up remain, and in any case after the last step, so that the weights
are whole then:

1. W += s B A in fp32; A is drawn anew (Kaiming-uniform, from the seed, the step and the module's name), B is zero.
2. Optimizer's state of A and B: with `keep` 0 it starts as if they were new, bias correction included. Else the
   entries with the largest first moment, a share `keep` of a factor, keep both moments, and the step count goes on.
   (The authors' code zeroes 99.9 % at random, or prunes each moment by its own magnitude, and keeps the count both
   times. A first moment without its second is a step of lr m / eps, as A has no gradient while B is zero.)
3. Learning rate: a linear warm-up from the next step on, to where the job's one schedule will be at its end: the
   "jagged" cosine. The authors' code restarts after a first step at rate zero; here no step is lost.

As in the authors' code, embeddings, norms, biases and head are trained directly, unless `others` is off; their state
is never reset. A full-rank warm start is a job of kind `full` before, whose output is this job's base.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

from methods.base import Fragment, Setup, View
from methods.lora import LowRank
from methods.options import ReLora
from methods.parts.peft_adapter import ADAPTER, shapes
from methods.parts.ranks import largest


class ReLoraTuning(LowRank[ReLora]):
    """LoRA that is merged and restarted; leaves a whole model."""

    def __init__(self, options: ReLora, setup: Setup) -> None:
        super().__init__(options, setup)
        self._every = max(1, round(options.every * setup.steps))
        self._rewarmup = round(options.rewarmup * setup.steps)
        self._base: Callable[[int], float] = lambda step: 1.0  # noqa: ARG005
        self._done = 0
        self._optimizer: torch.optim.Optimizer | None = None

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the linear layers and add adapters; the rest is trained if `others` says so."""
        others = [model.get_parameter(name) for name in shapes(model)[1]]
        adapted = super().attach(model)
        for parameter in others:
            parameter.requires_grad_(self.options.others)
        return adapted

    def changed(self, model: nn.Module) -> list[str]:
        """Every weight that is not trained: most change by merges, and the output holds them all."""
        return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]

    def optimizer(self, fragments: Sequence[Fragment], lr: float, **adam: Any) -> torch.optim.Optimizer:
        """AdamW, whose state restarts touch."""
        self._optimizer = super().optimizer(fragments, lr, **adam)
        return self._optimizer

    def schedule(self, base: Callable[[int], float]) -> Callable[[int], float]:
        """The job's schedule with a warm-up after every restart."""
        self._base = base
        return self._rate

    def restarts(self, done: int) -> bool:
        """Whether there is a restart after so many steps, before the last."""
        if done <= 0 or done % self._every or done + self._rewarmup >= self.setup.steps:
            return False
        return self._base(done) <= self._base(done - 1) * (1 + 1e-9)  # else the job warms up

    def start(self, name: str, shape: torch.Size, done: int) -> torch.Tensor:
        """The new start of a factor after so many steps, on the host."""
        start = torch.zeros(shape)
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{self.setup.seed}/{done}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        return start

    def after_step(self, view: View) -> None:
        """Merge and start anew where it is time."""
        self._done += 1
        if self.restarts(self._done) or self._done == self.setup.steps:
            fragments = {fragment.name: fragment for fragment in view.fragments()}
            for name, layer in _layers(view.model):
                a_name, b_name = (f"{name}.lora_{factor}.{ADAPTER}.weight" for factor in "AB")
                self._merge(view, layer, a_name, b_name)
                for factor in (a_name, b_name):
                    self._reset(view, factor, fragments.get(factor))

    def state(self) -> dict[str, torch.Tensor]:
        """Steps done."""
        return {"step": torch.tensor(self._done)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take them back."""
        self._done = int(state["step"])

    def export(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the model as `from_pretrained` loads it; all of it is in the base's weights since the last step."""
        plain = {name: value for name, value in weights.items() if ".lora_" not in name}
        plain = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): v for name, v in plain.items()}
        model.get_base_model().save_pretrained(folder, state_dict=plain)

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself: the last step merged it."""
        return model

    def _rate(self, step: int) -> float:
        start = step - step % self._every
        if step - start >= self._rewarmup or not self.restarts(start):
            return self._base(step)
        return self._base(start + self._rewarmup) * (step - start + 1) / self._rewarmup

    def _merge(self, view: View, layer: Linear, a_name: str, b_name: str) -> None:
        a_RI, b_OR = (view.whole(name, lambda f: f.parameter.data) for name in (a_name, b_name))
        delta_OI = layer.scaling[ADAPTER] * (b_OR @ a_RI)
        weight = layer.get_base_layer().weight
        with view.gathered([weight]):
            weight.data.add_(delta_OI.T if layer.fan_in_fan_out else delta_OI)

    def _reset(self, view: View, name: str, own: Fragment | None) -> None:
        """Give this rank's part of a factor its new start, and what its state may keep."""
        assert self._optimizer is not None
        state = self._optimizer.state
        if own is not None:
            start = self.start(name, view.shape(name), self._done)
            own.parameter.data.copy_(start.view(-1)[own.start : own.stop])
        if self.options.keep == 0:
            if own is not None:
                state.pop(own.parameter, None)
            return
        whole = view.whole(name, lambda fragment: state[fragment.parameter]["exp_avg"])
        kept = largest(whole.abs(), int(self.options.keep * whole.numel())).view(-1)
        if own is not None:
            for moment in ("exp_avg", "exp_avg_sq"):
                state[own.parameter][moment].mul_(kept[own.start : own.stop])


def _layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))
