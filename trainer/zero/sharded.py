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

from methods.base import Fragment, Method, Piece
from trainer.zero import engine, layout
from trainer.zero.chunked import MOMENTS, ChunkedAdamW
from trainer.zero.frozen import gather_in_turn, is_frozen_apart
from trainer.zero.gather import gathered, shape
from trainer.zero.layout import OwnedFragment, ParameterNames

EngineStart = Callable[[nn.Module, torch.optim.Optimizer, int], Any]  # from model, optimizer and ZeRO stage


class ShardedModel:
    """A model under DeepSpeed: backward, step, and the trained state by name (a `methods.base.View`)."""

    def __init__(
        self,
        model: nn.Module,
        method: Method[Any],
        stage: int,
        lr: float = 0.0,
        adam: dict[str, Any] | None = None,
        start: EngineStart = engine.start_engine,
        offload: bool = False,
    ) -> None:
        self.model = model
        self.stage = stage
        self.replicated = stage == 0
        self.method = method
        self._clip: float | None = None
        self._number = 0
        self._grad_norm: torch.Tensor | None = None
        names = _names_of_trained(model)
        self._shapes = {name: shape(parameter) for parameter, name in names.items()}
        trained = list(names)
        placeholder = engine.Placeholder(trained)
        stage_of_trained = stage
        if is_frozen_apart(model):
            stage_of_trained = 2
            gather_in_turn(model)
        self.engine = start(model, placeholder, stage_of_trained)
        # A method that sums gradients itself gets each rank's own share, where DeepSpeed would sum whole ones.
        # A rank alone has nothing to average; at other stages DeepSpeed also moves gradients then.
        alone = stage == 0 and dist.get_world_size() == 1
        self._averaged = not alone and (stage != 0 or not method.reduces)
        self.engine.enable_backward_allreduce = self._averaged
        if offload:
            layout.share_masters(self.engine, stage_of_trained)
        fragments = layout.fragments(self.engine, names, stage_of_trained)
        self._fragments = list(fragments)
        self._by_name = {fragment.name: fragment for fragment in self._fragments}
        self.optimizer = method.optimizer(self, lr, **(adam or {}))
        self.chunked: ChunkedAdamW | None = None
        if offload or not method.setup.master_weights:
            self.chunked = ChunkedAdamW(self.optimizer, self.device, offload, method.setup.seed)
        placeholder.on_step = self._step
        self._placeholder = placeholder

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        parameters = self.model.parameters()
        return next(parameters).device

    @property
    def is_fused(self) -> bool:
        """Whether the optimizer's step is one kernel, which wants scalars of its state on the device."""
        defaults = self.optimizer.defaults
        return bool(defaults.get("fused"))

    def fragments(self) -> Sequence[OwnedFragment]:
        """The fragments of trained parameters that this rank holds."""
        return self._fragments

    def state(self, fragment: Fragment) -> dict[str, Any]:
        """What the optimizer keeps of a fragment, to be read and changed; empty before its first step."""
        if self.chunked:
            self.chunked.wait()
        parameter = fragment.parameter
        state: dict[str, Any] = self.optimizer.state[parameter]
        return state

    def set_state(self, fragment: Fragment, kind: str, value: torch.Tensor) -> None:
        """Give a fragment a state of its optimizer, as a checkpoint has it: 1-D, or a 0-d scalar."""
        parameter = fragment.parameter
        if self.chunked and kind in MOMENTS:
            self.chunked.keep(parameter, kind, value)
            return
        is_scalar = value.dim() == 0
        if self.is_fused or not is_scalar:
            value = value.to(parameter.device)
        self.state(fragment)[kind] = value

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a trained parameter."""
        return self._shapes[name]

    def whole(self, name: str, part: Callable[[Fragment], torch.Tensor]) -> torch.Tensor:
        """What all ranks' parts of a trained parameter make, in its shape, on every rank; a collective."""
        size = self.shape(name)
        fragment = self._by_name.get(name)
        if self.replicated and fragment is not None:
            everything = part(fragment)
            return everything.view(size)
        out = torch.zeros(size, device=self.device)
        if fragment is not None:
            flat = out.view(-1)
            flat[fragment.start : fragment.stop] = part(fragment)
        dist.all_reduce(out)
        return out

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss that is summed over ranks."""
        if self._averaged:
            world_size = dist.get_world_size()
            loss = loss * world_size
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, clip: float | None, number: int = 0) -> torch.Tensor:
        """Apply the gradients and give their global norm before clipping, a 0-d fp64 tensor.

        What is at random in a step is by its number.
        """
        self._number = number
        groups = self.optimizer.param_groups
        for group in groups:
            ratio = group.get("lr_ratio", 1.0)
            group["lr"] = lr * ratio
        self._clip = clip
        self._grad_norm = None
        self.engine.step()
        # Stage 3 skips the step by itself when the norm is not finite.
        if self._grad_norm is None:
            return torch.tensor(math.nan)
        return self._grad_norm

    def discard(self) -> None:
        """Let go of the gradients of passes that were only tried; nothing that is trained moves. A collective.

        DeepSpeed keeps gradients in places of its own, which it clears after a step: in this one nothing is done.
        """
        self._placeholder.on_step = lambda: None
        try:
            self.engine.step()
        finally:
            self._placeholder.on_step = self._step

    def pieces(self) -> list[Piece]:
        """All of the trained state that this rank holds: weights, the optimizer's tensors, the method's own."""
        trained = map(self._piece, self._fragments)
        changed = self._changed()
        pieces = [*trained, *changed]
        pieces += self.method.pieces()
        return pieces

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the output holds, whole, on the host of rank 0 (empty elsewhere); a collective.

        Every parameter where the output is a model, else those that are trained or changed.
        """
        model = self.model
        method = self.method
        changed = set(method.changed_frozen(model))
        whole_model = method.options.makes_model
        for name, parameter in model.named_parameters():
            delivered = whole_model or parameter.requires_grad or name in changed
            if not delivered:
                continue
            with gathered([parameter]):
                weight = torch.empty(0)
                if dist.get_rank() == 0:
                    weight = parameter.detach().to("cpu", copy=True)
                yield name, weight

    def _step(self) -> None:
        """What DeepSpeed's step calls: gradients to fragments, the norm and clipping, and the method's own step."""
        method = self.method
        for fragment in self._fragments:
            fragment.take_gradient()
        method.penalty(self)
        grads = method.gradients(self)
        norm = self._norm(grads)
        self._grad_norm = norm
        if grads and self._clip is not None:
            ratio = self._clip / (norm + 1e-6)
            scale = torch.clamp(ratio, max=1.0)
            scale = scale.float()
            torch._foreach_mul_(grads, scale)
        method.before_step(self)
        if self.chunked:
            self.chunked.step(self._number)
        else:
            self.optimizer.step()
        method.after_step(self)
        for fragment in self._fragments:
            fragment.drop_gradient()

    def _norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """The global norm of gradients, a 0-d fp64 tensor; a collective where ranks hold different elements."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        norms = [zero]  # a rank may hold nothing
        if grads:
            norms += torch._foreach_norm(grads, 2, torch.float64)
        stacked = torch.stack(norms)
        square = (stacked**2).sum()
        if not self.replicated:
            dist.all_reduce(square)
        return square.sqrt()

    def _piece(self, fragment: OwnedFragment) -> Piece:
        """A fragment's weight and the tensors that the optimizer keeps of it."""
        tensors = {"weight": fragment.parameter.data}
        state = self.state(fragment)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[key] = value
        return Piece(fragment.name, fragment.start, tensors, self.replicated)

    def _changed(self) -> Iterator[Piece]:
        """What this rank holds of the frozen parameters that training changes all the same."""
        model = self.model
        for name in self.method.changed_frozen(model):
            parameter = model.get_parameter(name)
            piece = layout.held_piece(name, parameter)
            if piece is not None:
                yield piece


def _names_of_trained(model: nn.Module) -> ParameterNames:
    """The names of a model's trained parameters."""
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names[parameter] = name
    return names
