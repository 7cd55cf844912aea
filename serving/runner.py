"""Decoding as CUDA graphs: one replay computes a step for all rows, samples, and feeds the tokens back.

The host reads the tokens of a step while the next one is computed. A graph is captured when a batch of a new kind is
first seen: its number of rows (rounded up), and what its adapters and requests need. Shapes: T rows, P pages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serving.batch import Batch, parts_of
from serving.cache import PAGE, padded_pages, pages_for, place_in
from serving.forward import Forward, rotation_of
from serving.mix import Mix, Tenant
from serving.packed import Needs
from serving.passing import Pass
from serving.sampler import Choice, greedy, sample
from serving.sequence import Sequence
from serving.tail import Tail
from serving.work import FEW, Work, enlarged, fill, power_of_2

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Graph:
    """A captured step, the work that its grouped kernels read, and adapters whose embeddings it reads."""

    graph: Any
    before: Work | None
    behind: Work | None
    embedded: list[Tenant]

    @property
    def gone(self) -> bool:
        """Whether an adapter whose embeddings it reads was evicted."""
        return any(tenant.resident.gone for tenant in self.embedded)


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
        self.decoder = forward.decoder
        self.rotations = forward.rotations
        self.tail = tail
        smaller = [size for size in ROWS if size < rows]
        self.sizes = [*smaller, rows]
        device = forward.device
        numbers_4T = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.id_T, self.position_T, self.kind_T, self.number_T = numbers_4T
        self.slot_T = torch.zeros(rows, dtype=torch.int32, device=device)
        self.pages_TP = torch.zeros(rows, pages_for(positions), dtype=torch.int32, device=device)
        self.choice = Choice.blank(rows, device)
        self.sequences: list[Sequence] = []
        # Tokens on the host, in turn: those of one step are read while those of the next one are written.
        self._tokens = [torch.zeros(rows, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._turn = 0
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._current: Graph | None = None

    def compose(self, sequences: list[Sequence]) -> None:
        """Make these the rows of the next steps; all tokens of earlier steps must have been read."""
        self.sequences = list(sequences)
        size = self._size()
        self._write(size)
        batch = self._batch(size)
        self._current = self._graph(batch)
        fill(self._current.before, batch.before)
        fill(self._current.behind, batch.behind)

    def launch(self) -> Ticket:
        """Start a step; its tokens are ready when the ticket is done."""
        assert self._current is not None
        self._current.graph.replay()
        count = len(self.sequences)
        token_T = self._tokens[self._turn][:count]
        self._turn = 1 - self._turn
        token_T.copy_(self.id_T[:count], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Ticket(self.sequences, token_T, done)

    def _size(self) -> int:
        """The rows of a graph in which all sequences have one."""
        count = len(self.sequences)
        return next(size for size in self.sizes if size >= count)

    def _write(self, size: int) -> None:
        """Copy what the rows are to the device; rows of nobody are the base's, at position 0 of nobody's page."""
        rows = self.sequences
        write_rows(self.id_T, [sequence.answer[-1] for sequence in rows], size)
        write_rows(self.position_T, [sequence.computed for sequence in rows], size)
        write_rows(self.kind_T, [rotation_of(sequence.resident) for sequence in rows], size)
        write_rows(self.number_T, [len(sequence.answer) for sequence in rows], size)
        write_rows(self.slot_T, [sequence.slot for sequence in rows], size)
        width = self.pages_TP.shape[1]
        pages = [padded_pages(sequence.pages, width) for sequence in rows]
        missing = size - len(rows)
        pages += [padded_pages([], width)] * missing
        self.pages_TP[:size].copy_(torch.tensor(pages, dtype=torch.int32))
        requests = [sequence.request for sequence in rows]
        choice = Choice.of(requests, self.id_T.device)
        self.choice.write(choice)

    def _batch(self, size: int) -> Batch:
        """The sequences as a batch of so many rows, its adapters' factors where a pass finds them."""
        missing = size - len(self.sequences)
        residents = [sequence.resident for sequence in self.sequences]
        residents += [None] * missing
        mix = Mix.of(residents, torch.device("cpu"))
        tail = self.tail.place([tenant.resident for tenant in mix.tenants])
        before = Work.of(mix.tenants, lambda needs: wide_rank(needs, tail), FEW)
        behind = Work.of(mix.tenants, lambda needs: needs.behind, FEW)
        longest = max(sequence.length for sequence in self.sequences)
        parts = parts_of(longest, size * self.decoder.base.shape.kv_heads)
        is_greedy = greedy([sequence.request for sequence in self.sequences])
        return Batch(size, mix, tail, before, behind, parts, is_greedy)

    def _graph(self, batch: Batch) -> Graph:
        """The graph for a kind of batch, captured if it is new."""
        size = batch.size
        ranks = 0
        if batch.tail:
            ranks = max(16, power_of_2(batch.mix.needs.narrow))
        needs = replace(batch.mix.needs, narrow=ranks, wide=0, behind=0)
        embedded = [tenant for tenant in batch.mix.tenants if has_embeddings(tenant)]
        mix = Mix(self.slot_T[:size], embedded, needs)
        before, behind = enlarged(batch.before, size), enlarged(batch.behind, size)
        static = replace(batch, mix=mix, before=before, behind=behind)
        kind = static.kind
        if kind not in self._graphs:
            self._forget()
            static.before = self._on_device(before, batch.before)
            static.behind = self._on_device(behind, batch.behind)
            graph = capture(lambda: self._step(static), self._restore)
            self._graphs[kind] = Graph(graph, static.before, static.behind, embedded)
        return self._graphs[kind]

    def _on_device(self, enlarged_work: Work | None, work: Work | None) -> Work | None:
        """A graph's work, filled with that of the first batch."""
        if enlarged_work is None:
            return None
        static = enlarged_work.to(self.id_T.device)
        fill(static, work)
        return static

    def _forget(self) -> None:
        """Drop graphs that read the embeddings of adapters that are gone; until then they keep them alive."""
        for kind, graph in list(self._graphs.items()):
            if graph.gone:
                del self._graphs[kind]

    def _restore(self) -> None:
        """Put the rows back as they were before a step was tried."""
        self._write(self._size())

    def _step(self, batch: Batch) -> None:
        """One step, as it is captured."""
        mix, size = batch.mix, batch.size
        id_T = self.id_T[:size]
        step = self._pass(batch)
        x_TD = self.decoder.embed(id_T, mix)
        hidden_TD = self.decoder.forward(x_TD, step)
        logits_TV = self.decoder.logits(hidden_TD, mix)
        id_T.copy_(self._chosen(batch, logits_TV))
        self.position_T[:size].add_(1)
        self.number_T[:size].add_(1)

    def _chosen(self, batch: Batch, logits_TV: Tensor) -> Tensor:
        """The next token of each row."""
        if batch.greedy:
            return logits_TV.argmax(-1)
        choice = self.choice.first(batch.size)
        return sample(logits_TV, choice, self.number_T[: batch.size])

    def _pass(self, batch: Batch) -> Pass:
        """What a step of these rows needs: each is a sequence, at its position."""
        position_T = self.position_T[: batch.size]
        pages_TP = self.pages_TP[: batch.size]
        column_T1 = (position_T // PAGE)[:, None]
        page_T1 = pages_TP.gather(1, column_T1)
        page_T = page_T1[:, 0].long()
        cos_TF, sin_TF = self.rotations.at(self.kind_T[: batch.size], position_T)
        step = Pass(batch.mix, place_in(page_T, position_T), cos_TF, sin_TF)
        step.before = batch.before
        step.behind = batch.behind
        step.tail = batch.tail
        step.ranks = batch.mix.needs.narrow
        step.pages_TP = pages_TP
        step.position_T = position_T
        step.parts = batch.parts
        return step


def write_rows(target_T: Tensor, values: list[int], size: int) -> None:
    """Copy a number for each row to the device, and 0 for the rows of nobody up to `size`."""
    missing = size - len(values)
    value_T = torch.tensor(values + [0] * missing, dtype=target_T.dtype)
    target_T[:size].copy_(value_T)


def wide_rank(needs: Needs, tail: int) -> int:
    """The rank that grouped kernels must do: all of it where the adapters' factors do not fit into the tail."""
    if tail:
        return needs.wide
    return max(needs.wide, needs.narrow)


def has_embeddings(tenant: Tenant) -> bool:
    """Whether an adapter has an embedding or a head of its own."""
    return tenant.resident.embed_VD is not None or tenant.resident.head_VD is not None


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
