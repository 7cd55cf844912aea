"""An attempt at a stage that writes: what its worker does.

Answers are kept in attempts/N/answers as they come, and a checkpoint is a copy of them. Those of earlier attempts,
and those that other runs have left on this cluster, are gone on with, so nothing is asked again. A step is an answer.
What comes of it is output/rows.jsonl.
"""

import json
import shutil
import time
from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.evaluation.attempt import EvaluationStopped, EvaluationWork, leave_answers
from orchestrator.generation.asked import AskedBase
from orchestrator.generation.principles import principles_of
from orchestrator.generation.written import WrittenRow, check_columns, is_match, read_written
from runfolder.chain import Attempt, attempts
from runfolder.digests import changes, frozen_digests
from runfolder.draws import Principle
from runfolder.files import sync_folder
from runfolder.folders import home
from runfolder.generation_job import ROWS_FILE, GenerationJob, JudgedColumns, MadeColumn, MatchColumn
from runfolder.record import load_any_job
from serving.kept import AnswersFile, merge_answers
from trainer.checkpoint.lineage import checkpoint_folder

_CROWD = 1.96  # standard errors of a share, which its 95 % interval has on each side


def generate_attempt(run_dir: Path, number: int) -> bool:
    """Write the columns of a run's rows, as an attempt that is claimed, to attempts/N/output.

    False where it was asked to stop before, and has saved. Raises InputError.
    """
    attempt = Attempt(run_dir, number)
    job = load_any_job(run_dir)
    assert isinstance(job, GenerationJob)
    frozen = frozen_digests(run_dir)
    changed = changes(job, frozen)
    if changed:
        lines = "\n".join(changed)
        raise InputError(lines)
    principles = principles_of(job)
    rows = read_written(job.generate.rows)
    check_columns(job.generate, rows, principles)
    kept = attempt.folder / "answers"
    work = EvaluationWork(attempt, kept, _most_answers(job, rows))
    attempt.event("plan", steps=work.steps)
    shared = home() / "evaluations"
    _go_on_with(attempt, kept, shared, job)
    try:
        written = WritingStage(attempt, job, principles, rows, work).all_columns()
    except EvaluationStopped:
        work.save()
        leave_answers(kept, shared)
        attempt.event("stopped", step=work.done)
        return False
    leave_answers(kept, shared)
    _leave_rows(attempt, written)
    return True


class WritingStage:
    """The columns of a stage, made one after another."""

    def __init__(
        self,
        attempt: Attempt,
        job: GenerationJob,
        principles: list[Principle],
        rows: list[WrittenRow],
        work: EvaluationWork,
    ) -> None:
        self._attempt = attempt
        self._job = job
        self._rows = rows
        self._work = work
        self._base = AskedBase(job, principles, frozen_digests(attempt.run_dir).get("base"))
        self._asked = 0  # in the columns that are done
        self._measured: dict[str, float] = {}

    def all_columns(self) -> list[WrittenRow]:
        """The rows with all columns; raises EvaluationStopped where it is to stop before."""
        for name, column in self._job.generate.columns.items():
            if isinstance(column, MatchColumn):
                for row in self._rows:
                    row[name] = is_match(column.matches, row[column.column])
                found = [row[name] for row in self._rows]
                self._measure(name, found)
            else:
                self._ask_for(name, column)
        self._report()
        return self._rows

    def _ask_for(self, name: str, column: MadeColumn) -> None:
        """Have the base answer, or judge, for each row."""
        file = self._base.file(self._work.kept, name)
        if isinstance(column, JudgedColumns):
            self._judge(name, column, file)
            return
        assert not isinstance(column, MatchColumn)
        self._base.write(name, column, self._rows, file, self._note)
        self._asked += len(self._rows)

    def _judge(self, name: str, column: JudgedColumns, file: AnswersFile) -> None:
        """Have the base judge each row; those of which it is not sure enough are left out."""
        rows = _different(self._rows, column)
        self._base.judge(column, rows, file, self._note)
        self._asked += 2 * len(rows)
        self._rows = _sure(rows, column)
        are_first: list[bool] = []
        for row in self._rows:
            p_first = row["p_first"]
            are_first.append(p_first >= 1 / 2)
        self._measure(f"{name}_first", are_first)

    def _note(self, done: int) -> None:
        """Note how many answers there are, of which `done` are in the column that is being asked for."""
        work = self._work
        answers = self._asked + done
        work.note(answers, work.steps)

    def _measure(self, name: str, values: list[int] | list[bool]) -> None:
        """Note the share of rows of which something is true, and half of the width of its 95 % interval."""
        count = max(1, len(values))
        share = sum(values) / count
        of_one = share * (1 - share)
        variance = of_one / count
        margin = _CROWD * variance**0.5
        self._measured[f"{name}_share"] = share
        self._measured[f"{name}_share_margin"] = margin

    def _report(self) -> None:
        """Say in the last row what was measured."""
        steps = self._work.steps
        self._work.done = steps
        record = {
            "step": steps,
            "time": time.time(),
            "rows_written": len(self._rows),
            **self._measured,
        }
        self._attempt.append("metrics.jsonl", record)


def _most_answers(job: GenerationJob, rows: list[WrittenRow]) -> int:
    """How many answers there are at most: one for each row and column, two where two are judged in both orders."""
    answers = 0
    for column in job.generate.columns.values():
        if isinstance(column, JudgedColumns):
            answers += 2 * len(rows)
        elif not isinstance(column, MatchColumn):
            answers += len(rows)
    return answers


def _different(rows: list[WrittenRow], column: JudgedColumns) -> list[WrittenRow]:
    """The rows with two texts of which one can be better; raises InputError where there is none."""
    different = []
    for row in rows:
        first = row[column.first]
        second = row[column.second]
        if first and second and first != second:
            different.append(row)
    if not different:
        raise InputError(f"judge: {column.first} and {column.second} are equal, or one is empty, in all rows")
    return different


def _sure(rows: list[WrittenRow], column: JudgedColumns) -> list[WrittenRow]:
    """The rows of which the judge is sure enough; raises InputError where there is none."""
    sure = []
    for row in rows:
        distance = abs(row["p_first"] - 1 / 2)
        if distance >= column.margin:
            sure.append(row)
    if not sure:
        raise InputError(
            f"judge: no row has a p_first that is {column.margin} away from 0.5; allowed: a lower margin"
        )
    return sure


def _go_on_with(attempt: Attempt, kept: Path, shared: Path, job: GenerationJob) -> None:
    """Take over the answers that earlier attempts, and other runs of the same stage, have left."""
    sources = [shared]
    if attempt.start is not None:
        sources.append(checkpoint_folder(attempt, attempt.start.step))
    for earlier in attempts(attempt.run_dir):
        if earlier.number < attempt.number:
            answers = earlier.folder / "answers"
            sources.append(answers)
    for source in sources:
        for path in source.glob(f"*/{job.name}.*/base.jsonl"):
            place = path.relative_to(source)
            merge_answers(path, kept / place)


def _leave_rows(attempt: Attempt, rows: list[WrittenRow]) -> None:
    """Write attempts/N/output, whole or not at all."""
    unfinished = attempt.folder / "output.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    path = unfinished / ROWS_FILE
    with path.open("w") as stream:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=str)
            stream.write(f"{line}\n")
    attempt.check()
    unfinished.rename(attempt.folder / "output")
    sync_folder(attempt.folder)
