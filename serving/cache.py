"""Keys and values of all sequences, in pages of PAGE tokens. Page 0 is nobody's: rows without a sequence use it.

Shapes: L layers, N places (pages x PAGE), H key-value heads, E head size, V tokens.
"""

import torch
from torch import Tensor

from serving.shape import Shape

PAGE = 16


class Cache:
    """Pages, and who may write into them."""

    def __init__(self, shape: Shape, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the keys and values of `pages` pages, of which all but page 0 can be reserved."""
        count = pages * PAGE
        size = (shape.layers, count, shape.kv_heads, shape.head_size)
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
        """Make these pages free for other sequences."""
        self._free += pages

    def write(self, pages: list[int], prefix_L2VHE: Tensor) -> None:
        """Put keys and values of a document's first tokens into its pages."""
        key_LVHE, value_LVHE = prefix_L2VHE.unbind(1)
        tokens = key_LVHE.shape[1]
        place_V = places(pages, 0, tokens)
        place_V = place_V.to(self.key_LNHE.device)
        self.key_LNHE[:, place_V] = key_LVHE.to(self.key_LNHE)
        self.value_LNHE[:, place_V] = value_LVHE.to(self.value_LNHE)

    def copy(self, source: int, target: int) -> None:
        """Copy the keys and values of all layers from one page to another."""
        sources = page_places(source)
        targets = page_places(target)
        for cached_LNHE in (self.key_LNHE, self.value_LNHE):
            cached_LNHE[:, targets] = cached_LNHE[:, sources]


def page_places(page: int) -> slice:
    """The places of a page's tokens."""
    start = page * PAGE
    return slice(start, start + PAGE)


def pages_for(tokens: int) -> int:
    """Number of pages that so many tokens take."""
    return -(-tokens // PAGE)


def places(pages: list[int], start: int, stop: int) -> Tensor:
    """Where the tokens [start, stop) of a sequence with these pages lie."""
    position = torch.arange(start, stop)
    page_of = torch.tensor(pages)
    page = page_of[position // PAGE]
    return place_in(page, position)


def place_in(page: Tensor, position: Tensor) -> Tensor:
    """The places of positions that lie in these pages."""
    offset = position % PAGE
    return page * PAGE + offset


def padded_pages(pages: list[int], count: int) -> list[int]:
    """These pages, and page 0 behind them until there are `count`."""
    missing = count - len(pages)
    padding = [0] * missing
    return pages + padding
