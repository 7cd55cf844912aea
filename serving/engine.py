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
from serving.mix import Mix
from serving.passing import Span
from serving.pool import Pool
from serving.scheduler import Scheduler
from serving.sequence import Request, Sequence

if TYPE_CHECKING:
    from serving.runner import Runner, Ticket

TAIL = 16  # ranks for each slot behind the base's weights
ROWS = 1024  # of logits at a time, where there are many


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
        whole = loaded(model) if isinstance(model, str | Path) else model
        on_gpu = next(whole.parameters()).device.type == "cuda"
        self.base = Base(whole, tail=slots * TAIL if on_gpu else 0)
        self.positions = min(positions, self.base.shape.positions)
        self.pool = Pool(self.base, slots, adapter_bytes)
        self.cache = Cache(self.base.shape, pages_for(tokens) + 1, self.base.dtype, self.base.device)
        self.forward = Forward(self.base, self.pool, self.cache, self.positions)
        self.scheduler = Scheduler(self.pool, self.cache, rows, chunk, self.forward.settle)
        self.runner = self._runner(rows, slots * TAIL) if on_gpu else None
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
            if not 0 < start < len(request.prompt):
                raise RequestRefused(f"start: found {start}; allowed: 1 to {len(request.prompt) - 1}")
            sequences.append(self._sequence(request))
            sequences[-1].scored_from = start
        self._complete(sequences)
        return [sequence.scores for sequence in sequences]

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what there is room for, compute a chunk of prompts, and a token of every running answer."""
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
        hidden_TD, mix = self.forward.run([(sequence, span)], torch.tensor(request.prompt))
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
        sequence = Sequence(request, None if request.adapter is None else self.pool.find(request.adapter))
        self._check(sequence)
        return sequence

    def _fill(self) -> None:
        chosen = self.scheduler.next_chunk()
        if not chosen:
            return
        ids = [id_ for sequence, span in chosen for id_ in prompt_part(sequence, span)]
        hidden_TD, _ = self.forward.run(chosen, torch.tensor(ids))
        self._score(chosen, hidden_TD)
        for sequence, span in chosen:
            sequence.computed += span.count
        done = [(sequence, span.row + span.count - 1) for sequence, span in chosen if sequence.left == 0]
        answering = [(sequence, row) for sequence, row in done if sequence.scored_from is None]
        if answering:
            self._take([sequence for sequence, _ in answering], hidden_TD[[row for _, row in answering]])
        for sequence, _ in done:
            self.scheduler.filled(sequence)
        self._finish()

    def _score(self, chosen: Chosen, hidden_TD: Tensor) -> None:
        """Note what the rows say of the tokens behind them, where that is asked."""
        found = [(s, span.row + row, token) for s, span in chosen for row, token in scored(s, span)]
        for first in range(0, len(found), ROWS):
            part = found[first : first + ROWS]
            mix = Mix.of([sequence.resident for sequence, _, _ in part], self.base.device)
            logits_TV = self.forward.decoder.logits(hidden_TD[[row for _, row, _ in part]], mix).float()
            token_T = torch.tensor([token for _, _, token in part], device=logits_TV.device)
            score_T = logits_TV.log_softmax(-1).gather(1, token_T[:, None])[:, 0]
            for (sequence, _, _), score in zip(part, score_T.tolist(), strict=True):
                sequence.scores.append(score)

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
        if any(len(s.answer) + 1 >= s.request.new_tokens for s in ticket.sequences):
            self._drain()

    def _drain(self) -> None:
        """Read the tokens that are under way, and finish what they complete."""
        if self._ticket is not None:
            self._ticket.done.synchronize()
            for sequence, token in zip(self._ticket.sequences, self._ticket.token_T.tolist(), strict=True):
                if not sequence.finished:
                    sequence.take(token)
        self._ticket = None
        self._finish()

    def _advance_plainly(self) -> None:
        running = list(self.scheduler.running)
        chosen = [(s, Span(row, 1, s.computed, s.pages)) for row, s in enumerate(running)]
        hidden_TD, _ = self.forward.run(chosen, torch.tensor([s.answer[-1] for s in running]))
        for sequence in running:
            sequence.computed += 1
        self._take(running, hidden_TD)
        self._finish()

    def _take(self, sequences: Several[Sequence], hidden_TD: Tensor) -> None:
        for sequence, token in zip(sequences, self.forward.next_tokens(sequences, hidden_TD), strict=True):
            sequence.take(token)

    def _finish(self) -> None:
        for sequence in [s for s in self.scheduler.running if s.finished]:
            self.scheduler.finish(sequence)

    def _check(self, sequence: Sequence) -> None:
        request, most = sequence.request, self.base.shape.vocabulary - 1
        if not request.prompt or request.new_tokens < 1:
            raise RequestRefused("request: found no prompt, or no new tokens; allowed: at least one of each")
        if sequence.length > self.positions:
            raise RequestRefused(f"request: found {sequence.length} positions; allowed: at most {self.positions}")
        if min(request.prompt) < 0 or max(request.prompt) > most:
            raise RequestRefused(f"request.prompt: found an id of no token; allowed: 0 to {most}")
        if pages_for(sequence.length + PAGE) >= self.cache.pages:
            raise RequestRefused(f"request: found {sequence.length} positions, for which the cache has no room")

    def _refuse(self, sequence: Sequence) -> None:
        """Give up a request that finds no room though nothing else runs: pinned adapters have all slots or pages."""
        self.scheduler.drop(sequence)
        raise RequestRefused("request: found no slot for its adapter, or no pages, beside those that are pinned")

    def _runner(self, rows: int, ranks: int) -> "Runner":
        from serving.runner import Runner
        from serving.tail import Tail

        return Runner(self.forward, Tail(self.base, self.pool, ranks), rows, self.positions)


def prompt_part(sequence: Sequence, span: Span) -> tuple[int, ...]:
    """The token ids of a span's rows."""
    first = span.start - sequence.virtual
    return sequence.request.prompt[first : first + span.count]


def scored(sequence: Sequence, span: Span) -> list[tuple[int, int]]:
    """The rows of a span that say something of a token whose log-probability is asked, and that token."""
    if sequence.scored_from is None:
        return []
    prompt, first = sequence.request.prompt, span.start - sequence.virtual
    low, high = max(sequence.scored_from, first + 1), min(len(prompt), first + span.count + 1)
    return [(at - 1 - first, prompt[at]) for at in range(low, high)]


def loaded(folder: str | Path) -> Any:
    """A model from its folder, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
