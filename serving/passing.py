"""One forward pass: its rows, where their keys and values go, and what they see.

Shapes: T rows, F half of the rotary size, S keys of a sequence.
"""

from dataclasses import dataclass, field

import torch

from serving.cache import places
from serving.mix import Mix


@dataclass
class Span:
    """Rows [row, row + count) are a sequence's positions [start, start + count), whose pages are these."""

    row: int
    count: int
    start: int
    pages: list[int]

    def places(self, start: int = 0) -> torch.Tensor:
        """Where the keys and values of positions [start, ...) up to its last row's lie."""
        return places(self.pages, start, self.start + self.count)


@dataclass
class Pass:
    """What a forward pass needs beside its rows' embeddings."""

    mix: Mix
    place_T: torch.Tensor  # where each row's keys and values go
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    spans: list[Span] = field(default_factory=list)
