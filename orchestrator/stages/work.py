"""The work of the controller on a job of stages: one stage after another, each as a run of its own.

What there is to do next is told by the folders of the stages alone, so it may be killed at any point.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.planning.freeze import frozen_of
from orchestrator.runs import new_id
from orchestrator.verdict import Verdict
from runfolder.chain import close, result
from runfolder.files import Record, list_names
from runfolder.outcome import final_word
from runfolder.record import create_run_folder, read_record
from runfolder.requests import cancel_requested, cancel_saves, request_cancel, why_cancelled
from runfolder.secrets import read_secrets, write_secrets
from runfolder.stage_key import key_of_stage, stage_digests, stage_job
from runfolder.staged_job import StagedJob
from runfolder.stages import StageNote, note_done, note_stage, noted_stage, stage_done

_PASSED_ON_S = 1.0
AdvanceStage = Callable[[Path], int | None]  # brings the run of a stage further; gives what `next_of_stages` does


def next_of_stages(
    run_dir: Path,
    staged: StagedJob,
    advance: AdvanceStage,
) -> int | None:
    """Bring stages further by `advance`, until all are done or one has ended otherwise; then close the run.

    Gives the exit code where a stage is to be gone on with by another controller, None where the run is closed.
    """
    folders: dict[str, Path] = {}
    for stage in staged.stages:
        is_begun = noted_stage(run_dir, stage) is not None
        if not is_begun and cancel_requested(run_dir):
            close(run_dir, _cancelled(run_dir))
            return None
        folder = _begun_stage(run_dir, staged, stage, folders)
        folders[stage] = folder
        with PassOn(run_dir, folder):
            code = advance(folder)
        ended = result(folder)
        if ended is None:
            return code if code is not None else 1
        if ended["state"] != "succeeded":
            close(run_dir, _as_stage_ended(stage, ended))
            return None
        _note_success(run_dir, stage)
    close(run_dir, _all_done(run_dir, staged))
    return None


def _begun_stage(
    run_dir: Path,
    staged: StagedJob,
    stage: str,
    folders: dict[str, Path],
) -> Path:
    """The run folder of a stage, which is made where there is none; `folders` are those of earlier stages."""
    runs = run_dir.parent
    record = read_record(run_dir)
    job = stage_job(staged, stage, folders)
    of_inputs = stage_digests(staged, stage, record, job)
    note = noted_stage(run_dir, stage)
    if note is None:
        key = key_of_stage(job, of_inputs)
        done = stage_done(runs, key)
        run_id = done or new_id(job.name)
        reused = done is not None
        wanted = StageNote(run_id, key, reused)
        note = note_stage(run_dir, stage, wanted)
    folder = runs / note.run_id
    if not note.reused:
        git = record.get("git")
        frozen = frozen_of(job, record["cluster"], of_inputs, git)
        frozen["run_id"] = note.run_id
        frozen["secrets"] = record.get("secrets", [])
        frozen["stage_of"] = run_dir.name
        create_run_folder(folder, frozen)
        if result(folder) is None:
            secrets = read_secrets(run_dir)
            write_secrets(folder, secrets)
    return folder


def _note_success(run_dir: Path, stage: str) -> None:
    """Let other jobs do without a stage that this one has done."""
    runs = run_dir.parent
    note = noted_stage(run_dir, stage)
    if note is None or note.reused:
        return
    files = list_names(runs / note.run_id)
    if "output" in files:
        note_done(runs, note)


class PassOn(threading.Thread):
    """Passes on to a stage what is asked of its job, as long as the stage is worked on."""

    def __init__(self, run_dir: Path, stage_dir: Path) -> None:
        super().__init__(daemon=True)
        self._run_dir = run_dir
        self._stage_dir = stage_dir
        self._ended = threading.Event()

    def __enter__(self) -> "PassOn":
        pass_on(self._run_dir, self._stage_dir)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Look once a second, until the stage is not worked on any more."""
        while not self._ended.wait(_PASSED_ON_S):
            with suppress(OSError):  # of a file system that is away for a moment
                pass_on(self._run_dir, self._stage_dir)


def pass_on(run_dir: Path, stage_dir: Path) -> None:
    """Ask a stage to end as its job is asked to, once."""
    if not cancel_requested(run_dir) or result(stage_dir) is not None:
        return
    saves = cancel_saves(run_dir)
    if cancel_requested(stage_dir) and cancel_saves(stage_dir) == saves:
        return
    why = why_cancelled(run_dir)
    request_cancel(stage_dir, saves, why)


def _cancelled(run_dir: Path) -> Record:
    """The final word on a job that was cancelled between two stages."""
    why = why_cancelled(run_dir)
    verdict = Verdict("cancelled", "").dump()
    return final_word("cancelled", why, verdict, 0)


def _as_stage_ended(stage: str, ended: Record) -> Record:
    """The final word on a job one of whose stages has failed or was cancelled."""
    why = ended.get("reason") or ended["state"]
    reason = f"stage {stage}: {why}"
    return {**ended, "reason": reason}


def _all_done(run_dir: Path, staged: StagedJob) -> Record:
    """The final word on a job all of whose stages are done."""
    reused = []
    for stage in staged.stages:
        note = noted_stage(run_dir, stage)
        if note is not None and note.reused:
            reused.append(stage)
    names = ", ".join(reused)
    reason = f"done before: {names}" if reused else ""
    verdict = Verdict("success", "").dump()
    final = final_word("succeeded", reason, verdict, 0)
    return {**final, "output_dir": None}  # each stage has its own
