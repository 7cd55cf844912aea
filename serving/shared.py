"""One engine for several threads, each of which waits for answers of its own: all of them are in one batch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serving.engine import Engine
from serving.sequence import Request, Sequence

STEPS = 16  # of the engine, between two looks at what is asked and what is answered


@dataclass(eq=False)
class Asked:
    """Requests of one model that wait together; `starts` says from which token on a prompt is scored, if it is."""

    requests: list[Request]
    starts: list[int | None]
    stop_texts: list[tuple[str, ...]]
    sequences: list[Sequence] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class SharedEngine:
    """An engine that a thread of its own works, for several others that wait for it."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        """Work begins with `working`."""
        self.engine = engine
        self.tokenizer = tokenizer
        self._ids: dict[tuple[str, bool], list[int]] = {}  # of texts, which all models are asked about
        self._new: list[Asked] = []
        self._under_way: list[Asked] = []
        self._changed = threading.Condition()
        self._closed = False

    def encode(self, text: str, has_special: bool) -> list[int]:
        """A text as token ids, with the tokenizer's special ones or without; found once for all who ask."""
        key = (text, has_special)
        if key not in self._ids:
            ids = self.tokenizer.encode(text, add_special_tokens=has_special)
            self._ids[key] = list(ids)
        return self._ids[key]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within it, what is asked is answered."""
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify()
            thread.join()

    def complete(self, asked: Asked) -> list[Sequence]:
        """The sequences of what is asked, once all are finished; raises what the engine refuses."""
        if not asked.requests:
            return []
        with self._changed:
            self._new.append(asked)
            self._changed.notify()
        asked.done.wait()
        if asked.error is not None:
            raise asked.error
        return asked.sequences

    def _work(self) -> None:
        """Answer what is asked until the end."""
        while True:
            with self._changed:
                while self._has_nothing_to_do:
                    self._changed.wait()
                if self._closed:
                    return
                new = self._new
                self._new = []
            for asked in new:
                self._begin(asked)
            self._advance()

    @property
    def _has_nothing_to_do(self) -> bool:
        if self._new or self._under_way or self._closed:
            return False
        return self.engine.scheduler.idle

    def _begin(self, asked: Asked) -> None:
        """Give requests to the engine; where one is refused, all of them are."""
        try:
            for request, start in zip(asked.requests, asked.starts, strict=True):
                sequence = self._added(request, start)
                asked.sequences.append(sequence)
            self._under_way.append(asked)
        except Exception as error:  # it belongs to the thread that waits
            asked.error = error
            asked.done.set()

    def _added(self, request: Request, start: int | None) -> Sequence:
        """A request on its way through the engine; raises what that refuses."""
        if start is None:
            return self.engine.add(request)
        return self.engine.add_scored(request, start)

    def _step(self) -> None:
        """Some steps of the engine; where one fails, all that is under way has failed."""
        try:
            for _ in range(STEPS):
                if not self.engine.scheduler.idle:
                    self.engine.step(in_waves=True)
        except Exception as error:  # it belongs to the threads that wait
            for asked in self._under_way:
                asked.error = error
                asked.done.set()
            self._under_way = []

    def _advance(self) -> None:
        """Some steps of the engine; then tell those whose answers are there."""
        self._step()
        still_under_way: list[Asked] = []
        for asked in self._under_way:
            self._end_at_stop_texts(asked)
            if all(sequence.finished for sequence in asked.sequences):
                asked.done.set()
            else:
                still_under_way.append(asked)
        self._under_way = still_under_way

    def _end_at_stop_texts(self, asked: Asked) -> None:
        """End what is being written where one of the texts that end it is there already."""
        pairs = zip(asked.sequences, asked.stop_texts, strict=True)
        for sequence, stop_texts in pairs:
            if sequence.finished or not stop_texts:
                continue
            text = self.tokenizer.decode(sequence.answer, skip_special_tokens=True)
            sequence.ended = any(stop in text for stop in stop_texts)
