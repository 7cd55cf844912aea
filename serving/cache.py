"""Keys and values of all sequences, in pages of PAGE tokens. Page 0 is nobody's: rows without a sequence use it.

Shapes: L layers, N places (pages x PAGE), H key-value heads, E head size, V tokens, P pages, X numbers of a page.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from serving.shape import Shape

PAGE = 16


class Cache:
    """Pages, and who may write into them."""

    def __init__(self, shape: Shape, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the keys and values of `pages` pages, of which all but page 0 can be reserved."""
        self.pages = pages
        places = pages * PAGE
        numbers = range(1, pages)
        from_last = reversed(numbers)
        heads = shape.kv_heads
        size = (shape.layers, places, heads, shape.head_size)
        self.key_LNHE = torch.zeros(size, dtype=dtype, device=device)
        self.value_LNHE = torch.zeros_like(self.key_LNHE)
        self._free = list(from_last)
        self._shared: dict[bytes, int] = {}  # pages by the key of what they hold
        self._key_of: dict[int, bytes] = {}
        self._users: dict[int, int] = {}  # how many sequences have a shared page
        self._unused: OrderedDict[int, None] = OrderedDict()  # shared pages that none has, left first comes first

    @property
    def free_pages(self) -> int:
        """Number of pages that can be reserved: those of no use, and shared ones that no sequence has."""
        of_no_use = len(self._free)
        return of_no_use + len(self._unused)

    def reserve(self, count: int) -> list[int] | None:
        """So many pages, or None where fewer are free; shared ones that no sequence has are given up last."""
        if count > self.free_pages:
            return None
        while len(self._free) < count:
            self._give_up_oldest()
        kept = len(self._free) - count
        reserved = self._free[kept:]
        del self._free[kept:]
        return reserved

    def free(self, pages: list[int]) -> None:
        """Make these pages free for other sequences."""
        self._free += pages

    def shared(self, key: bytes) -> int | None:
        """The page that holds what a key stands for, or None."""
        return self._shared.get(key)

    def share(self, page: int, key: bytes) -> None:
        """Let others join a page that one sequence has and has filled with what a key stands for."""
        self._shared[key] = page
        self._key_of[page] = key
        self._users[page] = 1

    def join(self, page: int) -> None:
        """Let one more sequence have a shared page."""
        self._unused.pop(page, None)
        self._users[page] += 1

    def leave(self, pages: list[int]) -> None:
        """Let a sequence have these shared pages no longer; what they hold is kept while there is room."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._unused[page] = None

    def _give_up_oldest(self) -> None:
        """Free the shared page that nobody has had for the longest time."""
        page, _ = self._unused.popitem(last=False)
        del self._users[page]
        key = self._key_of.pop(page)
        del self._shared[key]
        self._free.append(page)

    def write(self, pages: list[int], prefix_L2VHE: Tensor) -> None:
        """Put keys and values of a document's first tokens into its pages."""
        _, _, tokens, _, _ = prefix_L2VHE.shape
        prefix_L2VHE = prefix_L2VHE.to(self.key_LNHE)
        key_LVHE, value_LVHE = prefix_L2VHE.unbind(1)
        place_V = places_of(pages, 0, tokens)
        place_V = place_V.to(key_LVHE.device)
        of_all_layers = slice(None)
        self.key_LNHE[of_all_layers, place_V] = key_LVHE
        self.value_LNHE[of_all_layers, place_V] = value_LVHE

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy the keys and values of all layers from some pages to as many others."""
        device = self.key_LNHE.device
        source_P = torch.tensor(sources, device=device)
        target_P = torch.tensor(targets, device=device)
        for cached_LNHE in (self.key_LNHE, self.value_LNHE):
            for layer_NHE in cached_LNHE:
                page_PX = layer_NHE.view(self.pages, -1)
                page_PX[target_P] = page_PX[source_P]


def pages_for(tokens: int) -> int:
    """Number of pages that so many tokens take."""
    return -(-tokens // PAGE)


def places_of(pages: list[int], start: int, stop: int) -> Tensor:
    """Where the tokens [start, stop) of a sequence with these pages lie."""
    position = torch.arange(start, stop)
    number = position // PAGE
    page_of = torch.tensor(pages)
    page = page_of[number]
    return place_in(page, position)


def place_in(page: Tensor, position: Tensor) -> Tensor:
    """The places of positions that lie in these pages."""
    first = page * PAGE
    offset = position % PAGE
    return first + offset


def padded_pages(pages: list[int], count: int) -> list[int]:
    """These pages, and page 0 behind them until there are `count`."""
    missing = count - len(pages)
    padding = [0] * missing
    return pages + padding
