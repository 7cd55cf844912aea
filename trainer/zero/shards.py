"""A model under DeepSpeed's engine: backward, step, and the trained state by name.

DeepSpeed averages gradients over ranks, so a loss is multiplied by the world size to give their sum. At a step it
calls its optimizer, a placeholder of ours, with every gradient in place; the method's hooks and an optimizer that
knows fragments of named parameters instead of flat slices do the rest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from methods.base import Fragment as AnyFragment
from methods.base import Method, Piece
from trainer.zero import engine, layout
from trainer.zero.gather import gathered, shape
from trainer.zero.layout import Fragment


class Shards:
    """A model under DeepSpeed: backward, step, and the trained state by name (a `methods.base.View`)."""

    def __init__(
        self, model: nn.Module, method: Method[Any], stage: int, lr: float = 0.0, adam: dict[str, Any] | None = None
    ) -> None:
        self.model = model
        self.stage = stage
        self.replicated = stage == 0
        self.method = method
        self._clip: float | None = None
        self._grad_norm: torch.Tensor | None = None
        names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._shapes = {name: shape(parameter) for parameter, name in names.items()}
        placeholder = engine.Placeholder(list(names))
        self.engine = engine.start(model, placeholder, stage)
        # A method that sums gradients itself gets each rank's own share, where DeepSpeed would sum whole ones.
        self._averaged = stage != 0 or not method.reduces
        self.engine.enable_backward_allreduce = self._averaged
        self._fragments = list(layout.fragments(self.engine, names, stage))
        self._by_name = {fragment.name: fragment for fragment in self._fragments}
        self.optimizer = method.optimizer(self, lr, **(adam or {}))
        placeholder.on_step = self._step

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def fragments(self) -> Sequence[Fragment]:
        """What this rank holds."""
        return self._fragments

    def state(self, fragment: AnyFragment) -> dict[str, Any]:
        """What the optimizer keeps of a fragment, to be read and changed; empty before its first step."""
        state: dict[str, Any] = self.optimizer.state[fragment.parameter]
        return state

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a trained parameter."""
        return self._shapes[name]

    def whole(self, name: str, part: Callable[[AnyFragment], torch.Tensor]) -> torch.Tensor:
        """What all ranks' parts of a trained parameter make, in its shape, on every rank; a collective."""
        fragment = self._by_name.get(name)
        if self.replicated and fragment is not None:
            return part(fragment).view(self.shape(name))
        out = torch.zeros(self.shape(name), device=self.device)
        if fragment is not None:
            out.view(-1)[fragment.start : fragment.stop] = part(fragment)
        dist.all_reduce(out)
        return out

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss that is summed over ranks."""
        self.engine.backward(loss * dist.get_world_size() if self._averaged else loss, scale_wrt_gas=False)

    def step(self, lr: float, clip: float | None) -> torch.Tensor:
        """Apply the gradients and give their global norm before clipping, a 0-d fp64 tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        self._clip, self._grad_norm = clip, None
        self.engine.step()
        # Stage 3 skips the step by itself when the norm is not finite.
        return self._grad_norm if self._grad_norm is not None else torch.tensor(math.nan)

    def pieces(self) -> list[Piece]:
        """All of the trained state that this rank holds: weights, the optimizer's tensors, the method's own."""
        trained = [
            Piece(f.name, f.start, {"weight": f.parameter.data, **self._tensors(f)}, self.replicated)
            for f in self._fragments
        ]
        return [*trained, *self._changed(), *self.method.pieces()]

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the output holds, whole, on the host of rank 0 (empty elsewhere); a collective.

        Every parameter where the output is a model, else those that are trained or changed.
        """
        changed, all_ = set(self.method.changed(self.model)), self.method.options.makes_model
        for name, parameter in self.model.named_parameters():
            if all_ or parameter.requires_grad or name in changed:
                with gathered([parameter]):
                    yield name, parameter.detach().to("cpu", copy=True) if dist.get_rank() == 0 else torch.empty(0)

    def _step(self) -> None:
        for fragment in self._fragments:
            fragment.take_gradient()
        self.method.penalty(self)
        grads = self.method.gradients(self)
        self._grad_norm = self._norm(grads)
        if self._clip is not None:
            scale = torch.clamp(self._clip / (self._grad_norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(scale.to(grad.dtype))
        self.method.before_step(self)
        self.optimizer.step()
        self.method.after_step(self)

    def _norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in grads]
        square = torch.stack([torch.zeros((), dtype=torch.float64, device=self.device), *squares]).sum()
        if not self.replicated:
            dist.all_reduce(square)
        return square.sqrt()

    def _tensors(self, fragment: Fragment) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.state(fragment).items() if isinstance(value, torch.Tensor)}

    def _changed(self) -> Iterator[Piece]:
        for name in self.method.changed(self.model):
            piece = layout.held(name, self.model.get_parameter(name), self.stage)
            if piece is not None:
                yield piece
