"""The answers of one adapter to one task: a file of JSON lines, appended to as answers come.

The first line says what base, adapter, machine and versions the answers are of. A last line that was cut off by the
end of its process is dropped: that question is asked again. Of two answers to one question the first one counts.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PlainLine = dict[str, Any]


class KeptAnswer(NamedTuple):
    """What came of a question: the text that was written, and the log-likelihood of each text that was scored."""

    key: str
    text: str | None = None  # None: none was asked for
    tokens: int = 0  # that were written
    log_likelihoods: tuple[float, ...] = ()
    without_room: bool = False  # the prompt, or a text, fills all positions of the base

    def dump(self) -> PlainLine:
        """The answer as plain data."""
        return self._asdict()

    @classmethod
    def load(cls, plain: PlainLine) -> "KeptAnswer":
        """The answer in plain data; raises KeyError or TypeError where there is none."""
        fields = {name: plain[name] for name in cls._fields}
        numbers = tuple(plain["log_likelihoods"])
        fields["log_likelihoods"] = numbers
        return cls(**fields)


class AnswersFile:
    """Answers by the keys of their questions; more can be added."""

    def __init__(self, path: Path) -> None:
        """Read what a file has; it need not be there."""
        self.path = path
        self.head: PlainLine = {}
        self.answers: dict[str, KeptAnswer] = {}
        for plain in _json_lines(path):
            if "key" not in plain:
                self.head = self.head or plain
                continue
            with suppress(KeyError, TypeError):  # a line that somebody has changed is no answer
                answer = KeptAnswer.load(plain)
                self.answers.setdefault(answer.key, answer)

    def begin(self, head: PlainLine) -> None:
        """Write the first line, where there is none. A crash may undo it until answers follow."""
        if self.head:
            return
        self.head = head
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as stream:
            _append_lines(stream, [head])

    def add(self, answers: Iterable[KeptAnswer]) -> None:
        """Write answers to the file's end, and see to it that they survive a crash."""
        lines: list[PlainLine] = []
        for answer in answers:
            self.answers.setdefault(answer.key, answer)
            plain = answer.dump()
            lines.append(plain)
        with self.path.open("ab+") as stream:
            _append_lines(stream, lines)
            stream.flush()
            os.fsync(stream.fileno())


def merge_answers(source: Path, target: Path) -> None:
    """Bring the answers of one file into another one, whole or not at all; what that has already stays."""
    come = AnswersFile(source)
    there = AnswersFile(target)
    missing = [answer for key, answer in come.answers.items() if key not in there.answers]
    if there.head and not missing:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    unfinished = target.with_name(f".{token}")
    if there.head:
        shutil.copyfile(target, unfinished)
    merged = AnswersFile(unfinished)
    merged.begin(come.head)
    merged.add(missing)
    unfinished.replace(target)


def _append_lines(stream: BinaryIO, lines: Iterable[PlainLine]) -> None:
    """Write lines to a file's end, behind the end of its last one."""
    text = ""
    if _is_cut_off(stream):
        text = "\n"
    for line in lines:
        written = json.dumps(line)
        text += f"{written}\n"
    stream.write(text.encode())


def _is_cut_off(stream: BinaryIO) -> bool:
    """Whether a file's last line has no end."""
    if stream.seek(0, os.SEEK_END) == 0:
        return False
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) != b"\n"


def _json_lines(path: Path) -> Iterator[PlainLine]:
    """The lines of a file that are JSON objects: all but those that a killed process has cut off."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            plain = json.loads(line)
        except ValueError:
            continue
        if isinstance(plain, dict):
            yield plain
