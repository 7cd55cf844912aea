"""An attempt at a run that evaluates: what its worker does, on a cluster as on this machine.

The answers are written in attempts/N/answers, and a checkpoint is a copy of them, so what an attempt leaves is never
asked again. A step is a question that is answered. What comes of it is output/answers.json, and beside it the files.
Files that earlier evaluations on this cluster have left in FLEETUNE_HOME/evaluations are gone on with, too.
"""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.evaluation.delivered import ANSWERS_FILE
from orchestrator.evaluation.process import AllAnswers, have_answered
from runfolder.chain import Attempt
from runfolder.evaluation_job import EvaluationJob
from runfolder.files import Record, read_json, refresh, sha256, sync_folder, write_json
from runfolder.folders import home
from runfolder.record import load_any_job
from runfolder.requests import pause_due, stop_requested
from serving.kept import merge_answers
from serving.question import AskedTask
from trainer.checkpoint.lineage import checkpoint_folder, remove_checkpoint, unused, write_manifest

SAVE_EVERY_S = 30.0


class EvaluationStopped(Exception):
    """The attempt leaves its work, as it was asked to, for another one that goes on."""


def evaluate_attempt(run_dir: Path, number: int) -> bool:
    """Answer what a run asks, from the start checkpoint of an attempt that is claimed to attempts/N/output.

    False where it was asked to stop before, and has saved. Raises InputError for an adapter that cannot be evaluated.
    """
    attempt = Attempt(run_dir, number)
    job = load_any_job(run_dir)
    assert isinstance(job, EvaluationJob)
    asked = read_json(Path(job.questions))
    tasks = list(map(AskedTask.load, asked["tasks"]))
    kept = attempt.folder / "answers"
    go_on_with(attempt, kept, tasks)
    work = EvaluationWork(attempt, kept, questions_of(job, tasks))
    attempt.event("plan", steps=work.steps)
    attempt.event("asking")
    shared = home() / "evaluations"
    try:
        answered = have_answered(request_of(job, asked, kept), work.note)
    except EvaluationStopped:
        work.save()
        leave_answers(kept, shared)
        attempt.event("stopped", step=work.done)
        return False
    work.count(work.steps)
    leave_answers(kept, shared)
    deliver(attempt, kept, answered)
    return True


def questions_of(job: EvaluationJob, tasks: Iterable[AskedTask]) -> int:
    """How many answers a run is to give: each question once to the base and to each adapter."""
    different = 0
    for task in tasks:
        keys = {question.key for question in task.questions}
        different += len(keys)
    candidates = len(job.adapters) + 1
    return different * candidates


def request_of(job: EvaluationJob, asked: Record, kept: Path) -> Record:
    """What the evaluating process is asked."""
    adapters = []
    for name, folder in job.adapters.items():
        adapter = {"name": name, "folder": folder}
        adapters.append(adapter)
    return {
        "base": job.base.model,
        "revision": job.base.revision,
        "base_digest": asked["base_digest"],
        "adapters": adapters,
        "out": str(kept),
        "tasks": asked["tasks"],
    }


def go_on_with(attempt: Attempt, kept: Path, tasks: Iterable[AskedTask]) -> None:
    """Take over the answers that the attempt starts from, and those to these tasks that other runs have left."""
    sources = []
    if attempt.start is not None:
        sources.append(checkpoint_folder(attempt, attempt.start.step))
    sources.append(home() / "evaluations")
    for source in sources:
        for task in tasks:
            for path in source.glob(f"*/{task.folder_name}/*.jsonl"):
                merge_answers(path, kept / path.relative_to(source))


def leave_answers(kept: Path, shared: Path) -> None:
    """Let later evaluations on this cluster go on with the answers."""
    for path in kept.rglob("*.jsonl"):
        merge_answers(path, shared / path.relative_to(kept))


def deliver(attempt: Attempt, kept: Path, answered: AllAnswers) -> None:
    """Write attempts/N/output, whole or not at all: the answers that were asked for, and what they are."""
    unfinished = attempt.folder / "output.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    sheets = []
    for sheet in answered.sheets:
        place = sheet.path.relative_to(kept)
        target = unfinished / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sheet.path, target)
        plain = {
            "file": place.as_posix(),
            "task": sheet.task,
            "adapter": sheet.adapter,
            "digest": sheet.digest,
            "change": sheet.change,
            "left_out": sheet.left_out,
        }
        sheets.append(plain)
    write_json(unfinished / ANSWERS_FILE, {"sheets": sheets, "asked": answered.asked, "seconds": answered.seconds})
    unfinished.rename(attempt.folder / "output")
    sync_folder(attempt.folder)


class EvaluationWork:
    """How far an attempt has come, as it is noted in its folder."""

    def __init__(self, attempt: Attempt, kept: Path, steps: int) -> None:
        """`steps` answers are to be given, which come into the folder `kept`."""
        self.attempt = attempt
        self.kept = kept
        self.steps = steps
        self.done = attempt.start.step if attempt.start else 0
        self._saved = self.done
        self._saved_at = time.monotonic()

    def note(self, done: int, total: int) -> None:
        """Note that so many questions of those that were missing are answered; raises EvaluationStopped.

        What is noted is written already.
        """
        self.count(self.steps - total + done)
        if self._must_stop():
            raise EvaluationStopped
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def count(self, done: int) -> None:
        """Note that so many questions are answered."""
        self.done = done
        now = time.time()
        self.attempt.append("metrics.jsonl", {"step": done, "time": now, "answered": done})
        answered = f"{done:,} of {self.steps:,}"
        print(f"{answered} questions answered", flush=True)

    def save(self) -> None:
        """Make a checkpoint of the answers; raises Fenced where the attempt has a successor."""
        self._saved_at = time.monotonic()
        if self.done == self._saved:
            return
        attempt = self.attempt
        folder = checkpoint_folder(attempt, self.done)
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Any] = {}
        for path in self.kept.rglob("*.jsonl"):
            place = path.relative_to(self.kept)
            copy = folder / place
            merge_answers(path, copy)
            files[place.as_posix()] = {"sha256": sha256(copy), "bytes": copy.stat().st_size}
        for inner in folder.rglob("*"):
            if inner.is_dir():
                sync_folder(inner)
        attempt.check()
        attempt.sync("metrics.jsonl")
        write_manifest(folder, {"step": self.done, "files": files})
        attempt.event("checkpoint", step=self.done)
        self._saved = self.done
        for other in unused(attempt):
            if other != folder:
                attempt.check()
                remove_checkpoint(other)

    def _must_stop(self) -> bool:
        """Whether the attempt was asked to save and end."""
        attempt = self.attempt
        refresh(attempt.folder)  # the controller may be on another host
        pause = pause_due(attempt)
        is_due = pause is not None and pause <= self.done < self.steps
        return is_due or stop_requested(attempt) is not None
