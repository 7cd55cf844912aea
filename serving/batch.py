"""A batch of decoding steps: what its graph depends on, and in how many parts its attention is computed."""

from dataclasses import dataclass
from typing import Any

from serving.mix import Mix
from serving.work import Work

BUSY = 264  # programs that keep a GPU's multiprocessors busy
LONG = 512  # positions from which a sequence's keys are computed in parts


@dataclass
class Batch:
    """What a step computes, and a graph of it depends on."""

    size: int  # rows, those of no sequence included
    mix: Mix
    tail: int  # ranks behind the base's weights
    before: Work | None
    behind: Work | None
    parts: int  # in which keys are computed
    greedy: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """What batches have in common that one graph can compute."""
        works = (work_size(self.before), work_size(self.behind))
        residents = tuple(id(tenant.resident) for tenant in self.mix.tenants)
        return self.size, self.tail, works, self.parts, self.greedy, self.mix.needs, residents


def work_size(work: Work | None) -> tuple[int, ...] | None:
    """What a graph's kernels are launched for."""
    if work is None:
        return None
    return len(work.task), len(work.segment), work.rank, work.ranks


def parts_of(length: int, programs: int) -> int:
    """In how many parts the keys of sequences are computed, where one part would take so many programs."""
    if length <= LONG:
        return 1
    share = BUSY // programs
    parts = 1 << share.bit_length()
    return max(1, min(16, parts))
