"""SLURM, from one of its login nodes: a submission is a real batch job, which may wait for days and be requeued.

sbatch, squeue and scancel are commands of this machine. A job has the name of its submission, `<run_id>-s<number>`.
By it a job is found again, whatever became of the answer of sbatch. ROOT/slurm/ has the script of each submission,
and what it printed before there was an attempt to write to.
"""

import re
import reprlib
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from clusters.base import (
    Capacity,
    ClusterRequest,
    ClusterStatus,
    Logs,
    Standing,
    SubmissionRefused,
    Unreachable,
    look_at,
    run_of_submission,
    submission_name,
)
from clusters.closing import close_cancelled
from clusters.container import python_in
from clusters.environment import run_settings
from clusters.remote.code import installed_code
from clusters.run_files import joined_logs
from clusters.shared_lock import shared_lock
from clusters.slurm_answers import (
    LAUNCH_FAILED,
    SACCT,
    SINFO,
    SQUEUE,
    QueuedJob,
    capacity_of,
    endings,
    queued_jobs,
    refusal_in,
    start_in,
    taken_job,
    words_of_ending,
)
from clusters.slurm_commands import ask_slurm, call_slurm, printed
from clusters.slurm_jobs import before_any_attempt, is_at_work, is_taken_on, live_jobs, next_submission, way_on
from clusters.slurm_releases import let_go_on, send_back
from clusters.slurm_script import BatchJob, SlurmConfig, batch_script
from clusters.slurm_variables import check_variables, first_on_path
from clusters.slurm_walltime import check_walltime
from runfolder.evaluation_job import AnyJob
from runfolder.site import LocalSite
from runfolder.snapshot import has_ended

_PATH = re.compile(r"/[\w/.,:@+=~-]*")  # what sbatch takes for a path as it is


@dataclass(frozen=True)
class Slurm:
    """The SLURM site of this login node, with run folders in `home`/runs."""

    config: SlurmConfig
    home: Path
    Config: ClassVar[type[SlurmConfig]] = SlurmConfig

    @staticmethod
    def open(config: SlurmConfig, home: Path) -> "Slurm":
        """The site that the clusters file describes."""
        return Slurm(config, home)

    @property
    def site(self) -> LocalSite:
        """The run folders on the file system that nodes and login nodes share."""
        return LocalSite(self.home / "runs")

    @property
    def folder(self) -> Path:
        """Scripts and outputs of submissions."""
        return self.home / "slurm"

    def request(
        self, job: AnyJob, run_id: str, submission: int | None = 1, secrets: tuple[str, ...] = ()
    ) -> ClusterRequest:
        """What would be submitted: the whole batch script. Raises SubmissionRefused."""
        run_dir = self.site.root / run_id
        submission = submission or next_submission(run_dir, self.folder)
        environment = run_settings(self.config.env, job, {})
        environment["FLEETUNE_HOME"] = str(self.home)
        check_variables(environment)
        check_walltime(job, self.config.walltime)
        root = str(self.home)
        if not _PATH.fullmatch(root):
            found = reprlib.repr(root)
            allowed = "an absolute path of letters, digits and _ / . , : @ + = ~ -"
            raise SubmissionRefused(f"root: found {found}; allowed on SLURM: {allowed}")
        python: list[str] = []
        container = self.config.container
        if container:
            python = python_in(container, self.home, job)
            path = environment.get("PYTHONPATH", "")
            environment["PYTHONPATH"] = first_on_path(str(self._code), path)
        name = submission_name(run_id, submission)
        log = self.folder / f"{name}.log"
        batch = BatchJob(name, str(run_dir), str(log), job, environment, python)
        text = batch_script(batch, self.config, sys.executable)
        return ClusterRequest(run_id, submission, str(run_dir), text, secrets)

    def submit(self, request: ClusterRequest) -> None:
        """Queue a batch job, unless the submission has one, or the run goes on.

        Raises Unreachable where it is not known to be queued, and SubmissionRefused where SLURM does not take it.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.config.container:
            installed_code().unpack(self._code)
        run_dir = self.site.root / request.run_id
        name = request.name
        with shared_lock(self.folder / f"{request.run_id}.lock"):
            if is_taken_on(run_dir, name, self._jobs()):
                return
            script = self._script(name)
            job_id = self._sbatch(script, request.text)
            self._note(name).write_text(job_id)

    def status(self, run_ids: Iterable[str]) -> dict[str, ClusterStatus]:
        """The state of each run: its newest submission's, as squeue tells it for all of them at once."""
        wanted = dict.fromkeys(run_ids)
        if not wanted:
            return {}
        live = [job for job in self._jobs() if job.state and job.run_id in wanted]
        with_job = {job.run_id for job in live}
        lost = self._last_endings(run_id for run_id in wanted if run_id not in with_job)
        held = [job for job in live if job.reason == LAUNCH_FAILED]
        headless = [job for job in live if job.has_lost_first_node]
        released = let_go_on(held, self.folder) | send_back(headless)
        statuses = {}
        for run_id in wanted:
            statuses[run_id] = self._status(run_id, live, lost, released)
        return statuses

    def look(self, run_ids: Iterable[str] | None = None, in_full: bool = False) -> dict[str, Standing]:
        """How runs stand, None: all of this site."""
        return look_at(self, run_ids, in_full)

    def logs(self, run_id: str, offset: int = 0) -> Logs:
        """What the run's batch jobs printed, the newest submission's after the others'."""
        logs = self.folder.glob(f"{run_id}-s*.log")
        return joined_logs(logs, offset)

    def cancel(self, run_id: str) -> None:
        """End the run's jobs, and close it here, but where a controller is at work, which does it."""
        run_dir = self.site.root / run_id
        for job in live_jobs(run_id, self._jobs()):
            is_left_alone = job.is_ending or is_at_work(run_dir, job)
            if not is_left_alone:
                ask_slurm(["scancel", job.id])
        left = live_jobs(run_id, self._jobs())  # one may have begun meanwhile
        if not any(is_at_work(run_dir, job) for job in left):
            close_cancelled(run_dir)

    def capacity(self) -> Capacity:
        """GPUs of the partition's nodes that are up, or their cores where they have none."""
        named = self.config.partition
        command = [*SINFO]
        if named:
            command += ["-p", named]
        said = ask_slurm(command)
        if named and not said.strip():
            raise Unreachable(f"SLURM has no partition {named!r} with nodes")
        found = capacity_of(said)
        asked_for = self.config.gpu_type
        if asked_for is not None and found.kind == "gpu":
            return replace(found, gpu=asked_for)
        return found

    def forecast(self, request: ClusterRequest) -> float | None:
        """In how many seconds SLURM would start it; raises SubmissionRefused in its words, where it never would."""
        ran = call_slurm(["sbatch", "--test-only"], request.text)
        if ran.returncode == 0:
            start = start_in(ran.stderr)
            return None if start is None else start - time.time()
        words = refusal_in(ran.stderr, is_test=True)
        if words and not self._script(request.name).exists():  # else SLURM may have it, and take no second one
            raise SubmissionRefused(f"SLURM does not take this job: {words}")
        return None

    def _status(
        self, run_id: str, jobs: list[QueuedJob], lost: Mapping[str, str], released: set[str]
    ) -> ClusterStatus:
        if has_ended(self.site.root / run_id):
            return ClusterStatus("ended")
        if run_id in lost:
            return ClusterStatus("unknown", lost[run_id])
        job = live_jobs(run_id, jobs)[-1]
        if job.reason == LAUNCH_FAILED:
            if job.id in released:
                return ClusterStatus("queued", job.why_queued)
            return ClusterStatus("queued", job.why_held, stuck=True)
        if job.state == "queued":
            return ClusterStatus("queued", job.why_queued, job.is_stuck)
        if job.id in released:
            return ClusterStatus("queued", f"SLURM job {job.id}: its first node is lost; it goes back to the queue")
        reason = f"SLURM job {job.id}"
        if job.is_ending:
            reason += " is at its end"
        return ClusterStatus(job.state or "unknown", reason)

    @property
    def _code(self) -> Path:
        """Fleetune's code for what runs in a container, where it is for the clusters of other machines."""
        digest = installed_code().digest
        return self.home / "code" / digest

    def _sbatch(self, script: Path, text: str) -> str:
        """Have SLURM take a script; gives the job's id. Raises SubmissionRefused where it certainly has not."""
        is_first = not script.exists()  # what SLURM was asked before, it may have taken, or take yet
        script.write_text(text, encoding="utf-8")
        ran = call_slurm(["sbatch", "--parsable", str(script)])
        words = refusal_in(ran.stderr)
        if ran.returncode and words and is_first:
            script.unlink()
            raise SubmissionRefused(f"SLURM does not take this job: {words}")
        return taken_job(printed(ran))

    def _last_endings(self, run_ids: Iterable[str]) -> dict[str, str]:
        """How the newest jobs of runs that have none now ended, as SLURM's accounting has it, in one question.

        What they printed last proves it, where there was no attempt yet; and what to do then.
        """
        newest = self._newest_notes(run_ids)
        job_ids = {}
        for run_id, note in newest.items():
            job_ids[run_id] = note.read_text() if note else ""
        ended = _endings_of(job_ids.values())
        told = {}
        for run_id, job_id in job_ids.items():
            run_dir = self.site.root / run_id
            ending = ended.get(job_id, "")
            words = [words_of_ending(job_id, ended)]
            words += before_any_attempt(run_dir, newest[run_id], ending)
            words.append(way_on(run_dir))
            told[run_id] = "; ".join(words)
        return told

    def _newest_notes(self, run_ids: Iterable[str]) -> dict[str, Path | None]:
        """The note of each run's newest job, which holds its id; None where there is none."""
        notes = sorted(self.folder.glob("*.job"), key=lambda note: note.stat().st_mtime)
        newest: dict[str, Path | None] = dict.fromkeys(run_ids)
        for note in notes:
            run_id = run_of_submission(note.stem)
            if run_id in newest:
                newest[run_id] = note
        return newest

    def _jobs(self) -> list[QueuedJob]:
        """This user's jobs that SLURM knows of, those that ended lately too."""
        return queued_jobs(ask_slurm(SQUEUE))

    def _script(self, name: str) -> Path:
        """Where a submission's script is written down, before SLURM is asked to take it."""
        return self.folder / f"{name}.sh"

    def _note(self, name: str) -> Path:
        """Where the id of a submission's newest job is written down, once it is known."""
        return self.folder / f"{name}.job"


def _endings_of(job_ids: Iterable[str]) -> dict[str, str]:
    """How jobs ended, by SLURM's accounting, or by the file that a site without one may keep (`--completion`)."""
    ended: dict[str, str] = {}
    for source in ([], ["--completion"]):
        unknown = set(job_ids) - {"", *ended}
        if not unknown:
            break
        joined = ",".join(sorted(unknown))
        answer = call_slurm([*SACCT, *source, "-j", joined])
        if answer.returncode == 0:
            ended |= endings(answer.stdout)
    return ended
