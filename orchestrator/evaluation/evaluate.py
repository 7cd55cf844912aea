"""The verb `evaluate`: all adapters on all tasks, in one pass of one engine, and what came of it."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.evaluation.adapters import (
    AdapterSource,
    PlainBase,
    base_of,
    resolve_adapters,
    trained_elsewhere,
)
from orchestrator.evaluation.harness import harness_name, harness_tasks, require_harness
from orchestrator.evaluation.judges import find_judge
from orchestrator.evaluation.judging import judged_tasks, opponent, require_written
from orchestrator.evaluation.losses import too_much_lost
from orchestrator.evaluation.process import AllAnswers, AnsweredSheet, EvaluationProgress, have_answered
from orchestrator.evaluation.questions import Preparation, PreparedTask
from orchestrator.evaluation.report import EvaluatedTask, EvaluationReport, TaskResult, result_of_sheet
from orchestrator.evaluation.request import base_tokenizer, evaluation_request, line_of
from orchestrator.evaluation.scores import score_task
from orchestrator.evaluation.submitted import ClusterEvaluation
from orchestrator.evaluation.task import HARNESS, TaskSpec, read_tasks
from orchestrator.evaluation.tracked import track
from orchestrator.planning.freeze import Sent
from orchestrator.submit import Submission
from runfolder.folders import home
from runfolder.job import Base

AnswersTo = Callable[[dict[str, Any], EvaluationProgress], AllAnswers]  # a request
TOLD = 1e-4  # of a difference to the base: what is less is rounding, of 32 bits or of 16
DATA, TRAIN = "data", "train"  # extras: what makes questions needs, and what answers them here
_PACKAGES_OF = {DATA: ("transformers", "numpy", "jinja2"), TRAIN: ("torch", "transformers", "safetensors")}


def evaluate(
    adapters: Sequence[str],
    tasks: Sequence[Path | str],
    *,
    base: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    cluster: str | None = None,
    overrides: Sequence[str] = (),
    judge: str | None = None,
    against: str | None = None,
    progress: EvaluationProgress = lambda _done, _total: None,
    sent: Sent = lambda _file, _bytes, _total: None,
    announce: Callable[[Submission], None] = lambda _: None,
) -> EvaluationReport:
    """Evaluate runs (by what `status` takes) and folders of adapters, and the base, on tasks (their files).

    On a `cluster` it is a job, which is submitted once and waited for; the same call goes on with it. `overrides` are
    for its resources; `announce` is called with its submission, and `sent` as `submit` does. Raises JobFailed or
    JobStopped where it ends otherwise than well, Unreachable where the same call is to be repeated.

    A `judge` (`base`, the folder or hub id of a model, the run or folder of a reward model) compares every answer
    with that of the base, or of the adapter `against`; it judges on this machine.

    `limit`: only so many rows of each task. Answers are kept in `out`, else in FLEETUNE_HOME/evaluations; what is
    there already is not asked again. Each adapter that a run left gets a child run of that run in MLflow for each
    task. Raises InputError with a line for each error, before anything is asked.
    """
    of_harness = [name for name in map(harness_name, tasks) if name is not None]
    paths = [Path(task) for task in tasks if harness_name(task) is None]
    read = read_tasks(paths)
    _require_own_tasks(of_harness, cluster)
    if judge:
        require_written(read, of_harness)
    sources = resolve_adapters(adapters, evaluated_on=cluster)
    labels = [source.label for source in sources]
    label_of = dict(zip(adapters, labels, strict=True))
    other = opponent(against, label_of, judge)
    require_packages(DATA if cluster and not judge else TRAIN)
    place = base_named(base, sources)
    folder = out or home() / "evaluations"
    judging = find_judge(judge, place, folder, progress) if judge else None
    prepared = _prepare(read, place, limit)
    request = evaluation_request(place, sources, prepared, folder)
    answer = _who_answers(cluster, overrides, sent, announce, place, sources)
    by_task, answers = _ask_all(prepared, of_harness, request, answer, limit, progress)
    if judging:
        by_task = judged_tasks(by_task, judging, other)
        answers += judging.asked
    with_runs = _with_runs(by_task, sources)
    report = _report_of(place, with_runs, answers, sources)
    return track(report, sources)


def _ask_all(
    prepared: Sequence[PreparedTask],
    of_harness: Sequence[str],
    request: dict[str, Any],
    answer: AnswersTo,
    limit: int | None,
    progress: EvaluationProgress,
) -> tuple[list[EvaluatedTask], list[AllAnswers]]:
    """The scores of all tasks, and what was answered for them."""
    by_task: list[EvaluatedTask] = []
    answers: list[AllAnswers] = []
    if prepared:
        answered = answer(request, progress)
        by_task += _scored_tasks(prepared, answered)
        answers.append(answered)
    for name in of_harness:
        scored, answered = harness_tasks(request, name, limit, progress)
        by_task += scored
        answers.append(answered)
    return by_task, answers


def _who_answers(
    cluster: str | None,
    overrides: Sequence[str],
    sent: Sent,
    announce: Callable[[Submission], None],
    place: Base,
    sources: Sequence[AdapterSource],
) -> AnswersTo:
    """What has questions answered: a process here, or a job on a cluster."""
    if cluster is None:
        return have_answered
    there = ClusterEvaluation(cluster, overrides, sent, announce, place, sources)
    return there.answers


def _require_own_tasks(of_harness: Sequence[str], cluster: str | None) -> None:
    """Raise InputError for tasks of the harness where they are not asked."""
    if cluster and of_harness:
        raise InputError(f"--cluster: tasks of {HARNESS} are asked on this machine alone; allowed: without --cluster")
    require_harness(of_harness)


def _report_of(
    place: Base, by_task: list[EvaluatedTask], answers: Sequence[AllAnswers], sources: Sequence[AdapterSource]
) -> EvaluationReport:
    """What was found, and what of it was asked only now."""
    asked = sum(answered.asked for answered in answers)
    seconds = sum(answered.seconds for answered in answers)
    base = place.model
    warnings = trained_elsewhere(sources, base)
    warnings += _warnings_of(by_task)
    return EvaluationReport(base, by_task, asked, seconds, warnings)


def base_named(base: str | None, sources: Sequence[AdapterSource]) -> Base:
    """The base that is named, else that of the runs; raises InputError."""
    named: PlainBase = {"model": base} if base else base_of(sources)
    place = Base(model=named["model"], revision=named.get("revision"))
    folder = Path(place.model)
    if folder.is_dir():
        return place.model_copy(update={"model": str(folder.resolve())})
    return place


def require_packages(extra: str) -> None:
    """Raise InputError where what is needed of the packages of an extra is not installed here."""
    missing = []
    for name in _PACKAGES_OF[extra]:
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    if missing:
        packages = ", ".join(missing)
        raise InputError(f"evaluate: needs {packages}; allowed: pip install 'fleetune[{extra}]'")


def _prepare(tasks: Sequence[TaskSpec], place: Base, limit: int | None) -> list[PreparedTask]:
    """The rows of tasks as questions; raises InputError with a line for each task whose data cannot be used."""
    tokenizer, ends = base_tokenizer(place)
    preparation = Preparation(tokenizer, ends)
    prepared: list[PreparedTask] = []
    problems: list[str] = []
    for task in tasks:
        try:
            rows = preparation.prepare(task, limit)
        except ValueError as error:  # a RowError
            problems.append(f"task {task.name}: {line_of(error)}")
            continue
        if rows.rows:
            prepared.append(rows)
        else:
            problems.append(f"task {task.name}: {task.data}: found no row with a prompt; allowed: at least one")
    if problems:
        raise InputError("\n".join(problems))
    return prepared


def _with_runs(tasks: Sequence[EvaluatedTask], sources: Sequence[AdapterSource]) -> list[EvaluatedTask]:
    """The tasks, each result with the run that left its adapter."""
    run_ids = {source.label: source.run_id for source in sources}
    with_runs = []
    for task in tasks:
        results = [task.base]
        for result in task.results[1:]:
            with_run = replace(result, run_id=run_ids[result.label])
            results.append(with_run)
        with_runs.append(replace(task, results=results))
    return with_runs


def _scored_tasks(prepared: Sequence[PreparedTask], answered: AllAnswers) -> list[EvaluatedTask]:
    """The scores of all answers, by task."""
    by_task = []
    for task in prepared:
        results = []
        for sheet in answered.sheets:
            if sheet.task != task.task.name:
                continue
            result = _scored_sheet(task, sheet)
            results.append(result)
        evaluated = EvaluatedTask(task, results)
        by_task.append(evaluated)
    return by_task


def _scored_sheet(task: PreparedTask, sheet: AnsweredSheet) -> TaskResult:
    """What one adapter's answers to a task are worth, or the base's."""
    scores = score_task(task, sheet.file.answers)
    return result_of_sheet(sheet, scores)


def _warnings_of(tasks: Sequence[EvaluatedTask]) -> list[str]:
    """What is to be known of results: who changes nothing, is not whole, or lost too much, and rows without room."""
    of_adapters: dict[str, None] = {}  # each once
    of_tasks: list[str] = []
    for task in tasks:
        for result in task.results:
            if result.left_out > TOLD:
                share = f"{result.left_out:.2%}"
                of_adapters[
                    f"{result.label} is a whole model, of whose difference to the base {share} is left out"
                ] = None
            if result.change == 0:
                of_adapters[f"{result.label} changes nothing: its logits are those of the base"] = None
            count = result.without_room
            if count:
                rows = len(result.scores)
                of_tasks.append(f"task {task.name}: {count} of {rows} rows leave {result.label} no room on the base")
        of_tasks += too_much_lost(task)
    return [*of_adapters, *of_tasks]
