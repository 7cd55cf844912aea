"""Full fine-tuning: W <- W - lr AdamW(dL/dW) for every weight that `freeze` does not name.

With `lisa_layers` n it is LISA (Pan et al. 2024, arXiv 2403.17919, algorithm 1): every `lisa_every` steps, n layers
are drawn at random; they, the embeddings, the norm behind all layers and the head are trained, the others wait. The
draw is a function of the seed and its number alone. A layer that waits has no update at all (neither momentum nor
weight decay), its gradient is no part of the norm, and its optimizer state is freed, so it starts anew when it is
drawn again; a layer that is drawn twice running goes on. The gradients of waiting layers are computed all the same,
as the engine's set of trained weights is fixed: what LISA saves here is optimizer state.

With `train.master_weights: false` the weights are bf16, without fp32 masters beside them. Gradients are summed and
moments kept in fp32; each step is taken in fp32 and rounded at random (trainer/zero/chunked.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from methods.base import Method, Setup, Tensors, View
from methods.options.full import Full, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STREAM = 0x115A  # keeps the draws apart from other generators of the same seed


class FullTuning(Method[Full]):
    """AdamW on the base's weights themselves, all or some at a time."""

    def __init__(self, options: Full, setup: Setup) -> None:
        super().__init__(options, setup)
        self._done = 0
        self._layers: list[int] = []

    def attach(self, model: Module) -> Module:
        """Make every weight fp32, or bf16 without masters, and trained if it is not to be frozen."""
        if self.setup.master_weights:
            model.float()
        for name, parameter in model.named_parameters():
            if not self.setup.master_weights:
                parameter.data = parameter.data.bfloat16()
                parameter.grad_dtype = torch.float32
            parameter.requires_grad_(not self.options.freezes(name))
        layers = set()
        for name, _ in model.named_parameters():
            layer = layer_of(name)
            if layer is not None:
                layers.add(layer)
        self._layers = sorted(layers)
        return model

    def gradients(self, view: View) -> list[Tensor]:
        """The gradients of what is trained in this step; AdamW passes over weights without one."""
        if self.options.lisa_layers is not None:
            active = self.drawn(self._done)
            self._skip_others(view, active)
        return super().gradients(view)

    def drawn(self, done: int) -> set[int]:
        """The layers that LISA trains in the step after so many."""
        options = self.options
        draw = done // options.lisa_every
        seeds = [self.setup.seed, draw, _STREAM]
        generator = np.random.default_rng(seeds)
        layers = generator.choice(self._layers, options.lisa_layers, replace=False)
        return set(layers.tolist())

    def after_step(self, view: View) -> None:  # noqa: ARG002
        """Count the optimizer's steps, by which LISA draws."""
        self._done += 1

    def state(self) -> Tensors:
        """The number of steps done, where LISA draws by it."""
        if self.options.lisa_layers is None:
            return {}
        step = torch.tensor(self._done)
        return {"step": step}

    def load_state(self, state: Tensors) -> None:
        """Go on from the number of steps that `state` gave."""
        step = state.get("step", 0)
        self._done = int(step)

    def export(self, model: "PreTrainedModel", weights: Tensors, folder: Path) -> None:
        """Write the model as transformers' `from_pretrained` loads it."""
        model.save_pretrained(folder, state_dict=weights)

    def merge(self, model: Module) -> Module:
        """The model itself: there is nothing to merge."""
        return model

    def _skip_others(self, view: View, active: set[int]) -> None:
        """Take gradient and optimizer state from layers that are not active, so that AdamW passes over them."""
        for fragment in view.fragments():
            layer = layer_of(fragment.name)
            if layer is not None and layer not in active:
                fragment.parameter.grad = None
                view.state(fragment).clear()
