"""The engine: many requests, many adapters, one base.

    engine = Engine("base")
    engine.load("alice", "runs/alice/output")
    answers = engine.generate([Request(prompt=(1, 2, 3), adapter="alice"), Request(prompt=(1, 2, 3))])

Shapes: T rows of a pass, V vocabulary, D width.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serving.base import FrozenBase
from serving.cache import Cache, pages_for
from serving.forward import Chosen, Forward
from serving.limits import Limits, check_start
from serving.loading import loaded, tail_ranks
from serving.packed import Packed
from serving.passing import Span
from serving.pool import Pool
from serving.scheduler import Scheduler, SequenceSpan
from serving.score import score
from serving.sequence import Request, Sequence

if TYPE_CHECKING:
    from serving.runner import Runner, Ticket


class Engine:
    """Answers requests with continuous batching, whatever adapters they name."""

    def __init__(
        self,
        model: Any,
        *,
        residents: int = 64,
        rows: int = 256,
        positions: int = 4096,
        tokens: int = 65536,
        chunk: int = 8192,
        adapter_bytes: int = 4 * 2**30,
    ) -> None:
        """Serve a base: a transformers model, or the folder of one. Raises BaseRefused where its family is not here.

        `residents` adapters and `adapter_bytes` of their weights are on the device at once, `rows` sequences in a
        batch. A sequence has at most `positions` and all together `tokens`; a pass computes at most `chunk` of them.
        """
        base = self._base(model, residents)
        self.base = base
        shape = base.shape
        self.positions = min(positions, shape.positions)
        pages = pages_for(tokens) + 1  # page 0 is nobody's
        self.limits = Limits(self.positions, pages, shape.vocabulary)
        self.pool = Pool(base, residents, adapter_bytes)
        self.cache = Cache(shape, pages, base.dtype, base.device)
        self.forward = Forward(base, self.pool, self.cache, self.positions)
        prepare_resident = self.forward.prepare_resident
        self.scheduler = Scheduler(self.pool, self.cache, rows, chunk, prepare_resident)
        self.runner: Runner | None = None
        if base.on_gpu:
            self.runner = self._runner(rows)
        self._ticket: Ticket | None = None

    def _base(self, model: Any, residents: int) -> FrozenBase:
        """A model as a base, with room behind its weights for so many adapters; a base stays what it is."""
        if isinstance(model, FrozenBase):
            return model
        if isinstance(model, str | Path):
            model = loaded(model)
        return FrozenBase(model, tail_ranks(model, residents))

    def load(self, name: str, folder: Path | str, pinned: bool = False) -> str:
        """Give an adapter a name; returns its digest. Raises AdapterRefused where it cannot be computed exactly."""
        packed = self.pool.prepare(folder)
        self.give(name, packed, pinned)
        return packed.digest

    def give(self, name: str, packed: Packed, pinned: bool = False) -> None:
        """Let a name mean an adapter that `pool.prepare` has read, as another thread may while this one steps."""
        self.forward.rotations.kind(packed)
        self.pool.give(name, packed, pinned)

    def left_out(self, name: str) -> float:
        """What is left out of a loaded model's difference to the base, as a share of it; 0 for all adapters."""
        packed = self.pool.packed_of(name)
        return packed.adapter.left_out

    def unload(self, name: str) -> None:
        """Forget an adapter's name; raises UnknownAdapter."""
        self.pool.unload(name)

    def add(self, request: Request) -> Sequence:
        """Let a request wait for its turn; raises UnknownAdapter or RequestRefused."""
        sequence = self._sequence(request)
        self.scheduler.add(sequence)
        return sequence

    def add_scored(self, request: Request, start: int) -> Sequence:
        """Let a request wait whose prompt is scored from the token number `start` > 0 on, and not answered.

        Raises UnknownAdapter or RequestRefused.
        """
        sequence = self._scored(request, start)
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Let a sequence go unanswered, and free what it holds; one that is finished stays so."""
        self.scheduler.cancel(sequence)

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """The answers to requests, in their order: token ids. Where one is refused, none is started."""
        answered = self.answered(requests)
        return [sequence.answer for sequence in answered]

    def answered(self, requests: Iterable[Request]) -> list[Sequence]:
        """Requests with their answers, and the log-probabilities of those that ask for them, in their order."""
        sequences = [self._sequence(request) for request in requests]
        self._complete(sequences)
        return sequences

    def log_likelihoods(self, requests: Iterable[Request], starts: Iterable[int]) -> list[list[float]]:
        """The log-probability of each token of the requests' prompts, from the token number `start` > 0 on."""
        sequences: list[Sequence] = []
        for request, start in zip(requests, starts, strict=True):
            sequence = self._scored(request, start)
            sequences.append(sequence)
        self._complete(sequences)
        return [sequence.scores for sequence in sequences]

    def outputs(self, requests: Iterable[Request]) -> list[Tensor]:
        """The normed output [D] of the last layer behind each request's prompt, in front of any head."""
        sequences: list[Sequence] = []
        for request in requests:
            sequence = self._scored(request, len(request.prompt) - 1)
            sequence.keeps_output = True
            sequences.append(sequence)
        self._complete(sequences)
        outputs: list[Tensor] = []
        for sequence in sequences:
            assert sequence.output_D is not None
            outputs.append(sequence.output_D)
        return outputs

    @torch.inference_mode()
    def step(self, in_waves: bool = False) -> None:
        """Admit the sequences that fit, compute a chunk of prompts, and a token of every running answer.

        In waves, which is faster where nobody waits for a single answer, sequences are admitted when many fit, and
        answers go on when all prompts that were admitted are computed.
        """
        if not in_waves or self.scheduler.is_wave_due:
            self.scheduler.admit()
        self._fill()
        prompts_are_left = len(self.scheduler.filling) > 0
        if in_waves and prompts_are_left:
            return
        if self.scheduler.running:
            self._advance()

    @torch.inference_mode()
    def logits(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """The logits [T, V] behind each token of one tenant's prompts, in order; as many as fit are one pass.

        The engine must have nothing else to do. Logits take much memory: each one's are made when they are asked for.
        """
        for request in requests:
            self.add(request)
        while not self.scheduler.idle:
            self.scheduler.admit()
            chosen = self.scheduler.whole_prompts()
            hidden_TD = self.forward.run_prompts(chosen)
            owners = [sequence.resident for sequence, _ in chosen]
            for sequence, _ in chosen:
                self.cancel(sequence)
            for owner, (_, span) in zip(owners, chosen, strict=True):
                yield self.forward.logits(owner, hidden_TD[span.rows])

    def _complete(self, sequences: list[Sequence]) -> None:
        """Work until all is answered."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        while not self.scheduler.idle:
            self.step(in_waves=True)

    def _sequence(self, request: Request) -> Sequence:
        """A request on its way; raises UnknownAdapter or RequestRefused."""
        packed: Packed | None = None
        if request.adapter is not None:
            packed = self.pool.packed_of(request.adapter)
        sequence = Sequence(request, packed)
        self.limits.check(sequence)
        return sequence

    def _scored(self, request: Request, start: int) -> Sequence:
        """A request on its way whose prompt is scored; raises UnknownAdapter or RequestRefused."""
        check_start(start, request)
        sequence = self._sequence(request)
        sequence.scored_from = start
        return sequence

    def _fill(self) -> None:
        """Compute the next chunk of prompts, and the first token of each answer whose prompt is complete."""
        chosen = self.scheduler.next_chunk()
        if not chosen:
            return
        hidden_TD = self.forward.run_prompts(chosen)
        score(self.forward, chosen, hidden_TD)
        for sequence, span in chosen:
            self.scheduler.prefixes.add_computed(sequence, span.count)
        chosen += self.scheduler.twins(chosen)
        self._begin_answers(chosen, hidden_TD)
        for sequence, _ in chosen:
            if sequence.uncomputed == 0:
                self.scheduler.filled(sequence)
        self.scheduler.finish_complete()

    def _begin_answers(self, chosen: Chosen, hidden_TD: Tensor) -> None:
        """Take the first token of each answer from the last row of its prompt."""
        answering: list[Sequence] = []
        rows: list[int] = []
        for sequence, span in chosen:
            if sequence.uncomputed > 0:
                continue
            if sequence.keeps_output:
                sequence.output_D = hidden_TD[span.last_row].clone()
            if sequence.scored_from is not None:
                continue
            answering.append(sequence)
            rows.append(span.last_row)
        if answering:
            last_TD = hidden_TD[rows]
            self._take(answering, last_TD)

    def _advance(self) -> None:
        """One more token of every running answer; with graphs, the tokens are read one step later."""
        if self.runner is None:
            self._advance_plainly()
            return
        if self.runner.sequences != self.scheduler.running:
            self._drain()
            if not self.scheduler.running:
                return
            self.runner.compose(self.scheduler.running)
        ticket = self.runner.launch()
        for sequence in ticket.sequences:
            sequence.computed += 1
        self._drain()
        self._ticket = ticket
        for sequence in ticket.sequences:
            if sequence.is_at_last_token:
                self._drain()
                return

    def _drain(self) -> None:
        """Read the tokens that are under way, and finish what they complete."""
        ticket = self._ticket
        self._ticket = None
        if ticket is not None:
            tokens = ticket.tokens()
            self.scheduler.take(ticket.sequences, tokens)
        self.scheduler.finish_complete()

    def _advance_plainly(self) -> None:
        """One more token of every running answer, in a pass that is not a graph."""
        running = list(self.scheduler.running)
        chosen: list[SequenceSpan] = []
        last_tokens: list[int] = []
        for row, sequence in enumerate(running):
            last_token = sequence.answer[-1]
            last_tokens.append(last_token)
            span = Span(row, 1, sequence.computed, sequence.pages)
            chosen.append((sequence, span))
        id_T = torch.tensor(last_tokens)
        hidden_TD = self.forward.run(chosen, id_T)
        for sequence in running:
            sequence.computed += 1
        self._take(running, hidden_TD)
        self.scheduler.finish_complete()

    def _take(self, sequences: Several[Sequence], hidden_TD: Tensor) -> None:
        """Add to each sequence's answer the token that its row says."""
        tokens = self.forward.next_tokens(sequences, hidden_TD)
        self.scheduler.take(sequences, tokens)

    def _runner(self, rows: int) -> "Runner":
        """What decodes on a GPU, with so many rows."""
        from serving.runner import Runner
        from serving.tail import Tail

        tail = Tail(self.base, self.pool, self.base.tail)
        return Runner(self.forward, tail, rows, self.positions)
