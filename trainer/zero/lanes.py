"""How chunks come to a GPU and go back while another one is worked on; on a CPU, one thing after the other."""

import torch
from torch import Tensor
from torch.cuda import Event, Stream

BUFFERS = 3  # chunks that are on the device at a time: one comes, one is worked on, one goes


class OneLane:
    """On a CPU every copy is done when it returns."""

    def begin(self) -> None:
        """Called before the first chunk: nothing is under way."""

    def bring(self, buffer: int, on_host: Tensor, on_device: Tensor) -> None:  # noqa: ARG002
        """Have a chunk on the device, in a buffer that is at least as long."""
        _copy(on_host, on_device)

    def take_back(self, buffer: int, on_device: Tensor, on_host: Tensor) -> None:  # noqa: ARG002
        """Have on the host what the device made of a chunk."""
        _copy(on_device, on_host)

    def end(self) -> None:
        """Called after the last chunk: nothing is under way."""

    def wait(self) -> None:
        """Called before the host reads or writes: nothing is under way."""


class Lanes:
    """Two streams of a GPU, in one of which chunks come while they go in the other."""

    def __init__(self, device: torch.device) -> None:
        self._incoming = Stream(device)
        self._outgoing = Stream(device)
        self._gone: dict[int, Event] = {}  # by buffer
        self._last: Event | None = None

    def begin(self) -> None:
        """Let nothing come before what is under way, which may use the buffers' memory."""
        current = torch.cuda.current_stream()
        self._incoming.wait_stream(current)
        self._gone.clear()

    def bring(self, buffer: int, on_host: Tensor, on_device: Tensor) -> None:
        """Have a chunk on the device for what follows, in a buffer from which the last one has gone."""
        gone = self._gone.get(buffer)
        if gone is not None:
            self._incoming.wait_event(gone)
        with torch.cuda.stream(self._incoming):
            _copy(on_host, on_device)
        current = torch.cuda.current_stream()
        current.wait_stream(self._incoming)

    def take_back(self, buffer: int, on_device: Tensor, on_host: Tensor) -> None:
        """Have what the device makes of a chunk go to the host once it is made."""
        current = torch.cuda.current_stream()
        self._outgoing.wait_stream(current)
        with torch.cuda.stream(self._outgoing):
            _copy(on_device, on_host)
        gone = self._outgoing.record_event()
        self._gone[buffer] = gone
        self._last = gone

    def end(self) -> None:
        """Let nothing take the buffers' memory before the last chunk has gone."""
        current = torch.cuda.current_stream()
        current.wait_stream(self._outgoing)

    def wait(self) -> None:
        """Wait until the last chunk is on the host."""
        if self._last is not None:
            self._last.synchronize()


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy rows from or to longer ones; each by itself, as only a whole piece of memory goes without a wait."""
    pairs = zip(source, target, strict=True)
    for row, copied in pairs:
        length = min(len(row), len(copied))
        begin = copied[:length]
        begin.copy_(row[:length], non_blocking=True)
