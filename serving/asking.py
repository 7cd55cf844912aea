"""Questions to many adapters through one engine, which has always enough of them to fill its batch."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.engine import Engine
from serving.kept import AnswersFile, KeptAnswer
from serving.question import Question
from serving.sequence import Request, Sequence

LOOK_EVERY = 8  # steps of the engine, after which it is looked what is answered
READ_EVERY = 4  # such looks, after which it is read what is written so far
WRITE_EVERY_S = 2.0  # seconds that an answer waits to be written, at most
WRITERS = 16  # files that are written at once: a disk is done with several as soon as with one
Decode = Callable[[list[int]], str]  # token ids as text
AnswersProgress = Callable[[int], None]  # how many questions are answered


class Assignment(NamedTuple):
    """A question, the adapter that is asked (None: the base), and where its answer goes."""

    question: Question
    adapter: str | None
    file: AnswersFile


@dataclass
class OpenQuestion:
    """A question that is under way: the sequence that goes on with its prompt, and those of its texts."""

    assignment: Assignment
    written: Sequence | None = None
    scored: list[Sequence] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all that is asked is there."""
        if self.written is not None and not self.written.finished:
            return False
        return all(sequence.finished for sequence in self.scored)

    def end_at_stop_text(self, decode: Decode) -> None:
        """End what is being written where one of the texts that end it is there already."""
        stop_texts = self.assignment.question.stop_texts
        if self.written is None or not stop_texts:
            return
        text = decode(self.written.answer)
        self.written.ended = any(stop in text for stop in stop_texts)

    def answer(self, decode: Decode) -> KeptAnswer:
        """What came of it; the token that ends an answer is no part of it."""
        question = self.assignment.question
        text: str | None = None
        tokens = 0
        if self.written is not None:
            ids = list(self.written.answer)
            tokens = len(ids)
            if ids[-1] in question.stop:
                ids.pop()
            text = decode(ids)
        totals: list[float] = []
        for scored, sequence in zip(question.texts, self.scored, strict=True):
            total = scored.total(sequence.scores)
            totals.append(total)
        return KeptAnswer(question.key, text, tokens, tuple(totals))


class Asking:
    """Asks questions, and writes each answer into its file soon after it is there."""

    def __init__(self, engine: Engine, decode: Decode, progress: AnswersProgress) -> None:
        """`decode` makes text of token ids; `progress` is told now and then how many questions are answered."""
        self.engine = engine
        self.decode = decode
        self.progress = progress
        self.window = 4 * engine.scheduler.rows
        self.answered = 0
        self._open: list[OpenQuestion] = []
        self._unwritten: list[tuple[AnswersFile, KeptAnswer]] = []
        self._written_at = time.monotonic()
        self._looks = 0

    def ask(self, assignments: Iterable[Assignment]) -> None:
        """Ask all of them, in this order as far as there is room."""
        for assignment in assignments:
            self._begin(assignment)
            while len(self._open) >= self.window:
                self._advance()
        while self._open:
            self._advance()
        self._write()
        while not self.engine.scheduler.idle:  # what was ended at a text gives back its pages
            self.engine.step(in_waves=True)

    def _begin(self, assignment: Assignment) -> None:
        """Let a question wait for its turn; one that has no room is answered at once, with nothing."""
        question = assignment.question
        if not self._has_room(assignment):
            text = "" if question.new_tokens else None
            zeros = (0.0,) * len(question.texts)
            answer = KeptAnswer(question.key, text, 0, zeros, without_room=True)
            self._take(assignment, answer)
            return
        opened = OpenQuestion(assignment)
        adapter = assignment.adapter
        if question.new_tokens:
            new_tokens = min(question.new_tokens, self._room(assignment))
            request = Request(
                question.prompt,
                adapter,
                new_tokens,
                question.stop,
                temperature=question.temperature,
                seed=question.seed,
            )
            opened.written = self.engine.add(request)
        for scored in question.texts:
            request = Request(scored.ids, adapter, new_tokens=1)
            sequence = self.engine.add_scored(request, scored.start)
            opened.scored.append(sequence)
        self._open.append(opened)

    def _has_room(self, assignment: Assignment) -> bool:
        """Whether an answer of one token, and each text, fits into the positions that there are."""
        question = assignment.question
        virtual = self._virtual(assignment.adapter)
        for text in question.texts:
            if virtual + len(text.ids) >= self.engine.positions:
                return False
        return question.new_tokens == 0 or self._room(assignment) > 0

    def _room(self, assignment: Assignment) -> int:
        """The positions that are left behind a prompt."""
        virtual = self._virtual(assignment.adapter)
        prompt = assignment.question.prompt
        return self.engine.positions - virtual - len(prompt)

    def _virtual(self, adapter: str | None) -> int:
        """The positions in front of every prompt of an adapter."""
        if adapter is None:
            return 0
        packed = self.engine.pool.packed_of(adapter)
        return packed.adapter.virtual

    def _advance(self) -> None:
        """Some steps of the engine; then see what is answered."""
        for _ in range(LOOK_EVERY):
            if not self.engine.scheduler.idle:
                self.engine.step(in_waves=True)
        self._looks += 1
        reads = self._looks % READ_EVERY == 0
        still_open: list[OpenQuestion] = []
        for opened in self._open:
            if reads:
                opened.end_at_stop_text(self.decode)
            if opened.finished:
                answer = opened.answer(self.decode)
                self._take(opened.assignment, answer)
            else:
                still_open.append(opened)
        self._open = still_open
        waited = time.monotonic() - self._written_at
        if waited > WRITE_EVERY_S:
            self._write()

    def _take(self, assignment: Assignment, answer: KeptAnswer) -> None:
        """Keep an answer until it is written."""
        kept = (assignment.file, answer)
        self._unwritten.append(kept)
        self.answered += 1

    def _write(self) -> None:
        """Write what is answered, and say how much that is."""
        by_file: dict[AnswersFile, list[KeptAnswer]] = {}
        for file, answer in self._unwritten:
            answers = by_file.setdefault(file, [])
            answers.append(answer)
        with ThreadPoolExecutor(WRITERS) as writers:
            written = writers.map(AnswersFile.add, by_file, by_file.values())
            list(written)  # raises what went wrong
        self._unwritten = []
        self._written_at = time.monotonic()
        self.progress(self.answered)
