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
from serving.cache import PAGE, place_in
from serving.forward import Forward
from serving.grouping import FEW, Grouping, products_of_row
from serving.mix import AdapterBatch, BatchAdapter, Owner
from serving.packed import Needs
from serving.passing import Pass
from serving.rows import Rows
from serving.sampler import are_greedy, sample
from serving.sequence import Sequence
from serving.tail import Tail

GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Graph:
    """A captured step, and the batch on the device that it reads, whose adapters are those with embeddings."""

    graph: Any
    batch: Batch

    @property
    def gone(self) -> bool:
        """Whether an adapter whose embeddings it reads was evicted."""
        members = self.batch.adapters.members
        return any(member.resident.gone for member in members)


@dataclass
class Ticket:
    """A step that was launched: whose tokens it computes, and where they will be."""

    sequences: list[Sequence]
    token_T: Tensor  # on the host
    done: Any

    def tokens(self) -> list[int]:
        """The tokens, when they are there."""
        self.done.synchronize()
        tokens: list[int] = self.token_T.tolist()
        return tokens


class Runner:
    """Batches of decoding steps on a GPU."""

    def __init__(self, forward: Forward, tail: Tail, rows: int, positions: int) -> None:
        """At most so many rows, of so many positions."""
        self.decoder = forward.decoder
        self.rotations = forward.rotations
        self.tail = tail
        smaller = [count for count in GRAPH_ROWS if count < rows]
        self.counts = [*smaller, rows]
        self.device = forward.device
        self.rows = Rows(rows, positions, self.device)
        self.sequences: list[Sequence] = []
        # Tokens on the host, in turn: those of one step are read while those of the next one are written.
        self._tokens = [pinned_tokens(rows), pinned_tokens(rows)]
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._current: Graph | None = None

    def compose(self, sequences: list[Sequence]) -> None:
        """Make these the rows of the next steps; all tokens of earlier steps must have been read."""
        self.sequences = list(sequences)
        self._write_rows()
        batch = self._batch()
        self._current = self._graph(batch)
        self._current.batch.grouping.fill(batch.grouping)

    def launch(self) -> Ticket:
        """Start a step; its tokens are ready when the ticket is done."""
        assert self._current is not None
        self._current.graph.replay()
        count = len(self.sequences)
        self._tokens.reverse()
        token_T = self._tokens[0][:count]
        token_T.copy_(self.rows.id_T[:count], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Ticket(self.sequences, token_T, done)

    def _count(self) -> int:
        """The rows of a graph in which all sequences have one."""
        needed = len(self.sequences)
        return next(count for count in self.counts if count >= needed)

    def _write_rows(self) -> None:
        """Copy what the rows are to the device."""
        self.rows.write(self.sequences, self._count())

    def _batch(self) -> Batch:
        """The sequences as a batch for which there may be a graph; its adapters' factors are where a pass finds them."""
        count = self._count()
        missing = count - len(self.sequences)
        owners: list[Owner] = [sequence.resident for sequence in self.sequences]
        owners += [None] * missing
        adapters = AdapterBatch.of(owners)
        residents = [member.resident for member in adapters.members]
        tail = self.tail.place(residents)
        grouping = Grouping.of(adapters, FEW, lambda needs: wide_rank(needs, tail))
        longest = max(sequence.length for sequence in self.sequences)
        programs = count * self.decoder.base.shape.kv_heads
        requests = [sequence.request for sequence in self.sequences]
        return Batch(
            rows=count,
            adapters=self._static(adapters, tail, count),
            grouping=grouping.enlarged(),
            tail=tail,
            parts=parts_of(longest, programs),
            is_greedy=are_greedy(requests),
        )

    def _static(self, adapters: AdapterBatch, tail: int, count: int) -> AdapterBatch:
        """What a graph knows of a batch's adapters: where their slots are written, embeddings, rounded needs."""
        products = 0
        if tail:
            products = products_of_row(adapters.needs)
        needs = replace(adapters.needs, narrow=products, wide=0, behind=0)
        embedded = [member for member in adapters.members if has_embeddings(member)]
        return AdapterBatch(self.rows.slot_T[:count], embedded, needs)

    def _graph(self, batch: Batch) -> Graph:
        """The graph for a kind of batch, captured if it is new."""
        kind = batch.kind
        if kind not in self._graphs:
            self._forget()
            grouping = batch.grouping.to(self.device)
            static = replace(batch, grouping=grouping)
            graph = capture(lambda: self._step(static), self._write_rows)
            self._graphs[kind] = Graph(graph, static)
        return self._graphs[kind]

    def _forget(self) -> None:
        """Drop graphs that read the embeddings of adapters that are gone; until then they keep them alive."""
        for kind, graph in list(self._graphs.items()):
            if graph.gone:
                del self._graphs[kind]

    def _step(self, batch: Batch) -> None:
        """One step, as it is captured."""
        id_T = self.rows.id_T[: batch.rows]
        step = self._pass(batch)
        x_TD = self.decoder.embed(id_T, batch.adapters)
        hidden_TD = self.decoder.forward(x_TD, step)
        logits_TV = self.decoder.logits(hidden_TD, batch.adapters)
        token_T = self._chosen_tokens(batch, logits_TV)
        id_T.copy_(token_T)
        self.rows.position_T[: batch.rows].add_(1)
        self.rows.number_T[: batch.rows].add_(1)

    def _chosen_tokens(self, batch: Batch, logits_TV: Tensor) -> Tensor:
        """The next token of each row."""
        if batch.is_greedy:
            return logits_TV.argmax(-1)
        choice = self.rows.choice.first(batch.rows)
        number_T = self.rows.number_T[: batch.rows]
        return sample(logits_TV, choice, number_T)

    def _pass(self, batch: Batch) -> Pass:
        """What a step of these rows needs: each is a sequence, at its position."""
        position_T = self.rows.position_T[: batch.rows]
        pages_TP = self.rows.pages_TP[: batch.rows]
        kind_T = self.rows.kind_T[: batch.rows]
        column_T = position_T // PAGE
        page_T1 = pages_TP.gather(1, column_T[:, None])
        page_T = page_T1[:, 0].long()
        cos_TF, sin_TF = self.rotations.at(kind_T, position_T)
        return Pass(
            adapters=batch.adapters,
            grouping=batch.grouping,
            place_T=place_in(page_T, position_T),
            cos_TF=cos_TF,
            sin_TF=sin_TF,
            tail=batch.tail,
            products=batch.adapters.needs.narrow,
            pages_TP=pages_TP,
            position_T=position_T,
            parts=batch.parts,
        )


def pinned_tokens(count: int) -> Tensor:
    """Memory on the host for so many tokens, to which the device may copy."""
    return torch.zeros(count, dtype=torch.int64, pin_memory=True)


def wide_rank(needs: Needs, tail: int) -> int:
    """The rank that grouped kernels must do: all of it where the adapters' factors do not fit into the tail."""
    if tail:
        return needs.wide
    return max(needs.wide, needs.narrow)


def has_embeddings(member: BatchAdapter) -> bool:
    """Whether an adapter has an embedding or a head of its own."""
    resident = member.resident
    return resident.embed_VD is not None or resident.head_VD is not None


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
