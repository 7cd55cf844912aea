"""The engine: many requests, many adapters, one base.

    engine = Engine("base")
    engine.load("alice", "runs/alice/output")
    answers = engine.generate([Request(prompt=(1, 2, 3), adapter="alice"), Request(prompt=(1, 2, 3))])

Shapes: T rows of a pass, V vocabulary.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Several
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serving.base import Base
from serving.cache import PAGE, Cache, pages_for
from serving.error import RequestRefused
from serving.forward import Chosen, Forward
from serving.packed import Packed
from serving.passing import Span
from serving.pool import Pool
from serving.scheduler import Scheduler
from serving.score import score
from serving.sequence import Request, Sequence

if TYPE_CHECKING:
    from serving.runner import Runner, Ticket

TAIL = 16  # ranks for each slot behind the base's weights


class Engine:
    """Answers requests with continuous batching, whatever adapters they name."""

    def __init__(
        self,
        model: Any,
        *,
        slots: int = 64,
        rows: int = 256,
        positions: int = 4096,
        tokens: int = 65536,
        chunk: int = 8192,
        adapter_bytes: int = 4 * 2**30,
    ) -> None:
        """Serve a transformers model, or the folder of one. Raises BaseRefused where its family is not here.

        `slots` adapters and `adapter_bytes` of their weights are on the device at once, `rows` sequences in a batch;
        a sequence has at most `positions` and all together `tokens`; a pass computes at most `chunk` of prompts.
        """
        if isinstance(model, str | Path):
            model = loaded(model)
        tail = tail_ranks(model, slots)
        base = Base(model, tail)
        self.base = base
        self.positions = min(positions, base.shape.positions)
        self.pool = Pool(base, slots, adapter_bytes)
        pages = pages_for(tokens) + 1  # page 0 is nobody's
        self.cache = Cache(base.shape, pages, base.dtype, base.device)
        self.forward = Forward(base, self.pool, self.cache, self.positions)
        self.scheduler = Scheduler(self.pool, self.cache, rows, chunk, self.forward.settle)
        self.runner: Runner | None = None
        if base.on_gpu:
            self.runner = self._runner(rows, tail)
        self._ticket: Ticket | None = None

    def load(self, name: str, folder: Path | str, pinned: bool = False) -> str:
        """Give an adapter a name; returns its digest. Raises AdapterRefused where it cannot be computed exactly."""
        packed = self.pool.prepare(folder)
        self.forward.rotations.kind(packed)
        self.pool.give(name, packed, pinned)
        return packed.digest

    def unload(self, name: str) -> None:
        """Forget an adapter's name; raises UnknownAdapter."""
        self.pool.unload(name)

    def add(self, request: Request) -> Sequence:
        """Let a request wait for its turn; raises UnknownAdapter or RequestRefused."""
        sequence = self._sequence(request)
        self.scheduler.add(sequence)
        return sequence

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """The answers to requests, in their order: token ids. Where one is refused, none is started."""
        sequences = [self._sequence(request) for request in requests]
        self._complete(sequences)
        return [sequence.answer for sequence in sequences]

    def log_likelihoods(self, requests: Iterable[Request], starts: Iterable[int]) -> list[list[float]]:
        """The log-probability of each token of the requests' prompts, from the token number `start` > 0 on."""
        sequences = []
        for request, start in zip(requests, starts, strict=True):
            last = len(request.prompt) - 1
            if not 0 < start <= last:
                raise RequestRefused(f"start: found {start}; allowed: 1 to {last}")
            sequence = self._sequence(request)
            sequence.scored_from = start
            sequences.append(sequence)
        self._complete(sequences)
        return [sequence.scores for sequence in sequences]

    @torch.inference_mode()
    def step(self) -> None:
        """Admit the sequences that fit, compute a chunk of prompts, and a token of every running answer."""
        self.scheduler.admit()
        self._fill()
        if self.scheduler.running:
            self._advance()
        elif self.scheduler.waiting and not self.scheduler.filling:
            self._refuse(self.scheduler.waiting[0])

    @torch.inference_mode()
    def logits(self, request: Request) -> Tensor:
        """The logits [T, V] behind each token of a prompt, on an engine that has nothing else to do."""
        sequence = self.add(request)
        self.scheduler.admit()
        span = Span(0, sequence.left, sequence.computed, sequence.pages)
        id_T = torch.tensor(request.prompt)
        hidden_TD, mix = self.forward.run([(sequence, span)], id_T)
        logits_TV = self.forward.decoder.logits(hidden_TD, mix)
        self.scheduler.filled(sequence)
        self.scheduler.finish(sequence)
        return logits_TV

    def _complete(self, sequences: list[Sequence]) -> None:
        """Work until all is answered."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        while not self.scheduler.idle:
            self.step()

    def _sequence(self, request: Request) -> Sequence:
        """A request on its way; raises UnknownAdapter or RequestRefused."""
        packed: Packed | None = None
        if request.adapter is not None:
            packed = self.pool.find(request.adapter)
        sequence = Sequence(request, packed)
        self._check(sequence)
        return sequence

    def _fill(self) -> None:
        """Compute the next chunk of prompts, and the first token of each answer whose prompt is complete."""
        chosen = self.scheduler.next_chunk()
        if not chosen:
            return
        ids: list[int] = []
        for sequence, span in chosen:
            ids += prompt_part(sequence, span)
        hidden_TD, _ = self.forward.run(chosen, torch.tensor(ids))
        score(self.forward, chosen, hidden_TD)
        for sequence, span in chosen:
            sequence.computed += span.count
        self._begin_answers(chosen, hidden_TD)
        for sequence, _ in chosen:
            if sequence.left == 0:
                self.scheduler.filled(sequence)
        self._finish()

    def _begin_answers(self, chosen: Chosen, hidden_TD: Tensor) -> None:
        """Take the first token of each answer from the last row of its prompt."""
        answering: list[Sequence] = []
        rows: list[int] = []
        for sequence, span in chosen:
            if sequence.left == 0 and sequence.scored_from is None:
                answering.append(sequence)
                rows.append(span.row + span.count - 1)
        if answering:
            self._take(answering, hidden_TD[rows])

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
        if any(is_last_token(sequence) for sequence in ticket.sequences):
            self._drain()

    def _drain(self) -> None:
        """Read the tokens that are under way, and finish what they complete."""
        ticket = self._ticket
        if ticket is not None:
            ticket.done.synchronize()
            tokens = ticket.token_T.tolist()
            for sequence, token in zip(ticket.sequences, tokens, strict=True):
                if not sequence.finished:
                    sequence.take(token)
        self._ticket = None
        self._finish()

    def _advance_plainly(self) -> None:
        """One more token of every running answer, in a pass that is not a graph."""
        running = list(self.scheduler.running)
        chosen: list[tuple[Sequence, Span]] = []
        for row, sequence in enumerate(running):
            span = Span(row, 1, sequence.computed, sequence.pages)
            chosen.append((sequence, span))
        last_tokens = [sequence.answer[-1] for sequence in running]
        hidden_TD, _ = self.forward.run(chosen, torch.tensor(last_tokens))
        for sequence in running:
            sequence.computed += 1
        self._take(running, hidden_TD)
        self._finish()

    def _take(self, sequences: Several[Sequence], hidden_TD: Tensor) -> None:
        """Add to each sequence's answer the token that its row says."""
        tokens = self.forward.next_tokens(sequences, hidden_TD)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.take(token)

    def _finish(self) -> None:
        """Free what sequences hold whose answers are complete."""
        running = list(self.scheduler.running)
        for sequence in running:
            if sequence.finished:
                self.scheduler.finish(sequence)

    def _check(self, sequence: Sequence) -> None:
        """Raise RequestRefused where a request can never be answered."""
        request = sequence.request
        most = self.base.shape.vocabulary - 1
        if not request.prompt or request.new_tokens < 1:
            raise RequestRefused("request: found no prompt, or no new tokens; allowed: at least one of each")
        if sequence.length > self.positions:
            raise RequestRefused(f"request: found {sequence.length} positions; allowed: at most {self.positions}")
        if min(request.prompt) < 0 or max(request.prompt) > most:
            raise RequestRefused(f"request.prompt: found an id of no token; allowed: 0 to {most}")
        needed = pages_for(sequence.length + PAGE)
        if needed >= self.cache.pages:
            raise RequestRefused(f"request: found {sequence.length} positions, for which the cache has no room")

    def _refuse(self, sequence: Sequence) -> None:
        """Give up a request that does not fit though nothing else runs: pinned adapters have all slots or pages."""
        self.scheduler.drop(sequence)
        raise RequestRefused("request: found no slot for its adapter, or no pages, beside those that are pinned")

    def _runner(self, rows: int, ranks: int) -> "Runner":
        from serving.runner import Runner
        from serving.tail import Tail

        tail = Tail(self.base, self.pool, ranks)
        return Runner(self.forward, tail, rows, self.positions)


def tail_ranks(model: Any, slots: int) -> int:
    """Ranks behind the base's weights: some for each slot on a GPU, where kernels use them, and none on the CPU."""
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return 0
    return slots * TAIL


def is_last_token(sequence: Sequence) -> bool:
    """Whether an answer has all its tokens with the one that is under way."""
    count = len(sequence.answer) + 1
    return count >= sequence.request.new_tokens


def prompt_part(sequence: Sequence, span: Span) -> tuple[int, ...]:
    """The token ids of a span's rows."""
    prompt = sequence.request.prompt
    first = span.start - sequence.virtual
    stop = first + span.count
    return prompt[first:stop]


def loaded(folder: str | Path) -> Any:
    """A model from its folder, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()
