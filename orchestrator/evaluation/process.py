"""The process that evaluates, `python -m serving.evaluate`: a command imports nothing as heavy as an engine."""

import json
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.child import asked_child
from orchestrator.errors import InputError, JobFailed
from serving.kept import AnswersFile

EVALUATOR = [sys.executable, "-P", "-m", "serving.evaluate"]
EvaluationProgress = Callable[[int, int], None]  # questions that are answered, and of how many


@dataclass(frozen=True)
class AnsweredSheet:
    """What one candidate (None: the base) answered to one task, its digest, and how much it changes the logits.

    `left_out`: of a model's difference to the base, as a share of it, where a low rank cannot hold all.
    """

    task: str
    adapter: str | None
    digest: str
    change: float | None
    path: Path
    left_out: float = 0.0

    @property
    def file(self) -> AnswersFile:
        """Its answers, read anew."""
        return AnswersFile(self.path)


@dataclass(frozen=True)
class AllAnswers:
    """All that was answered; `asked` of it only now, in `seconds`."""

    sheets: Sequence[AnsweredSheet]
    asked: int
    seconds: float


def have_answered(
    request: dict[str, Any], progress: EvaluationProgress, command: Sequence[str] | None = None
) -> AllAnswers:
    """Have what a request asks for answered; what was answered before is not asked again.

    Raises InputError with a line for each adapter that cannot be evaluated, JobFailed where the process fails.
    """
    sheets: list[AnsweredSheet] = []
    problems: list[str] = []
    asked = 0
    seconds = 0.0
    with closing(_said_by(command or EVALUATOR, request)) as lines:  # so that what `progress` raises ends the process
        for said in lines:
            if "problem" in said:
                problems.append(said["problem"])
            elif "file" in said:
                sheet = _sheet_in(said)
                sheets.append(sheet)
            elif "answered" in said:
                asked = said["answered"]
                seconds = said["seconds"]
            else:
                progress(said["done"], said["total"])
    if problems:
        raise InputError("\n".join(problems))
    return AllAnswers(sheets, asked, seconds)


def _said_by(command: Sequence[str], request: dict[str, Any]) -> Generator[dict[str, Any]]:
    """What a process says to a request, line by line; raises JobFailed where it fails without a word."""
    with asked_child(command) as child:
        refuses = False
        with suppress(BrokenPipeError):  # it has failed already
            json.dump(request, child.questions)
            child.questions.close()
        for line in child.answers:
            said: dict[str, Any] = json.loads(line)
            refuses |= "problem" in said
            yield said
        code = child.process.wait()
        if code and not refuses:
            child.errors.seek(0)
            why = _last_words(code, child.errors.read())
            raise JobFailed(f"the evaluation has failed: {why}; the same command goes on where it stopped")


def _last_words(code: int, said: str) -> str:
    """Why a process has failed: the signal that has ended it, or the last line that it said."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}"
    lines = said.strip().splitlines()
    if lines:
        return lines[-1]
    return f"exit code {code}"


def _sheet_in(said: dict[str, Any]) -> AnsweredSheet:
    """What a line of the process says of a file."""
    known: dict[str, Any] = {"path": Path(said["file"])}
    known["left_out"] = said.get("left_out", 0.0)
    for name in ("task", "adapter", "digest", "change"):
        known[name] = said[name]
    return AnsweredSheet(**known)
