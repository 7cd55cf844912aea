"""Decoding as CUDA graphs: one replay computes a step for all rows, samples, and feeds the tokens back.

The host reads the tokens of a step while the next one is computed. A graph is captured when a batch of a new kind is
first seen: its number of rows (rounded up), and what its adapters and requests need. Shapes: T rows, P pages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from serving.batch import Batch, GraphKind, parts_of
from serving.cache import PAGE, place_in
from serving.forward import Forward, largest_rank
from serving.grouping import Grouping, products_of_row, rows_of_tile
from serving.mix import AdapterBatch, Owner
from serving.packed import Needs
from serving.passing import Pass
from serving.rows import Rows
from serving.sampler import Manner, NextTokens, choose
from serving.sequence import Sequence
from serving.tail import Tail

Action = Callable[[], None]
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


@dataclass
class Graph:
    """A captured step, and the batch on the device that it reads, whose adapters are those with embeddings."""

    graph: Any
    batch: Batch

    @property
    def gone(self) -> bool:
        """Whether an adapter whose embeddings it reads was evicted."""
        members = self.batch.adapters.members
        gone = [member.resident.gone for member in members]
        return any(gone)


@dataclass
class Ticket:
    """A step that was launched: whose tokens it computes, and where they will be."""

    sequences: list[Sequence]
    chosen: NextTokens  # on the host
    done: Any

    def tokens(self) -> list[tuple[int, float]]:
        """The tokens and their log-probabilities, when they are there."""
        self.done.synchronize()
        return self.chosen.pairs()


class Runner:
    """Batches of decoding steps on a GPU."""

    def __init__(self, forward: Forward, tail: Tail, rows: int, positions: int) -> None:
        """At most so many rows, of so many positions."""
        self.decoder = forward.decoder
        self.rotations = forward.rotations
        self.device = forward.device
        self.tail = tail
        self.counts = [count for count in GRAPH_ROWS if count < rows]
        self.counts.append(rows)
        self.rows = Rows(rows, positions, self.device)
        self.sequences: list[Sequence] = []
        # Tokens on the host, in turn: those of one step are read while those of the next one are written.
        self._tokens = pinned(rows, torch.int64)
        self._scores = pinned(rows, torch.float32)
        self._graphs: dict[GraphKind, Graph] = {}
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
        token_T = _copied(self.rows.id_T[:count], self._tokens)
        score_T = _copied(self.rows.score_T[:count], self._scores)
        done = torch.cuda.Event()
        done.record()
        chosen = NextTokens(token_T, score_T)
        return Ticket(self.sequences, chosen, done)

    def _count(self) -> int:
        """The rows of a graph in which all sequences have one."""
        needed = len(self.sequences)
        for count in self.counts:
            if count >= needed:
                return count
        most = self.counts[-1]
        raise AssertionError(f"found {needed} sequences for {most} rows")

    def _write_rows(self) -> None:
        """Copy what the rows are to the device."""
        count = self._count()
        self.rows.write(self.sequences, count)

    def _batch(self) -> Batch:
        """The sequences as a batch for which there may be a graph; adapters' factors are where a pass finds them."""
        count = self._count()
        adapters = self._adapters(count)
        residents = [member.resident for member in adapters.members]
        requests = [sequence.request for sequence in self.sequences]
        lengths = [sequence.length for sequence in self.sequences]
        tail = self.tail.place(residents)
        rank_of = rank_in_tail
        if tail == 0:
            rank_of = largest_rank
        rows = rows_of_tile(adapters)
        grouping = Grouping.of(adapters, rows, rank_of)
        shape = self.decoder.shape
        programs = count * shape.kv_heads
        return Batch(
            rows=count,
            adapters=self._static(adapters, tail, count),
            grouping=grouping.enlarged(),
            tail=tail,
            parts=parts_of(max(lengths), programs),
            manner=Manner.of(requests),
        )

    def _adapters(self, count: int) -> AdapterBatch:
        """The adapters of so many rows, of which those behind the sequences are nobody's."""
        owners: list[Owner] = []
        for sequence in self.sequences:
            owners.append(sequence.resident)
        while len(owners) < count:
            owners.append(None)
        return AdapterBatch.of(owners)

    def _static(self, adapters: AdapterBatch, tail: int, count: int) -> AdapterBatch:
        """What a graph knows of a batch's adapters: where their indices are written, embeddings, rounded needs."""
        products = 0
        if tail:
            products = products_of_row(adapters.needs)
        needs = replace(adapters.needs, narrow=products, wide=0, behind=0)
        embedded = [member for member in adapters.members if member.resident.has_vocabulary]
        adapter_T = self.rows.adapter_T[:count]
        return AdapterBatch(adapter_T, embedded, needs)

    def _graph(self, batch: Batch) -> Graph:
        """The graph for a kind of batch, captured if it is new."""
        kind = batch.kind
        known = self._graphs.get(kind)
        if known is not None:
            return known
        self._forget()
        grouping = batch.grouping.to(self.device)
        static = replace(batch, grouping=grouping)
        step = partial(self._step, static)
        captured = capture(step, self._write_rows)
        graph = Graph(captured, static)
        self._graphs[kind] = graph
        return graph

    def _forget(self) -> None:
        """Drop graphs that read the embeddings of adapters that are gone; until then they keep them alive."""
        kinds = list(self._graphs)
        for kind in kinds:
            graph = self._graphs[kind]
            if graph.gone:
                del self._graphs[kind]

    def _step(self, batch: Batch) -> None:
        """One step, as it is captured."""
        count = batch.rows
        id_T = self.rows.id_T[:count]
        position_T = self.rows.position_T[:count]
        number_T = self.rows.number_T[:count]
        step = self._pass(batch)
        x_TD = self.decoder.embed(id_T, batch.adapters)
        hidden_TD = self.decoder.forward(x_TD, step)
        logits_TV = self.decoder.logits(hidden_TD, batch.adapters)
        chosen = self._chosen_tokens(batch, logits_TV)
        id_T.copy_(chosen.token_T)
        self.rows.score_T[:count].copy_(chosen.score_T)
        position_T.add_(1)
        number_T.add_(1)

    def _chosen_tokens(self, batch: Batch, logits_TV: Tensor) -> NextTokens:
        """The next token of each row."""
        count = batch.rows
        choice = self.rows.choice.first(count)
        number_T = self.rows.number_T[:count]
        return choose(logits_TV, batch.manner, choice, number_T)

    def _pass(self, batch: Batch) -> Pass:
        """What a step of these rows needs: each is a sequence, at its position."""
        count = batch.rows
        position_T = self.rows.position_T[:count]
        pages_TP = self.rows.pages_TP[:count]
        kind_T = self.rows.kind_T[:count]
        column_T = position_T // PAGE
        column_T1 = column_T[:, None]
        page_T1 = pages_TP.gather(1, column_T1)
        page_T = page_T1[:, 0]
        page_T = page_T.long()
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


def pinned(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Memory on the host for twice as many numbers, to which the device may copy."""
    size = (2, count)
    number_2T = torch.zeros(size, dtype=dtype, pin_memory=True)
    return list(number_2T)


def _copied(number_T: Tensor, turns: list[Tensor]) -> Tensor:
    """Numbers of the device, as they will be on the host: in the memory whose turn it is."""
    turns.reverse()
    host = turns[0]
    host_T = host[: len(number_T)]
    return host_T.copy_(number_T, non_blocking=True)


def rank_in_tail(needs: Needs) -> int:
    """The rank that grouped kernels compute of an adapter when decoding, where the narrow ones are in the tail."""
    return needs.wide


def capture(step: Action, restore: Action) -> Any:
    """A step as a graph; it is tried first, as kernels are compiled and libraries set up then, and undone."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    restore()
    return graph
