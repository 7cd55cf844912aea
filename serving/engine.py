"""The engine: many requests, many adapters, one base.

    engine = Engine("base")
    engine.load("alice", "runs/alice/output")
    answers = engine.generate([Request(prompt=(1, 2, 3), adapter="alice"), Request(prompt=(1, 2, 3))])

Shapes: T rows of a pass, V vocabulary, D width.
"""

from collections.abc import Iterable, Sequence as Several
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from serving.base import Base
from serving.cache import PAGE, Cache, pages_for
from serving.decoder import Decoder, Operations
from serving.error import RequestRefused
from serving.mix import Mix
from serving.passing import Pass, Span
from serving.plain import Plain
from serving.pool import Pool, Resident
from serving.rotation import Rotations
from serving.sampler import Choice, greedy, sample
from serving.scheduler import Scheduler
from serving.sequence import Request, Sequence
from serving.work import Work

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
        """Serve a transformers model, or the folder of one.

        `slots` adapters and `adapter_bytes` of their weights are on the device at once, `rows` sequences in a batch;
        a sequence has at most `positions` and all together `tokens`; a pass computes at most `chunk` of prompts.
        """
        whole = loaded(model) if isinstance(model, str | Path) else model
        fast = next(whole.parameters()).device.type == "cuda"
        self.base = Base(whole, tail=slots * TAIL if fast else 0)
        self.positions = min(positions, self.base.shape.positions)
        self.pool = Pool(self.base, slots, adapter_bytes)
        self.cache = Cache(self.base.shape, pages_for(tokens) + 1, self.base.dtype, self.base.device)
        self.rotations = Rotations(self.base, self.positions)
        self.decoder = Decoder(self.base, self._operations(fast))
        self.runner = self._runner(rows) if fast else None
        self.scheduler = Scheduler(self.pool, self.cache, rows, chunk, self._settle)
        self._ticket: Ticket | None = None

    def _operations(self, fast: bool) -> Operations:
        if not fast:
            return Plain(self.base, self.pool, self.cache)
        from serving.fast import Fast

        return Fast(self.base, self.pool, self.cache)

    def _runner(self, rows: int) -> "Runner":
        from serving.runner import Runner
        from serving.tail import Tail

        tail = Tail(self.base, self.pool, len(self.pool.table_KLSC) * TAIL - TAIL)
        return Runner(self.decoder, self.pool, self.rotations, tail, rows, self.positions)

    def load(self, name: str, folder: Path | str, pinned: bool = False) -> str:
        """Give an adapter a name; returns its digest. Raises AdapterRefused where it cannot be computed exactly."""
        packed = self.pool.load(name, folder, pinned)
        self.rotations.kind(packed)
        return packed.digest

    def unload(self, name: str) -> None:
        """Forget an adapter's name."""
        self.pool.unload(name)

    def add(self, request: Request) -> Sequence:
        """Let a request wait for its turn; raises UnknownAdapter or RequestRefused."""
        packed = None if request.adapter is None else self.pool.find(request.adapter)
        sequence = Sequence(request, packed)
        self._check(sequence)
        self.scheduler.add(sequence)
        return sequence

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """The answers to requests, in their order: token ids."""
        sequences = [self.add(request) for request in requests]
        while not self.scheduler.idle:
            self.step()
        return [sequence.answer for sequence in sequences]

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what there is room for, compute a chunk of prompts, and a token of every running answer."""
        self.scheduler.admit()
        self._fill()
        if self.scheduler.running:
            self._advance()

    @torch.inference_mode()
    def logits(self, request: Request) -> torch.Tensor:
        """The logits [T, V] behind each token of a request's prompt, computed alone."""
        sequence = self.add(request)
        self.scheduler.admit()
        span = Span(0, sequence.left, sequence.computed, sequence.pages)
        hidden_TD, mix = self._run([(sequence, span)], torch.tensor(request.prompt))
        logits_TV = self.decoder.logits(hidden_TD, mix)
        self.scheduler.filled(sequence)
        self.scheduler.finish(sequence)
        return logits_TV

    def _fill(self) -> None:
        chosen = self.scheduler.next_chunk()
        if not chosen:
            return
        ids = [id_ for sequence, span in chosen for id_ in prompt_part(sequence, span)]
        hidden_TD, mix = self._run(chosen, torch.tensor(ids))
        done = []
        for sequence, span in chosen:
            sequence.computed += span.count
            if sequence.left == 0:
                done.append((sequence, span.row + span.count - 1))
        if done:
            self._answer([sequence for sequence, _ in done], hidden_TD[[row for _, row in done]])
        for sequence, _ in done:
            self.scheduler.filled(sequence)
        self._finish()

    def _advance(self) -> None:
        """One more token of every running answer."""
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

    def _collect(self) -> None:
        """Read the tokens of the step before."""
        if self._ticket is not None:
            self._ticket.done.synchronize()
            for sequence, token in zip(self._ticket.sequences, self._ticket.token_T.tolist(), strict=True):
                if not sequence.finished:
                    sequence.take(token)
        self._ticket = None

    def _drain(self) -> None:
        """Read all tokens that are under way, and finish what they complete."""
        self._collect()
        self._finish()

    def _advance_plainly(self) -> None:
        running = list(self.scheduler.running)
        chosen = [(s, Span(row, 1, s.computed, s.pages)) for row, s in enumerate(running)]
        hidden_TD, _ = self._run(chosen, torch.tensor([s.answer[-1] for s in running]))
        for sequence in running:
            sequence.computed += 1
        self._answer(running, hidden_TD)
        self._finish()

    def _answer(self, sequences: Several[Sequence], hidden_TD: torch.Tensor) -> None:
        mix = Mix.of([sequence.resident for sequence in sequences], self.base.device)
        logits_TV = self.decoder.logits(hidden_TD, mix)
        requests = [sequence.request for sequence in sequences]
        number_T = torch.tensor([len(sequence.answer) for sequence in sequences], device=self.base.device)
        if greedy(requests):
            token_T = logits_TV.argmax(-1)
        else:
            token_T = sample(logits_TV, Choice.of(requests, self.base.device), number_T)
        for sequence, token in zip(sequences, token_T.tolist(), strict=True):
            sequence.take(token)

    def _run(self, chosen: list[tuple[Sequence, Span]], id_T: torch.Tensor) -> tuple[torch.Tensor, Mix]:
        """The normed outputs of a pass over some rows of sequences."""
        mix = Mix.of([s.resident for s, span in chosen for _ in range(span.count)], self.base.device)
        x_TD = self.decoder.embed(id_T.to(self.base.device), mix)
        return self.decoder.forward(x_TD, self._pass(mix, [(s.resident, span) for s, span in chosen])), mix

    def _pass(self, mix: Mix, chosen: list[tuple[Resident | None, Span]]) -> Pass:
        position_T = torch.cat([torch.arange(span.start, span.start + span.count) for _, span in chosen])
        kind_T = torch.cat([torch.full((s.count,), 0 if r is None else r.rotation) for r, s in chosen])
        place_T = torch.cat([span.places(span.start) for _, span in chosen])
        cos_TF, sin_TF = self.rotations.at(kind_T, position_T)
        spans = [span for _, span in chosen]
        step = Pass(mix, place_T.to(self.base.device), cos_TF, sin_TF, spans)
        if self.runner is not None:
            before = Work.of(mix.tenants, lambda t: max(t.resident.packed.needs.narrow, t.resident.packed.needs.wide), 64)
            behind = Work.of(mix.tenants, lambda t: t.resident.packed.needs.behind, 64)
            step.before, step.behind = (None if w is None else w.to(self.base.device) for w in (before, behind))
        return step

    def _settle(self, resident: Resident) -> bool:
        """Make ready what an adapter has beside its block; False where its virtual tokens find no pages."""
        adapter, device = resident.packed.adapter, self.base.device
        pages = self.cache.reserve(pages_for(adapter.virtual))
        if pages is None:
            return False
        resident.pages, resident.ready = pages, True
        resident.rotation = self.rotations.kind(resident.packed)
        resident.embed_VD, resident.head_VD = (
            None if own is None else own.to(device, non_blocking=True) for own in (adapter.embed_VD, adapter.head_VD)
        )
        if adapter.prefix_L2VHE is not None:
            self.cache.write(pages, adapter.prefix_L2VHE)
        elif adapter.prompt_VD is not None:
            mix = Mix.of([resident] * adapter.virtual, self.base.device)
            step = self._pass(mix, [(resident, Span(0, adapter.virtual, 0, pages))])
            self.decoder.forward(adapter.prompt_VD.to(self.base.device), step)
        return True

    def _finish(self) -> None:
        for sequence in [s for s in self.scheduler.running if s.finished]:
            self.scheduler.finish(sequence)

    def _check(self, sequence: Sequence) -> None:
        request = sequence.request
        if not request.prompt or request.new_tokens < 1:
            raise RequestRefused("request: found no prompt, or no new tokens; allowed: at least one of each")
        if sequence.length > self.positions:
            raise RequestRefused(f"request: found {sequence.length} positions; allowed: at most {self.positions}")
        if not all(0 <= token < self.base.shape.vocabulary for token in request.prompt):
            raise RequestRefused(f"request.prompt: found an id of no token; allowed: 0 to {self.base.shape.vocabulary - 1}")
        if pages_for(sequence.length + PAGE) >= self.cache.pages:
            raise RequestRefused(f"request: found {sequence.length} positions, for which the cache has no room")


def prompt_part(sequence: Sequence, span: Span) -> tuple[int, ...]:
    """The token ids of a span's rows."""
    first = span.start - sequence.virtual
    return sequence.request.prompt[first : first + span.count]


def loaded(folder: str | Path) -> Any:
    """A model from its folder, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
