"""A batch of decoding steps: what its graph depends on, and in how many parts its attention is computed."""

from dataclasses import dataclass
from typing import Any

from serving.grouping import Grouping
from serving.mix import AdapterBatch
from serving.sampler import Manner

BUSY = 264  # programs that keep a GPU's multiprocessors busy
LONG = 512  # positions from which a sequence's keys are computed in parts
MOST_PARTS = 16
GraphKind = tuple[Any, ...]


@dataclass
class Batch:
    """What a step computes, and a graph of it depends on."""

    rows: int  # those of no sequence included
    adapters: AdapterBatch
    grouping: Grouping
    tail: int  # ranks behind the base's weights
    parts: int  # in which keys are computed
    manner: Manner

    @property
    def kind(self) -> GraphKind:
        """What batches have in common that one graph can compute."""
        needs = self.adapters.needs
        grouped = self.grouping.size
        residents: list[int] = []
        for member in self.adapters.members:
            resident = id(member.resident)
            residents.append(resident)
        return self.rows, self.tail, self.parts, self.manner, needs, grouped, *residents


def parts_of(length: int, programs: int) -> int:
    """In how many parts the keys of sequences are computed, where one part would take so many programs."""
    if length <= LONG:
        return 1
    share = BUSY // programs
    parts = 1 << share.bit_length()
    parts = min(MOST_PARTS, parts)
    return max(1, parts)
