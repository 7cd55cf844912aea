"""Keys and values of all sequences, in pages of PAGE tokens. Page 0 is nobody's: rows without a sequence use it.

Shapes: L layers, N places (pages x PAGE), H key-value heads, E head size, V tokens.
"""

import torch

from serving.shape import Shape

PAGE = 16


class Cache:
    """Pages, and who may write into them."""

    def __init__(self, shape: Shape, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for pages - 1 pages of tokens."""
        size = (shape.layers, pages * PAGE, shape.kv_heads, shape.head_size)
        self.key_LNHE = torch.zeros(size, dtype=dtype, device=device)
        self.value_LNHE = torch.zeros(size, dtype=dtype, device=device)
        self.pages = pages
        self._free = list(range(pages - 1, 0, -1))

    @property
    def free(self) -> int:
        """Number of pages that are free."""
        return len(self._free)

    def reserve(self, count: int) -> list[int] | None:
        """So many pages, or None where fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Let others have these pages."""
        self._free += pages

    def write(self, pages: list[int], prefix_L2VHE: torch.Tensor) -> None:
        """Put keys and values of a document's first tokens into its pages."""
        at_V = places(pages, 0, prefix_L2VHE.shape[2]).to(self.key_LNHE.device)
        self.key_LNHE[:, at_V] = prefix_L2VHE[:, 0].to(self.key_LNHE)
        self.value_LNHE[:, at_V] = prefix_L2VHE[:, 1].to(self.value_LNHE)

    def copy(self, source: int, target: int) -> None:
        """Copy the keys and values of all layers from one page to another."""
        for held in (self.key_LNHE, self.value_LNHE):
            held[:, target * PAGE : (target + 1) * PAGE] = held[:, source * PAGE : (source + 1) * PAGE]


def pages_for(tokens: int) -> int:
    """Number of pages that so many tokens take."""
    return -(-tokens // PAGE)


def places(pages: list[int], start: int, stop: int) -> torch.Tensor:
    """Where the tokens [start, stop) of a sequence with these pages lie."""
    position = torch.arange(start, stop)
    return torch.tensor(pages)[position // PAGE] * PAGE + position % PAGE
