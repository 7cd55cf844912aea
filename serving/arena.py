"""Memory of the device in which the weights of adapters lie as blocks."""

import torch

from serving.packed import UNIT

Gap = tuple[int, int]  # start, stop


class Arena:
    """One tensor on the device in which blocks lie; a block takes the first gap that is large enough."""

    def __init__(self, units: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate so many units of UNIT elements."""
        size = units * UNIT
        self.data = torch.zeros(size, dtype=dtype, device=device)
        whole = (0, units)
        self._gaps: list[Gap] = [whole]  # sorted

    @property
    def size(self) -> int:
        """How many numbers all blocks have together at most."""
        return len(self.data)

    def reserve(self, units: int) -> int | None:
        """The first unit of a new block of this size, or None where no gap is large enough."""
        for number, gap in enumerate(self._gaps):
            start, stop = gap
            end = start + units
            if end <= stop:
                self._gaps[number] = (end, stop)
                return start
        return None

    def free(self, start: int, units: int) -> None:
        """Make a block a gap, joined with its neighbours."""
        stop = start + units
        gaps = list(self._gaps)
        gaps.append((start, stop))
        gaps.sort()
        self._gaps = joined(gaps)


def joined(gaps: list[Gap]) -> list[Gap]:
    """Sorted gaps of which neighbours are one, without those of no size; at least one gap."""
    wider: list[Gap] = []
    last_end = -1  # of no gap
    for begin, end in gaps:
        if begin == last_end:
            before, _ = wider.pop()
            wider.append((before, end))
            last_end = end
        elif begin < end:
            wider.append((begin, end))
            last_end = end
    if not wider:
        return [(0, 0)]
    return wider
