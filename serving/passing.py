"""One forward pass: its rows, where their keys and values go, and what they see.

Shapes: T rows, F half of the rotary size, S keys of a sequence or of all, N sequences and one more, P pages.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from serving.cache import PAGE, padded_pages, place_in, places_of
from serving.grouping import Grouping, Tiles, moved, sum_before
from serving.mix import AdapterBatch
from serving.packed import Needs


@dataclass
class Span:
    """Rows [row, row + count) are a sequence's positions [start, start + count), whose pages are these."""

    row: int
    count: int
    start: int
    pages: list[int]

    @property
    def stop(self) -> int:
        """The position behind its last row's."""
        return self.start + self.count

    @property
    def last_row(self) -> int:
        """The number of its last row."""
        end = self.row + self.count
        return end - 1

    @property
    def rows(self) -> slice:
        """Its rows among those of the pass."""
        stop = self.row + self.count
        return slice(self.row, stop)

    def places(self) -> Tensor:
        """Where the keys and values of all positions up to its last row's lie."""
        return places_of(self.pages, 0, self.stop)


class AttentionRuns(NamedTuple):
    """Spans, one behind the other, as attention of runs of different lengths takes them; on the device."""

    row_N: Tensor  # where each one's rows begin, and the last one's end
    key_N: Tensor  # the same for their keys
    rows: int  # of the longest
    keys: int
    place_S: Tensor


@dataclass
class Pass:
    """What a forward pass needs beside its rows' embeddings."""

    adapters: AdapterBatch
    grouping: Grouping
    place_T: Tensor  # where each row's keys and values go
    cos_TF: Tensor
    sin_TF: Tensor
    spans: list[Span] = field(default_factory=list)
    tail: int = 0  # ranks behind each of the base's weights that are computed with it
    products: int = 0  # of a row with its narrow adapter's factors, at most
    pages_TP: Tensor | None = None  # where every row is a sequence: its pages,
    position_T: Tensor | None = None  # and its position
    parts: int = 1  # in which its keys are computed side by side

    @property
    def needs(self) -> Needs:
        """What its adapters ask of it."""
        return self.adapters.needs

    @property
    def tiles(self) -> Tiles:
        """Its rows in tiles."""
        return self.grouping.tiles

    @property
    def is_decoding(self) -> bool:
        """Whether every row is a sequence."""
        return self.pages_TP is not None

    @property
    def has_products(self) -> bool:
        """Whether behind the outputs of linear layers are each row's products with the factors of its adapter.

        When decoding these are in a tail; over prompts they are written there if all adapters are narrow.
        """
        if self.is_decoding:
            return self.tail > 0
        return self.needs.is_narrow

    @cached_property
    def runs(self) -> AttentionRuns:
        """The spans for attention of runs."""
        spans = self.spans
        row_N = boundaries([span.count for span in spans])
        key_N = boundaries([span.stop for span in spans])
        rows = longest(row_N)
        keys = longest(key_N)
        place_S = self.place_T
        if not torch.equal(row_N, key_N):
            place_S = self._key_places()
        device = self.place_T.device
        row_N = moved(row_N, device)
        key_N = moved(key_N, device)
        place_S = moved(place_S, device)
        return AttentionRuns(row_N, key_N, rows, keys, place_S)

    def _key_places(self) -> Tensor:
        """Where all keys of the spans lie, those that were computed by earlier passes included."""
        whole: list[Span] = []
        for span in self.spans:
            from_start = Span(0, span.stop, 0, span.pages)
            whole.append(from_start)
        _, place_S = positions_and_places(whole)
        return place_S


def boundaries(lengths: list[int]) -> Tensor:
    """Where runs of these lengths begin, one behind the other, and where the last one ends."""
    length_N = torch.tensor([0, *lengths])
    end_N = length_N.cumsum(0)
    return end_N.int()


def longest(boundary_N: Tensor) -> int:
    """The length of the longest run between boundaries."""
    length_N = boundary_N.diff()
    return int(length_N.max())


def positions_and_places(spans: list[Span]) -> tuple[Tensor, Tensor]:
    """The position of every row of some spans, and where its keys and values lie."""
    count_N = torch.tensor([span.count for span in spans])
    start_N = torch.tensor([span.start for span in spans])
    span_T = torch.repeat_interleave(count_N)  # the number of each row's span
    first_row_N = sum_before(count_N)
    shift_N = start_N - first_row_N
    shift_T = shift_N[span_T]
    row_T = torch.arange(len(span_T))
    position_T = row_T + shift_T
    page_NP = page_table([span.pages for span in spans])
    column_T = position_T // PAGE
    page_T = page_NP[span_T, column_T]
    place_T = place_in(page_T, position_T)
    return position_T, place_T


def page_table(sequences: list[list[int]]) -> Tensor:
    """The pages [N, P] of some sequences, padded to as many as the longest has."""
    lengths = [len(pages) for pages in sequences]
    most = max(lengths)
    rows = [padded_pages(pages, most) for pages in sequences]
    return torch.tensor(rows)
