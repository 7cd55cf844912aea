"""Tasks of lm-evaluation-harness (`--tasks lm_eval:NAME`), judged by it row by row, compared as all tasks are."""

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.errors import InputError
from orchestrator.evaluation.process import AllAnswers, AnsweredSheet, EvaluationProgress, have_answered
from orchestrator.evaluation.questions import AskedRow, PreparedTask
from orchestrator.evaluation.report import EvaluatedTask, result_of_sheet
from orchestrator.evaluation.scores import Score
from orchestrator.evaluation.task import HARNESS, TaskSpec

RUNNER = [sys.executable, "-P", "-m", "serving.harness_run"]
_MEASURES = ("exact_match", "acc")  # the first that a task has says what is right
PlainRows = list[dict[str, Any]]


class JudgedTask(NamedTuple):
    """A task of the harness and the filter that its answers went through."""

    name: str
    filter: str


def harness_name(reference: str | Path) -> str | None:
    """The name of a task of the harness, or the path of its file; None for another task."""
    text = str(reference)
    if not text.startswith(HARNESS):
        return None
    name = text.removeprefix(HARNESS)
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return str(path.absolute())
    return name


def require_harness(names: Sequence[str]) -> None:
    """Raise InputError where tasks of the harness are asked for, and it is not installed here."""
    if not names or importlib.util.find_spec("lm_eval"):
        return
    found = f"--tasks {HARNESS}{names[0]}"
    raise InputError(f"{found}: needs lm_eval; allowed: pip install 'fleetune[harness]'")


def harness_tasks(
    request: dict[str, Any], name: str, limit: int | None, progress: EvaluationProgress
) -> tuple[list[EvaluatedTask], AllAnswers]:
    """Have a task of the harness answered; gives a task for each of its tasks and filters. Raises InputError."""
    answered = have_answered({**request, "task": name, "limit": limit}, progress, RUNNER)
    rows_of = {sheet: _rows_in(sheet) for sheet in answered.sheets}
    base = answered.sheets[0]
    tasks = []
    for judged in dict.fromkeys(map(_task_judged, rows_of[base])):
        results = []
        rows: PlainRows = []
        for sheet in answered.sheets:
            rows = _rows_of_task(rows_of[sheet], judged)
            scores = tuple(_scores_of(rows, judged))
            result = result_of_sheet(sheet, scores)
            results.append(result)
        prepared = _prepared(judged, rows, name)
        task = EvaluatedTask(prepared, results)
        tasks.append(task)
    return tasks, answered


def _rows_in(sheet: AnsweredSheet) -> PlainRows:
    """The rows in a file of answers, behind its first line."""
    text = sheet.path.read_text()
    _, *lines = text.splitlines()
    return list(map(json.loads, lines))


def _rows_of_task(rows: PlainRows, judged: JudgedTask) -> PlainRows:
    """The rows of one task and filter."""
    of_task = []
    for row in rows:
        if _task_judged(row) == judged:
            of_task.append(row)
    return of_task


def _task_judged(row: dict[str, Any]) -> JudgedTask:
    """Which task and filter a row is of."""
    task = row["task"]
    return JudgedTask(task, row["filter"])


def _scores_of(rows: PlainRows, judged: JudgedTask) -> Iterator[Score]:
    """Whether each answer is right; raises InputError for a task whose answers are neither right nor wrong."""
    for row in rows:
        measures = row["measures"]
        known = []
        for name in _MEASURES:
            if name in measures:
                known.append(name)
        if not known:
            found = ", ".join(measures) or "none"
            allowed = " or ".join(_MEASURES)
            raise InputError(f"task {HARNESS}{judged.name}: found the measures {found}; allowed: {allowed}")
        value = measures[known[0]]
        yield Score(value == 1, row["answer"])


def _prepared(judged: JudgedTask, rows: PlainRows, name: str) -> PreparedTask:
    """The rows of a task as people read them."""
    asked = []
    for row in rows:
        number = row["number"]
        asked_row = AskedRow(number, row["prompt"], row["expected"])
        asked.append(asked_row)
    title = judged.name
    if judged.filter != "none":
        title = f"{judged.name}.{judged.filter}"
    spec = TaskSpec(name=title, kind="exact_match", data=f"{HARNESS}{name}")
    return PreparedTask(spec, tuple(asked))
