"""Stage 3 of a base that is frozen: its weights are shared out among ranks, and come whole a layer at a time.

All that a frozen weight needs is to be whole in time. So a layer's are one slice of each rank, one gather makes them
whole, and while a layer computes the next one comes: the one after it, or in the backward pass the one before. What
an adapter trains is small, and sharded as at stage 2. DeepSpeed's own stage 3 is made for weights that are trained:
its hooks look at each of them, and the time for that is twice what the layers of a small base compute.
Shapes: W ranks, S bytes of a slice.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runfolder.training import may_be_whole
from trainer.zero.by_layer import decoder_layers, largest_layer, with_gradient
from trainer.zero.gather import is_gathered, is_sharded, mark_gathered, mark_released, shape, slice_of
from trainer.zero.linear import shard_linears

SLICE_START = 16  # bytes, of which each parameter's slice begins at a multiple: a whole number of any elements


def is_frozen_apart(model: nn.Module) -> bool:
    """Whether a model's sharded weights are all frozen, and the others, whole on each rank, few beside them."""
    whole = sharded = 0
    for parameter in model.parameters():
        if not is_sharded(parameter):
            whole += parameter.numel()
        elif parameter.requires_grad:
            return False
        else:
            sharded += shape(parameter).numel()
    return may_be_whole(whole, sharded) and largest_layer(model) > 0


def gather_in_turn(model: nn.Module) -> None:
    """Have each decoder layer of a model, and each module outside of them, make its sharded weights whole in time."""
    shard_linears(model, is_sharded)
    inside: set[nn.Module] = set()
    before: Unit | None = None
    for layer in decoder_layers(model):
        inside.update(layer.modules())
        sharded = list(filter(is_sharded, layer.parameters()))
        if not sharded:
            continue
        unit = Unit(sharded)
        if before:
            unit.before = before
            before.after = unit
        before = unit
        layer.register_forward_pre_hook(with_gradient, with_kwargs=True)
        unit.watch(layer)
    by_parameter: dict[nn.Parameter, Unit] = {}  # modules may share one
    for module in model.modules():
        if module in inside:
            continue
        for parameter in filter(is_sharded, module.parameters(recurse=False)):
            if parameter not in by_parameter:
                by_parameter[parameter] = Unit([parameter])
            by_parameter[parameter].watch(module)


class Unit:
    """Sharded parameters that are gathered together, for the module that computes with them.

    All ranks gather in the same order, as that is a collective.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.before: Unit | None = None  # the one whose turn is before this one's in the forward pass
        self.after: Unit | None = None
        self._in_backward = False
        self._places = list(_slice_places(parameters))
        self._slice_S = _one_slice(self._places)
        self._coming: tuple[Any, Tensor] | None = None  # a gather under way, and what it fills [W S]

    def watch(self, module: nn.Module) -> None:
        """Be whole while a module computes, and ask for the next unit meanwhile."""
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def ask(self) -> None:
        """Begin to gather, unless that was done."""
        workers = dist.get_world_size()
        if workers == 1 or self._coming or self._is_whole():
            return
        size = workers * len(self._slice_S)
        slices_WS = self._slice_S.new_empty(size)
        work = dist.all_gather_into_tensor(slices_WS, self._slice_S, async_op=True)
        self._coming = work, slices_WS

    def make_whole(self) -> None:
        """Have all parameters whole from here on."""
        if self._is_whole():
            return
        self.ask()
        slices_WS = self._slice_S  # of a rank alone, which has not asked
        if self._coming:
            work, slices_WS = self._coming
            self._coming = None
            work.wait()
        _join_slices(self._places, slices_WS)

    def release(self) -> None:
        """Keep no more of the parameters than this rank's slices."""
        for place in self._places:
            if is_gathered(place.parameter):
                mark_released(place.parameter)

    def _is_whole(self) -> bool:
        parameters = [place.parameter for place in self._places]
        return all(map(is_gathered, parameters))

    def _begin(self, _: nn.Module, values: tuple[Any, ...]) -> None:
        """Before the module's forward pass."""
        self.make_whole()
        if self._in_backward:  # activations are computed again
            return
        if self.after:
            self.after.ask()
        if torch.is_grad_enabled() and values and values[0].requires_grad:
            values[0].register_hook(self._end_backward)

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        """Behind the module's forward pass."""
        if self._in_backward:
            return
        self.release()
        for node in _nodes(output):
            node.register_prehook(self._begin_backward)

    def _begin_backward(self, _: Any) -> None:
        """Before the first node of the module's backward pass."""
        self._in_backward = True
        self.make_whole()
        if self.before:
            self.before.ask()

    def _end_backward(self, _: Tensor) -> None:
        """When there is the gradient of what the module was given."""
        self._in_backward = False
        self.release()


@dataclass(frozen=True)
class SlicePlace:
    """Where the slices of a parameter are among those of its unit: the bytes [start, stop)."""

    parameter: nn.Parameter
    start: int
    stop: int


def _slice_places(parameters: Iterable[nn.Parameter]) -> Iterator[SlicePlace]:
    """The places of parameters in a slice that has those of all of them, one behind the other."""
    start = 0
    for parameter in parameters:
        held = slice_of(parameter)
        stop = start + held.nbytes
        yield SlicePlace(parameter, start, stop)
        start = stop + -stop % SLICE_START


def _one_slice(places: Sequence[SlicePlace]) -> Tensor:
    """This rank's slices of parameters as one [S], of which DeepSpeed's own are parts from now on."""
    end = places[-1].stop
    size = end + -end % SLICE_START
    first = slice_of(places[0].parameter)
    slice_S = torch.empty(size, dtype=torch.uint8, device=first.device)
    for place in places:
        held = slice_of(place.parameter)
        part = slice_S[place.start : place.stop].view(held.dtype)
        part.copy_(held)
        held.data = part
    return slice_S


def _join_slices(places: Sequence[SlicePlace], slices: Tensor) -> None:
    """Let parameters be what the slices of all ranks [W S] make."""
    workers = dist.get_world_size()
    slices_WS = slices.view(workers, -1)
    whole = slices
    if workers > 1:
        whole = torch.empty_like(slices)
    for place in places:
        joined = whole[workers * place.start : workers * place.stop]
        if workers > 1:
            of_ranks = slices_WS[:, place.start : place.stop]
            torch.cat(of_ranks.unbind(), out=joined)
        parameter = place.parameter
        whole_shape = shape(parameter)
        padded = joined.view(parameter.dtype)
        values = padded[: whole_shape.numel()]
        mark_gathered(parameter, values.view(whole_shape))


def _nodes(output: Any) -> set[Any]:
    """The last nodes of what has computed an output, a tensor or several: where its backward pass begins."""
    tensors = output if isinstance(output, tuple) else (output,)
    nodes = set()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            nodes.add(tensor.grad_fn)
    return nodes
