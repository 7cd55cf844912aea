"""Ending a run, and letting one go on."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clusters.base import Cluster, SubmissionRefused, SubmittedOtherwise, Unreachable
from clusters.environment import secret_values
from orchestrator.backends import expected_start, make_request
from orchestrator.errors import InputError, RunRefused
from orchestrator.planning.spec import load_yaml
from orchestrator.runs import Handle, at_stage, find
from orchestrator.tracking.password import TRACKING_URI
from runfolder.files import Record
from runfolder.record import job_in
from runfolder.site import Ask, Refused


def cancel(reference: str, save: bool = False, cluster: str | None = None) -> str:
    """Ask for the end of a run, with `save` after a checkpoint, and give its id.

    Raises InputError when it has ended otherwise.
    """
    run = find(reference, cluster)
    ending: Ask = "cancel_saved" if save else "cancel"
    result = _ask(run, ending)
    if result is None:
        run.cluster.cancel(run.run_id)
    return run.run_id


def pause(reference: str, step: int | None = None, cluster: str | None = None) -> str:
    """Have a run save and end after a step, None: after the one that it is at, and give its id; `resume` goes on.

    Raises InputError for a run that has ended.
    """
    run = find(reference, cluster)
    if _ask(run, "pause", step) is not None:
        raise InputError(f"run {run.run_id}: it has ended already")
    return run.run_id


def resume(reference: str, cluster: str | None = None, pause_at: int | None = None) -> str:
    """Let a run that has no success go on from its newest checkpoint, and give its id; repeat it safely.

    `pause_at`: the step after which it is to pause again, asked before anything of it starts.

    Raises InputError for a run that has succeeded, or whose data or base are not those of its submission any more.
    """
    run = find(reference, cluster)
    backend = run.cluster
    record = run.site.record(run.run_id)
    job = job_in(record, f"run {run.run_id}: job.yaml")
    request = make_request(backend, job, run.run_id, submission=None)
    expected_start(backend, request)  # where the cluster would never start it, the run stays as it is
    renewed = _renewed_secrets(run, record.get("secrets", []), request.secrets)
    ended = _ask(run, "reopen")
    if pause_at is not None:
        _ask(run, "pause", pause_at)
    run.site.write_secrets(run.run_id, renewed)
    try:
        backend.submit(request)
    except SubmittedOtherwise as error:
        raise InputError(str(error)) from None
    except SubmissionRefused as error:
        raise withdrawn(backend, run.run_id, str(error)) if ended else InputError(str(error)) from None
    return run.run_id


def _renewed_secrets(run: Handle, of_the_job: Iterable[str], of_the_shell: Iterable[str]) -> dict[str, str]:
    """The secrets of this shell that a resumed run gets: those that its job does not have, or that it has no more.

    Raises InputError where the run lacks a variable that its job had.
    """
    kept = run.site.kept_secrets(run.run_id)
    removed = [name for name in of_the_job if name not in kept and name != TRACKING_URI]
    given = secret_values(removed)
    missing = [name for name in removed if name not in given]
    if missing:
        names = ", ".join(missing)
        raise InputError(
            f"run {run.run_id}: {names} was removed when it ended; set it in this shell, and resume again"
        )
    others = secret_values(name for name in of_the_shell if name not in of_the_job)
    return given | others


def withdrawn(cluster: Cluster, run_id: str, why: str) -> RunRefused:
    """Close a run that its cluster does not take, as cancelled; gives the error that says so.

    Raises Unreachable where that is not known to be done: what is repeated then does it.
    """
    try:
        cluster.site.ask(run_id, "cancel", why=why)
        cluster.cancel(run_id)
    except Unreachable as error:
        raise Unreachable(f"{why}; whether {run_id} is closed is not known: {error}") from None
    return RunRefused(f"{why}; {run_id} is cancelled")


def fetch(reference: str, to: Path | None = None, cluster: str | None = None) -> Path:
    """Bring the output of a run, its result and its job into a folder, by default one of its id; gives the folder.

    Of a job of stages it is that of the newest one.

    Raises InputError where there is no such run, or nothing of it yet. What is there and whole already is not brought
    again; another fetch into the folder is waited for.
    """
    run = at_stage(find(reference, cluster))
    run_id = run.run_id
    snapshots = run.site.snapshots([run_id])
    folder = snapshots.get(run_id)
    if folder is None:
        raise InputError(f"run {run_id}: its folder is not there any more")
    goes_on = folder.damaged is None and folder.result is None
    if goes_on and not folder.has_output:
        raise InputError(f"run {run_id}: it has not ended, and has no output yet; fleetune status {run_id}")
    target = to or Path(run_id)
    with _run_refused(), _alone_in(target):
        _check_owner(target, run_id)
        return run.site.fetch(run_id, target)


def _check_owner(folder: Path, run_id: str) -> None:
    """Raise InputError for a folder into which another run was fetched."""
    path = folder / "job.yaml"
    if not path.exists():
        return
    owner = load_yaml(path).get("run_id", run_id)
    if owner != run_id:
        raise InputError(f"{folder}: run {owner} was fetched into it; allowed: another folder, with --to")


def _ask(run: Handle, what: Ask, step: int | None = None) -> Record | None:
    """Ask something of a run; gives the result that it had. Raises InputError."""
    with _run_refused():
        return run.site.ask(run.run_id, what, step)


@contextmanager
def _run_refused() -> Iterator[None]:
    """Within it, what a run cannot do is an error of the input."""
    try:
        yield
    except Refused as error:
        raise InputError(str(error)) from None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within it, no other fetch brings files into a folder, as far as its file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
