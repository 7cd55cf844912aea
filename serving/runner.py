"""Decoding as CUDA graphs: one replay computes a step for all rows, samples, and feeds the tokens back.

The host reads the tokens of a step while the next one is computed. A graph is captured when a batch of a new kind is
first seen: its number of rows (rounded up), and what its adapters and requests need. Shapes: T rows, P pages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serving.cache import PAGE, pages_for
from serving.forward import Forward
from serving.mix import Mix, Tenant
from serving.packed import Needs
from serving.passing import Pass
from serving.sampler import Choice, greedy, sample
from serving.sequence import Sequence
from serving.tail import Tail
from serving.work import FEW, Work, padded

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BUSY = 264  # programs that keep a GPU's multiprocessors busy
LONG = 512  # positions from which a sequence's keys are computed in parts


@dataclass
class Graph:
    """A captured step, the work that its grouped kernels read, and adapters whose embeddings it reads."""

    graph: Any
    before: Work | None
    behind: Work | None
    own: list[Tenant]


@dataclass
class Ticket:
    """A step that was launched: whose tokens it computes, and where they will be."""

    sequences: list[Sequence]
    token_T: Tensor  # on the host
    done: Any


class Runner:
    """Batches of decoding steps on a GPU."""

    def __init__(self, forward: Forward, tail: Tail, rows: int, positions: int) -> None:
        """At most so many rows, of so many positions."""
        self.decoder, self.rotations, self.tail = forward.decoder, forward.rotations, tail
        self.sizes = sorted({*(size for size in ROWS if size < rows), rows})
        device, long = forward.device, torch.int64
        self.id_T, self.position_T, self.kind_T, self.number_T = torch.zeros(4, rows, dtype=long, device=device)
        self.slot_T = torch.zeros(rows, dtype=torch.int32, device=device)
        self.pages_TP = torch.zeros(rows, pages_for(positions), dtype=torch.int32, device=device)
        self.choice = Choice(
            torch.zeros(rows, device=device), torch.zeros(rows, dtype=long, device=device),
            torch.ones(rows, device=device), torch.zeros(rows, dtype=long, device=device),
        )  # fmt: skip
        self.sequences: list[Sequence] = []
        self._rings = [torch.zeros(rows, dtype=long, pin_memory=True) for _ in range(2)]
        self._turn = 0
        self._graphs: dict[Any, Graph] = {}
        self._current: Graph | None = None

    def compose(self, sequences: list[Sequence]) -> None:
        """Make these the rows of the next steps; all tokens of earlier steps must have been read."""
        self.sequences = list(sequences)
        size = next(size for size in self.sizes if size >= len(sequences))
        self._write(size)
        mix = Mix.of([s.resident for s in sequences] + [None] * (size - len(sequences)), torch.device("cpu"))
        tail = self.tail.place([tenant.resident for tenant in mix.tenants])
        before = Work.of(mix.tenants, lambda needs: wide(needs, tail), FEW)
        behind = Work.of(mix.tenants, lambda needs: needs.behind, FEW)
        parts = 1
        if max(sequence.length for sequence in sequences) > LONG:
            parts = max(1, min(16, 2 ** (BUSY // (size * self.decoder.base.shape.kv_heads)).bit_length()))
        self._current = self._graph(size, mix, tail, before, behind, parts)
        fill(self._current.before, before)
        fill(self._current.behind, behind)

    def launch(self) -> Ticket:
        """Start a step; its tokens are ready when the ticket is done."""
        assert self._current is not None
        self._current.graph.replay()
        ring, self._turn = self._rings[self._turn], 1 - self._turn
        count = len(self.sequences)
        ring[:count].copy_(self.id_T[:count], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Ticket(self.sequences, ring[:count], done)

    def _write(self, size: int) -> None:
        """Copy what the rows are to the device; rows of nobody are the base's, at position 0 of nobody's page."""
        rows, spare = self.sequences, size - len(self.sequences)
        columns = {
            "id_T": [s.answer[-1] for s in rows],
            "position_T": [s.computed for s in rows],
            "kind_T": [0 if s.resident is None else s.resident.rotation for s in rows],
            "number_T": [len(s.answer) for s in rows],
            "slot_T": [s.slot for s in rows],
        }
        for name, values in columns.items():
            held = getattr(self, name)
            held[:size].copy_(torch.tensor(values + [0] * spare, dtype=held.dtype))
        width = self.pages_TP.shape[1]
        pages = [s.pages + [0] * (width - len(s.pages)) for s in rows] + [[0] * width] * spare
        self.pages_TP[:size].copy_(torch.tensor(pages, dtype=torch.int32))
        choice = Choice.of([s.request for s in rows], self.id_T.device)
        for name in ("temperature_T", "top_k_T", "top_p_T", "seed_T"):
            getattr(self.choice, name)[: len(rows)] = getattr(choice, name)

    def _graph(self, size: int, mix: Mix, tail: int, before: Work | None, behind: Work | None, parts: int) -> Graph:
        """The graph for a kind of batch, captured if it is new."""
        plain = greedy([sequence.request for sequence in self.sequences])
        ranks = max(16, 2 ** (mix.needs.narrow - 1).bit_length()) if tail else 0
        needs = replace(mix.needs, narrow=ranks, wide=0, behind=0)
        own = [t for t in mix.tenants if t.resident.embed_VD is not None or t.resident.head_VD is not None]
        kept = tuple(id(tenant.resident) for tenant in own)
        static = [None if work is None else room(work, size) for work in (before, behind)]
        sizes = tuple(None if w is None else (len(w.task), len(w.segment), w.rank, w.ranks) for w in static)
        key = (size, tail, sizes, parts, plain, needs, kept)
        if key not in self._graphs:
            self._forget()
            held = [None if work is None else work.to(self.id_T.device) for work in static]
            for work, now in zip(held, (before, behind), strict=True):
                fill(work, now)
            pass_mix = Mix(self.slot_T[:size], own, needs)
            step = lambda: self._step(size, pass_mix, tail, held[0], held[1], parts, plain)  # noqa: E731
            self._graphs[key] = Graph(capture(step, self._restore), held[0], held[1], own)
        return self._graphs[key]

    def _forget(self) -> None:
        """Drop graphs that read the embeddings of adapters that are gone; until then they keep them alive."""
        gone = [key for key, held in self._graphs.items() if any(tenant.resident.gone for tenant in held.own)]
        for key in gone:
            del self._graphs[key]

    def _restore(self) -> None:
        """Put the rows back as they were before a step was tried."""
        self._write(next(size for size in self.sizes if size >= len(self.sequences)))

    def _step(
        self, size: int, mix: Mix, tail: int, before: Work | None, behind: Work | None, parts: int, plain: bool
    ) -> None:
        """One step, as it is captured."""
        position_T, pages_TP = self.position_T[:size], self.pages_TP[:size]
        page_T = pages_TP.gather(1, (position_T // PAGE)[:, None])[:, 0].long()
        cos_TF, sin_TF = self.rotations.at(self.kind_T[:size], position_T)
        place_T = page_T * PAGE + position_T % PAGE
        step = Pass(mix, place_T, cos_TF, sin_TF, [], before, behind, tail, ranks=mix.needs.narrow)
        step.pages_TP, step.position_T, step.parts = pages_TP, position_T, parts
        hidden_TD = self.decoder.forward(self.decoder.embed(self.id_T[:size], mix), step)
        logits_TV = self.decoder.logits(hidden_TD, mix)
        if plain:
            token_T = logits_TV.argmax(-1)
        else:
            mine = (self.choice.temperature_T, self.choice.top_k_T, self.choice.top_p_T, self.choice.seed_T)
            token_T = sample(logits_TV, Choice(*(x[:size] for x in mine)), self.number_T[:size])
        self.id_T[:size].copy_(token_T)
        position_T.add_(1)
        self.number_T[:size].add_(1)


def wide(needs: Needs, tail: int) -> int:
    """The rank that grouped kernels must do: all of it where the tail has no room."""
    return needs.wide if tail else max(needs.wide, needs.narrow)


def room(work: Work, rows: int) -> Work:
    """Work with as many tasks as the next power of two, and rows for the whole batch."""
    task, segment = (padded(held, 2 ** (len(held) - 1).bit_length()) for held in (work.task, work.segment))
    order_T = work.order_T.new_zeros(rows)
    return replace(work, task=task, segment=segment, order_T=order_T)


def fill(held: Work | None, work: Work | None) -> None:
    """Copy work into a graph's."""
    if held is None or work is None:
        return
    held.task.copy_(padded(work.task, len(held.task)))
    held.segment.copy_(padded(work.segment, len(held.segment)))
    held.order_T[: len(work.order_T)].copy_(work.order_T)


def capture(step: Callable[[], None], restore: Callable[[], None]) -> Any:
    """A step as a graph; it is tried first, as kernels are compiled and libraries set up then, and undone."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    restore()
    return graph
