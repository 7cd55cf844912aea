"""AdamW's step chunk by chunk, where not all that it works on can be on the device, or in fp32, at the same time.

Moments may be in the host's memory, from where they come to the device and go back. The arithmetic stays torch's own,
on the device and on the same numbers, so every bit is that of a step without offload; a step on the host's cores
would have other roundings, and wait for far slower memory.

Weights may be bf16: a chunk of them is made fp32, stepped, and rounded at random (rounding.py).
"""

import weakref
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.zero.lanes import BUFFERS, Lanes, OneLane
from trainer.zero.rounding import Rounding

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW's state names them
CHUNK_ELEMENTS = 2**24  # whose two moments are 128 MiB: enough for the full rate of a bus
ALIGNMENT = 64  # elements; kernels read whole vectors from there on
STEP_SETTINGS = ("lr", "weight_decay", "eps", "amsgrad", "maximize", "foreach", "fused", "capturable")

ParameterGroup = dict[str, Any]  # parameters of an optimizer, and the settings of their step


@dataclass(frozen=True, eq=False)
class PartOfChunk:
    """Elements of a parameter of some group, and where their moments lie in a chunk."""

    group: ParameterGroup
    parameter: nn.Parameter
    elements: slice
    place: slice
    number: int  # among all parts
    is_last: bool  # of its parameter

    @property
    def is_live(self) -> bool:
        """Whether its parameter has a gradient in this step."""
        return self.parameter.grad is not None


@dataclass(frozen=True, eq=False)
class MomentChunk:
    """What is on the device at a time: the moments of some parts, and where they lie among all moments."""

    place: slice
    parts: list[PartOfChunk] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        """Whether a part of it is."""
        live = [part.is_live for part in self.parts]
        return any(live)


class ChunkedAdamW:
    """The step of an AdamW, whose moments are one tensor; what its `state` has of a parameter is a part of it."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, on_host: bool, seed: int = 0) -> None:
        if type(optimizer) is not torch.optim.AdamW:
            kind = type(optimizer).__name__
            raise TypeError(f"found the optimizer {kind}; allowed in chunks: AdamW")
        self._optimizer = optimizer
        self._device = device
        self.on_host = on_host
        self._rounding = Rounding(seed, device)
        self._places: dict[nn.Parameter, slice] = {}
        self._chunks: list[MomentChunk] = []
        self._parts = 0
        total = self._lay_out()
        place = torch.device("cpu") if on_host else device
        kinds = len(MOMENTS)
        self.moments = torch.zeros(kinds, total, device=place)
        self._lanes: Lanes | OneLane = OneLane()
        if on_host and device.type == "cuda":
            self._lanes = Lanes(device)
            _pin(self, self.moments)

    def step(self, number: int) -> None:
        """What the optimizer's own step would do; rounds at random by the number of the step."""
        self.wait()
        self._rounding.begin(number)
        for parameter in self._places:
            if parameter.grad is not None:
                self._begin(parameter)
        live = []
        for chunk in self._chunks:
            if chunk.is_live:
                live.append(chunk)
        if self.on_host:
            self._step_on_device(live)
            return
        for chunk in live:
            moments = self.moments[:, chunk.place]
            self._step_chunk(chunk, moments)

    def _step_on_device(self, live: list[MomentChunk]) -> None:
        """Bring the moments of every chunk to the device, take its step, and take them back."""
        kinds, total = self.moments.shape
        longest = min(total, CHUNK_ELEMENTS)
        buffers = torch.empty(BUFFERS, kinds, longest, device=self._device)
        lanes = self._lanes
        lanes.begin()
        for number, chunk in enumerate(live):
            buffer = number % BUFFERS
            on_device = buffers[buffer]
            on_host = self.moments[:, chunk.place]
            lanes.bring(buffer, on_host, on_device)
            self._step_chunk(chunk, on_device)
            lanes.take_back(buffer, on_device, on_host)
        lanes.end()

    def wait(self) -> None:
        """Wait until what the last step left is on the host, so that it can be read and written there."""
        self._lanes.wait()

    def keep(self, parameter: nn.Parameter, kind: str, moment: Tensor) -> None:
        """Take a moment of a parameter as its state, as a checkpoint has it."""
        self.wait()
        views = self._views(parameter)
        view = views[kind]
        view.copy_(moment)
        state = self._optimizer.state[parameter]
        state[kind] = view

    def _lay_out(self) -> int:
        """Give every parameter its place among all moments; gives the number of elements that these take."""
        place = 0
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                elements = parameter.numel()
                end = place + elements
                self._places[parameter] = slice(place, end)
                self._cut(group, parameter, place)
                padding = -elements % ALIGNMENT
                place = end + padding
        return place

    def _cut(self, group: ParameterGroup, parameter: nn.Parameter, place: int) -> None:
        """Add the parts of a parameter, whose moments begin at a place, to the chunks that they lie in."""
        elements = parameter.numel()
        done = 0
        while done < elements:
            at = place + done
            number, begin = divmod(at, CHUNK_ELEMENTS)
            if number == len(self._chunks):
                start = number * CHUNK_ELEMENTS
                of_all = slice(start, start + CHUNK_ELEMENTS)
                self._chunks.append(MomentChunk(of_all))
            room = CHUNK_ELEMENTS - begin
            length = min(elements - done, room)
            end = done + length
            of_parameter = slice(done, end)
            of_chunk = slice(begin, begin + length)
            is_last = end == elements
            part = PartOfChunk(group, parameter, of_parameter, of_chunk, self._parts, is_last)
            self._parts += 1
            chunk = self._chunks[number]
            chunk.parts.append(part)
            done = end

    def _views(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Where the moments of a parameter lie."""
        place = self._places[parameter]
        rows = self.moments[:, place]
        named = zip(MOMENTS, rows, strict=True)
        return dict(named)

    def _begin(self, parameter: nn.Parameter) -> None:
        """Give a parameter moments of zero where it has none, as AdamW does before a first step."""
        state = self._optimizer.state[parameter]
        if "step" in state:
            return
        is_fused = self._optimizer.defaults["fused"]
        device = self._device if is_fused else None
        state["step"] = torch.tensor(0.0, device=device)
        for kind, view in self._views(parameter).items():
            state[kind] = view.zero_()

    def _step_chunk(self, chunk: MomentChunk, moments: Tensor) -> None:
        """Take AdamW's step of the parts of a chunk, whose moments are on the device."""
        first, second = moments
        live = filter(attrgetter("is_live"), chunk.parts)
        for _, of_group in groupby(live, lambda part: id(part.group)):
            parts = list(of_group)
            weights = []
            masters = []
            grads = []
            firsts = []
            seconds = []
            steps = []
            for part in parts:
                parameter = part.parameter
                weight = parameter.data[part.elements]
                weights.append(weight)
                master = weight.float()  # itself where it is fp32
                masters.append(master)
                grad = _gradient_of(part)
                grads.append(grad)
                of_first = first[part.place]
                firsts.append(of_first)
                of_second = second[part.place]
                seconds.append(of_second)
                step = self._optimizer.state[parameter]["step"]
                counted = step if part.is_last else step.clone()
                steps.append(counted)
            settings = _settings(parts[0].group)
            adamw(masters, grads, firsts, seconds, [], steps, **settings)
            for part, weight, master in zip(parts, weights, masters, strict=True):
                if master is not weight:
                    self._rounding.set(weight, master, part.number)


def _gradient_of(part: PartOfChunk) -> Tensor:
    """The gradient of a part that is live."""
    grad = part.parameter.grad
    assert grad is not None
    return grad[part.elements]


def _settings(group: ParameterGroup) -> dict[str, Any]:
    """What AdamW's step of a group goes by."""
    beta1, beta2 = group["betas"]
    settings = {"beta1": beta1, "beta2": beta2}
    for name in STEP_SETTINGS:
        settings[name] = group[name]
    return settings


def _pin(owner: object, tensor: Tensor) -> None:
    """Lock a tensor's pages for as long as its owner lives, so that a GPU copies them beside its work.

    torch's own pinned tensors take up to twice the memory, as they are rounded up to powers of two.
    """
    if not tensor.nbytes:
        return
    runtime = torch.cuda.cudart()
    pointer = tensor.data_ptr()
    error = runtime.cudaHostRegister(pointer, tensor.nbytes, 0)
    torch.cuda.check_error(error)
    unpin = weakref.finalize(owner, _unpin, tensor)
    unpin.atexit = False


def _unpin(tensor: Tensor) -> None:
    """Unlock a tensor's pages, which are there until then."""
    runtime = torch.cuda.cudart()
    pointer = tensor.data_ptr()
    runtime.cudaHostUnregister(pointer)
