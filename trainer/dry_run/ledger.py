"""The bytes of tensors without values: those that are alive, by what they are for, and the most at once."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ALLOCATED = 512  # bytes that CUDA's allocator gives at a time
Bytes = dict[str, int]  # by what they are for
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "gathers", "cache")


class Ledger(TorchDispatchMode):
    """Within it, every storage that an operation makes is counted until it is freed.

    `peaks` has for each phase that was named what was alive in its worst moment, by part.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: dict[str, Bytes] = {}
        self._vocabulary = vocabulary
        self._now = dict.fromkeys(PARTS, 0)
        self._total = 0
        self._highest: dict[str, int] = {}
        self._live: dict[int, tuple[int, str]] = {}
        self._references: dict[int, Any] = {}
        self._phase: str | None = None
        self._part = "weights"
        self._counts = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """That torch.compile may trace while it is on, as it changes nothing."""
        return True

    @contextmanager
    def phase(self, name: str, part: str) -> Iterator[None]:
        """Within it, what is made is counted as `part`, and the worst moment is that of phase `name`."""
        before = self._phase, self._part
        self._phase = name
        self._part = part
        self._look()
        try:
            yield
        finally:
            self._phase, self._part = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within it, what is made is not counted: a fused kernel would not hold it."""
        before = self._counts
        self._counts = False
        try:
            yield
        finally:
            self._counts = before

    def count(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Count a tensor's storage from now on, as `part`, whatever it was counted as before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // ALLOCATED) * ALLOCATED
        if key in self._live:
            if part is not None:
                self._drop(key)
                self._add(key, size, part)
            return
        forget = partial(self._forget, key)
        self._references[key] = weakref.ref(storage, forget)
        self._add(key, size, part or self._part_of(tensor))

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Count nothing for a tensor's storage from now on: it is on no device."""
        key = tensor.untyped_storage()._cdata
        self._drop(key)
        self._live[key] = (0, self._part)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.index_put.default and self._phase == "backward":
            # The gradient of an index is written into zeros, which only tensors without values are copied for.
            zeros = args[0]
            self._drop(zeros.untyped_storage()._cdata)
        if self._counts:
            for value in tree_iter(made):
                if isinstance(value, torch.Tensor):
                    self.count(value)
            self._look()
        return made

    def _part_of(self, tensor: torch.Tensor) -> str:
        if self._part != "activations" or tensor.dim() < 2:
            return self._part
        width = tensor.shape[-1]
        return "logits" if width == self._vocabulary else self._part

    def _add(self, key: int, size: int, part: str) -> None:
        self._live[key] = (size, part)
        self._now[part] += size
        self._total += size

    def _forget(self, key: int, _: Any) -> None:
        """A storage is freed."""
        self._drop(key)
        self._references.pop(key, None)

    def _drop(self, key: int) -> None:
        if key in self._live:
            size, part = self._live.pop(key)
            self._now[part] -= size
            self._total -= size

    def _look(self) -> None:
        """Keep what is alive now, where it is more than ever in this phase."""
        phase = self._phase
        if phase is None:
            return
        highest = self._highest.get(phase, -1)
        if self._total > highest:
            self._highest[phase] = self._total
            self.peaks[phase] = dict(self._now)
