"""One forward pass: its rows, where their keys and values go, and what they see.

Shapes: T rows, F half of the rotary size, S keys of a sequence or of all, N sequences and one more, P pages.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from serving.cache import PAGE, places
from serving.mix import Mix
from serving.work import Work


@dataclass
class Span:
    """Rows [row, row + count) are a sequence's positions [start, start + count), whose pages are these."""

    row: int
    count: int
    start: int
    pages: list[int]

    def places(self) -> torch.Tensor:
        """Where the keys and values of all positions up to its last row's lie."""
        return places(self.pages, 0, self.start + self.count)


class Runs(NamedTuple):
    """Spans, one behind the other, as attention of runs of different lengths takes them; on the device."""

    row_N: torch.Tensor  # where each one's rows begin, and the last one's end
    key_N: torch.Tensor  # the same for their keys
    rows: int  # of the longest
    keys: int
    place_S: torch.Tensor


@dataclass
class Pass:
    """What a forward pass needs beside its rows' embeddings."""

    mix: Mix
    place_T: torch.Tensor  # where each row's keys and values go
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    spans: list[Span] = field(default_factory=list)
    before: Work | None = None  # updates of linear layers that grouped kernels add
    behind: Work | None = None  # bottlenecks
    tail: int = 0  # ranks behind each of the base's weights that are computed with it
    ranks: int = 16  # of the adapters there, at most
    pages_TP: torch.Tensor | None = None  # where every row is a sequence: its pages,
    position_T: torch.Tensor | None = None  # and its position
    parts: int = 1  # in which its keys are computed side by side

    @cached_property
    def runs(self) -> Runs:
        """The spans for attention of runs."""
        row_N = torch.tensor([0, *(span.count for span in self.spans)]).cumsum(0).int()
        key_N = torch.tensor([0, *(span.start + span.count for span in self.spans)]).cumsum(0).int()
        rows, keys = (int(ends.diff().max()) for ends in (row_N, key_N))
        place_S = self.place_T
        if keys > rows or bool((row_N != key_N).any()):
            place_S = laid([Span(0, span.start + span.count, 0, span.pages) for span in self.spans])[1]
        moved = [tensor.to(self.place_T.device, non_blocking=True) for tensor in (row_N, key_N, place_S)]
        return Runs(moved[0], moved[1], rows, keys, moved[2])


def laid(spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of every row of some spans, and where its keys and values lie."""
    count_N = torch.tensor([span.count for span in spans])
    span_T = torch.repeat_interleave(count_N)
    shift_N = torch.tensor([span.start for span in spans]) - (count_N.cumsum(0) - count_N)
    position_T = torch.arange(len(span_T)) + shift_N[span_T]
    most = max(len(span.pages) for span in spans)
    page_NP = torch.tensor([span.pages + [0] * (most - len(span.pages)) for span in spans])
    return position_T, page_NP[span_T, position_T // PAGE] * PAGE + position_T % PAGE
