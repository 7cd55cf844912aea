"""Which sequences are computed next: tenants take fair turns, and no sequence is ever preempted.

A sequence is admitted when a row of the batch, room for its adapter and pages for its whole length are free, so
what is admitted can always be finished.
"""

from collections.abc import Callable
from collections.abc import Sequence as Several

from serving.cache import PAGE, Cache, pages_for
from serving.error import RequestRefused
from serving.fair import FairQueue
from serving.packed import Packed
from serving.passing import Span
from serving.pool import Pool, Resident
from serving.prefixes import PageKey, Prefixes, WholePrompt, whole_prompt
from serving.sequence import Sequence

WAVE = 8  # one row in so many is free before a wave of sequences is admitted
KEPT = 8  # one row in so many is for tenants that have none, where there are several
Prepare = Callable[[Resident], bool]
SequenceSpan = tuple[Sequence, Span]  # a sequence, and its rows in a pass
TokenScore = tuple[int, float]  # a token, and its log-probability


class Scheduler:
    """Queues of sequences: waiting, filling (their prompts are computed in chunks), and running."""

    def __init__(self, pool: Pool, cache: Cache, rows: int, chunk: int, prepare_resident: Prepare) -> None:
        """At most `rows` sequences at a time and `chunk` tokens of prompts in one pass.

        `prepare_resident` makes an adapter on the device ready, and says whether its virtual tokens had pages.
        """
        self.pool = pool
        self.cache = cache
        self.prefixes = Prefixes(cache)
        self.rows = rows
        self.chunk = chunk
        self.prepare_resident = prepare_resident
        self.waiting = FairQueue()
        self.filling: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        waiting_or_admitted = self.waiting or self.filling or self.running
        return not waiting_or_admitted

    @property
    def is_wave_due(self) -> bool:
        """Whether enough rows are free to admit many sequences at once."""
        admitted = self._admitted
        free = self.rows - admitted
        return admitted == 0 or free * WAVE >= self.rows

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Start the sequences that wait, in turn, up to the first that does not fit.

        Raises RequestRefused where nothing else is admitted beside which it would fit later.
        """
        self._start_waiting()
        if self.waiting and not self._admitted:
            self._refuse_first()

    def _start_waiting(self) -> None:
        """Start the sequences that wait, in turn, up to the first that does not fit."""
        while self.waiting and self._admitted < self.rows:
            sequence = self.waiting.first()
            if self._is_kept_from(sequence) or not self._start(sequence):
                return
            self.waiting.remove(sequence)
            self.waiting.charge_prompt(sequence)
            self.filling.append(sequence)

    @property
    def _admitted(self) -> int:
        filling = len(self.filling)
        return filling + len(self.running)

    def _is_kept_from(self, sequence: Sequence) -> bool:
        """Whether the free rows are kept for tenants that have none: who asks now and then starts at once."""
        kept = 0
        if self.waiting.tenants > 1:
            kept = self.rows // KEPT
        if self._admitted < self.rows - kept:
            return False
        tenant = sequence.request.tenant
        admitted = self.filling + self.running
        return any(other.request.tenant == tenant for other in admitted)

    def next_chunk(self) -> list[SequenceSpan]:
        """The sequences whose prompts are computed next, with their rows: at most a chunk of tokens.

        One that begins as another one of the chunk goes on is left for later, when it finds that page computed; one
        with the same prompt is left until that is computed.
        """
        chosen: list[SequenceSpan] = []
        under_way: set[PageKey | WholePrompt | None] = set()
        row = 0
        for sequence in self.waiting.in_turn(self.filling):
            key = self.prefixes.adopt(sequence)
            begun = {key, whole_prompt(sequence)} - {None}
            if begun & under_way:
                continue
            under_way |= begun
            space = self.chunk - row
            count = min(sequence.uncomputed, space)
            if count == 0:
                break
            span = Span(row, count, sequence.computed, sequence.pages)
            part = (sequence, span)
            chosen.append(part)
            row += count
        return chosen

    def whole_prompts(self) -> list[SequenceSpan]:
        """The sequences that were admitted first, with rows for all of their prompts: a chunk, or only the first."""
        chosen: list[SequenceSpan] = []
        row = 0
        for sequence in self.filling:
            count = sequence.uncomputed
            if chosen and row + count > self.chunk:
                break
            span = Span(row, count, sequence.computed, sequence.pages)
            part = (sequence, span)
            chosen.append(part)
            row += count
        return chosen

    def twins(self, chosen: list[SequenceSpan]) -> list[SequenceSpan]:
        """The sequences whose prompt was computed just now for one of the chosen, each with that one's span.

        They have its pages from here on, and a copy of the page on which the prompt ends.
        """
        complete: dict[WholePrompt, SequenceSpan] = {}
        for part in chosen:
            prompt = whole_prompt(part[0])
            if prompt is not None and part[0].uncomputed == 0:
                complete[prompt] = part
        found: list[SequenceSpan] = []
        sources: list[int] = []
        targets: list[int] = []
        for sequence in self.filling:
            prompt = whole_prompt(sequence)
            if prompt not in complete or sequence.uncomputed == 0:
                continue
            first, span = complete[prompt]
            page = self.prefixes.follow(sequence)
            if page is not None:
                sources.append(first.pages[page])
                targets.append(sequence.pages[page])
                found.append((sequence, span))
        if found:
            self.cache.copy(sources, targets)
        return found

    def filled(self, sequence: Sequence) -> None:
        """A prompt is computed: its answer runs."""
        self.filling.remove(sequence)
        self.running.append(sequence)

    def take(self, sequences: Several[Sequence], tokens: list[TokenScore]) -> None:
        """One more token of each answer that is not complete, which its tenant has got then."""
        taking: list[Sequence] = []
        for sequence, (token, score) in zip(sequences, tokens, strict=True):
            if not sequence.finished:
                sequence.take(token, score)
                taking.append(sequence)
        self.waiting.charge_tokens(taking)

    def finish(self, sequence: Sequence) -> None:
        """Free what a finished sequence held."""
        self.running.remove(sequence)
        self._free(sequence)

    def finish_complete(self) -> None:
        """Free what sequences hold whose answers are complete."""
        running = list(self.running)
        for sequence in running:
            if sequence.finished:
                self.finish(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Let a sequence go unanswered, wherever it is; nothing happens to one that is finished."""
        if sequence in self.filling:
            self.filling.remove(sequence)
            self._free(sequence)
        elif sequence in self.running:
            self.finish(sequence)
        elif sequence in self.waiting:
            self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Let a sequence that waits go unanswered."""
        self.waiting.remove(sequence)

    def _refuse_first(self) -> None:
        """Give up the first that waits, which does not fit though nothing else runs. Raises RequestRefused."""
        sequence = self.waiting.first()
        self.drop(sequence)
        refusal = "request: found no room on the device for its adapter, or no pages, beside those that are pinned"
        sequence.refusal = RequestRefused(refusal)
        raise sequence.refusal

    def _free(self, sequence: Sequence) -> None:
        """Free the pages of a sequence, and its adapter's room for others."""
        self.cache.free(sequence.own_pages)
        self.cache.leave(sequence.joined_pages)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Let a sequence's adapter leave the device, if nobody else uses it."""
        if sequence.resident is not None:
            self.pool.release(sequence.resident)
            sequence.resident = None

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence room for its adapter and pages; False where one of them is not to be had now."""
        if not self._has_adapter(sequence):
            return False
        adapter_pages: list[int] = []
        if sequence.resident is not None:
            adapter_pages = sequence.resident.pages
        full_pages = sequence.virtual // PAGE
        shared = adapter_pages[:full_pages]
        needed = pages_for(sequence.length)
        needed -= full_pages
        own_pages = self._reserve(needed)
        if own_pages is None:
            self._let_go(sequence)  # it may not be its turn any more when pages are free
            return False
        sequence.pages = shared + own_pages
        sequence.own_pages = list(own_pages)
        sequence.computed = sequence.virtual
        if sequence.virtual % PAGE:
            # The adapter's last page is not full: this sequence goes on in a copy of its own.
            last_page = adapter_pages[-1]
            self.cache.copy([last_page], own_pages[:1])
        return True

    def _has_adapter(self, sequence: Sequence) -> bool:
        """Whether a sequence's adapter is on the device, where it is brought if need be."""
        if sequence.packed is None:
            return True
        if sequence.resident is None:
            sequence.resident = self._resident(sequence.packed)
        return sequence.resident is not None

    def _resident(self, packed: Packed) -> Resident | None:
        """An adapter on the device, which others that are not in use may have to leave."""
        while (resident := self.pool.acquire(packed)) is None:
            if not self._evict():
                return None
        while not resident.ready:
            if self.prepare_resident(resident):
                break
            if not self._evict(with_pages=True):
                self.pool.release(resident)
                return None
        return resident

    def _reserve(self, count: int) -> list[int] | None:
        """So many pages, for which adapters that are not in use may have to leave; None where that is not enough."""
        while (pages := self.cache.reserve(count)) is None:
            if not self._evict(with_pages=True):
                return None
        return pages

    def _evict(self, with_pages: bool = False) -> bool:
        """Evict the adapter that was not used for the longest time; False where there is none to evict."""
        resident = self.pool.evictable(with_pages)
        if resident is None:
            return False
        self.cache.free(resident.pages)
        self.pool.evict(resident)
        return True
