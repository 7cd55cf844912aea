"""Evaluation: the questions of all tasks to the base and to all adapters, in one pass over one engine.

    python -m serving.evaluate < request.json

The request: {base, revision, base_digest, adapters: [{name, folder}], out, tasks: [{name, key, questions}]}. The
answers are lines of JSON: {problem} for each adapter that cannot be evaluated (then nothing else is done), {file,
task, adapter, digest, change, left_out} for each file of answers, {done, total} now and then, and {answered, seconds}
at the end. What a file has already is not asked again, and no base is loaded where nothing is left to ask.

Files are named by digests: OUT/BASE/TASK/ADAPTER.jsonl. That of the base is of its weights, and of what else decides
on its answers here: kind of device, and versions.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from serving.asking import AnswersProgress, Asking, Assignment, Decode
from serving.changes import ChangeByName, changes_of
from serving.engine import Engine
from serving.error import AdapterRefused
from serving.format import digest_in_folder
from serving.kept import AnswersFile
from serving.question import KEY_SHOWN, AskedTask, Question
from serving.sizes import sizes_for
from serving.starting import RequestData, ready_engine, say

PROBES = 2  # prompts on which it is seen whether an adapter changes anything
VERSIONED = ("torch", "transformers", "fleetune")


@dataclass(frozen=True)
class Candidate:
    """What is evaluated: an adapter by its name, folder and digest; or the base, which has none of these."""

    name: str | None = None
    folder: Path | None = None
    digest: str = "base"

    @property
    def file_name(self) -> str:
        """The name of its files of answers."""
        return f"{self.digest[:KEY_SHOWN]}.jsonl"


@dataclass(frozen=True)
class AnswerSheet:
    """The answers of one candidate to one task, and what it has not answered yet."""

    task: AskedTask
    candidate: Candidate
    file: AnswersFile

    @property
    def missing(self) -> list[Question]:
        """The questions without an answer, each once."""
        by_key: dict[str, Question] = {}
        for question in self.task.questions:
            if question.key not in self.file.answers:
                by_key[question.key] = question
        return list(by_key.values())


def sheets_of(out: Path, tasks: Sequence[AskedTask], candidates: Sequence[Candidate]) -> list[AnswerSheet]:
    """Each task with each candidate; the folder is that of the base's answers."""
    files: dict[Path, AnswersFile] = {}
    sheets: list[AnswerSheet] = []
    for candidate in candidates:
        for task in tasks:
            path = out / task.folder_name / candidate.file_name
            if path not in files:
                files[path] = AnswersFile(path)
            sheet = AnswerSheet(task, candidate, files[path])
            sheets.append(sheet)
    return sheets


def missing_of(sheets: Sequence[AnswerSheet]) -> list[Assignment]:
    """All that is missing: adapter by adapter, as a batch is fastest that has few of them."""
    missing: list[Assignment] = []
    asked: set[AnswersFile] = set()  # an adapter may have two names
    for sheet in sheets:
        if sheet.file in asked:
            continue
        asked.add(sheet.file)
        for question in sheet.missing:
            assignment = Assignment(question, sheet.candidate.name, sheet.file)
            missing.append(assignment)
    return missing


def answer_all(
    engine: Engine, sheets: Sequence[AnswerSheet], decode: Decode, head: RequestData, progress: AnswersProgress
) -> None:
    """Ask what is missing; the adapters are loaded in the engine under their names. `head` is kept in every file."""
    missing = missing_of(sheets)
    _begin_files(engine, sheets, head)
    asking = Asking(engine, decode, progress)
    asking.ask(missing)


def _begin_files(engine: Engine, sheets: Sequence[AnswerSheet], head: RequestData) -> None:
    """Write the first line of files that lack it, and answers; a task's adapters are tried in one pass."""
    by_task: dict[str, list[AnswerSheet]] = {}
    for sheet in sheets:
        if sheet.missing and not sheet.file.head:
            of_task = by_task.setdefault(sheet.task.folder_name, [])
            of_task.append(sheet)
    for of_task in by_task.values():
        changes = _changes_by(engine, of_task)
        for sheet in of_task:
            of_sheet = _head_of(engine, sheet, changes)
            sheet.file.begin({**head, **of_sheet})


def _changes_by(engine: Engine, of_task: Sequence[AnswerSheet]) -> ChangeByName:
    """How much the adapters of one task's sheets change."""
    task = of_task[0].task
    probes = task.questions[:PROBES]
    names = [sheet.candidate.name for sheet in of_task]
    prompts = [_prompt_of(question) for question in probes]
    return changes_of(engine, names, prompts)


def _head_of(engine: Engine, sheet: AnswerSheet, changes: ChangeByName) -> dict[str, Any]:
    """What the file of a sheet says of it; for an adapter, how much it changes."""
    candidate = sheet.candidate
    change = changes.get(candidate.name)
    left_out = 0.0
    if candidate.name is not None:
        left_out = engine.left_out(candidate.name)
    return {"task": sheet.task.name, "adapter": candidate.digest, "change": change, "left_out": left_out}


def _prompt_of(question: Question) -> tuple[int, ...]:
    """What is in front of an answer; where nothing is written, the whole of a text."""
    if question.prompt:
        return question.prompt
    return question.texts[0].ids


def main(request: RequestData) -> int:
    """Do what a request asks for, and print what comes of it; gives the exit code."""
    tasks = list(map(AskedTask.load, request["tasks"]))
    candidates, problems = adapters_in(request["adapters"])
    head = versions_of(request["base_digest"])
    place = Path(request["out"]) / base_key(head)
    sheets = sheets_of(place, tasks, [Candidate(), *candidates])
    missing = missing_of(sheets)
    total = len(missing)
    began = time.monotonic()
    if missing and not problems:
        problems = _load_and_ask(request, sheets, head)
    for problem in problems:
        say(problem=problem)
    if problems:
        return 2
    for sheet in sheets:
        change = sheet.file.head.get("change")
        candidate = sheet.candidate
        say(
            file=str(sheet.file.path),
            task=sheet.task.name,
            adapter=candidate.name,
            digest=candidate.digest,
            change=change,
            left_out=sheet.file.head.get("left_out", 0.0),
        )
    say(answered=total, seconds=time.monotonic() - began)
    return 0


def adapters_in(plain: Sequence[RequestData]) -> tuple[list[Candidate], list[str]]:
    """The adapters of a request, and what is wrong with those that have none."""
    candidates: list[Candidate] = []
    problems: list[str] = []
    for adapter in plain:
        folder = Path(adapter["folder"])
        try:
            digest = digest_in_folder(folder)
        except (AdapterRefused, OSError) as error:
            problems.append(str(error))
            continue
        candidates.append(Candidate(adapter["name"], folder, digest))
    return candidates, problems


def _load_and_ask(request: RequestData, sheets: Sequence[AnswerSheet], head: RequestData) -> list[str]:
    """Load the base and the adapters, and ask what is missing; gives what is wrong with them instead."""
    questions = [assignment.question for assignment in missing_of(sheets)]
    total = len(questions)
    say(done=0, total=total)  # loading may take a while
    made = ready_engine(request, lambda config, adapters: sizes_for(config, questions, adapters))
    if isinstance(made, list):
        return made
    answer_all(made.engine, sheets, made.decode, head, lambda done: say(done=done, total=total))
    return []


def versions_of(base_digest: str) -> dict[str, Any]:
    """What decides on a base's answers, beside the question."""
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {}
    for name in VERSIONED:
        versions[name] = version(name)
    return {"base": base_digest, "device": device, "versions": versions}


def base_key(head: RequestData) -> str:
    """The digest of what decides on a base's answers."""
    text = json.dumps(head, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:KEY_SHOWN]


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        sys.exit(main(json.load(sys.stdin)))
