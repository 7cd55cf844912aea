"""Submission: a frozen job becomes a run folder, made once, and a request to a cluster.

A client may be killed at any point and the submission repeated: with the same run id, or as the same command
(begun.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from clusters.base import (
    CapacityNotTold,
    Cluster,
    ClusterRequest,
    SubmissionRefused,
    SubmittedOtherwise,
    Unreachable,
)
from clusters.environment import secret_values
from clusters.remote.far_side import FarFileError
from clusters.remote.machine import EnvironmentMissing
from orchestrator.backends import expected_start, make_request, open_cluster, open_to_submit
from orchestrator.begun import id_of_begun, identity_of
from orchestrator.choice import cluster_names, on_chosen_cluster, planned_cluster
from orchestrator.clusters_file import default_cluster
from orchestrator.control import withdrawn
from orchestrator.errors import InputError, JobRefused, RunEnded
from orchestrator.planning.freeze import JobSource, Sent, frozen_training, read_job
from orchestrator.planning.place import UNTOLD
from orchestrator.planning.preflight import Findings, check_job
from orchestrator.planning.survey import SourceProgress
from orchestrator.runs import RUN_ID, name_of, new_id, remember, remembered_cluster
from orchestrator.stages.spec import read_staged
from orchestrator.stages.submitted import check_stages, frozen_stages
from orchestrator.tracking.password import secrets_of
from runfolder.evaluation_job import AnyJob
from runfolder.job import Job
from runfolder.site import Refused, Site
from runfolder.snapshot import ASKED_TO_END
from runfolder.staged_job import StagedJob


@dataclass(frozen=True)
class Submission:
    """What was submitted. `adopted`: an earlier submission of the same run was found and gone on with.

    `why`: why this cluster was chosen, where there was a choice.
    """

    run_id: str
    run_dir: Path
    cluster: str
    adopted: bool
    warnings: tuple[str, ...]
    why: str | None = None


class _NotKnown(Unreachable):
    """A submission of which nobody knows whether it came through."""


@contextmanager
def clear_ending() -> Iterator[None]:
    """Have what goes wrong say whether there is a submission: there is none by this try, or nobody knows."""
    again = "the same command again is safe, and makes one run"
    try:
        yield
    except Refused as error:
        raise InputError(f"{error}; nothing was submitted") from None
    except EnvironmentMissing:
        raise  # who is asked to install it may do so, and submit then
    except _NotKnown as error:
        raise Unreachable(f"{error}\nwhether it was submitted is not known; {again}") from None
    except FarFileError as error:
        raise FarFileError(f"{error}\n{again}") from None
    except Unreachable as error:
        raise Unreachable(f"{error}\nthis try has submitted nothing; {again}") from None


@clear_ending()
def submit(
    source: JobSource,
    *,
    cluster: str | None = None,
    overrides: Iterable[str] = (),
    run_id: str | None = None,
    pause_at: int | None = None,
    progress: SourceProgress = lambda _source, _rows: None,
    sent: Sent = lambda _file, _bytes, _total: None,
    announce: Callable[[Submission], None] = lambda _: None,
) -> Submission:
    """Check a job and hand it to a cluster; raises InputError (nothing was started) or Unreachable (repeat it).

    `pause_at`: the step after which the run is to pause, asked before anything of it starts.

    Of several clusters, `a,b`, the one that would start it first gets it.
    `progress` is called with a data source and the number of its rows that are looked at; `sent` with a file or base
    that goes to another machine, the bytes of it that are there, and their number. `announce` is called while a
    repetition still finds this submission: print the run id there.
    """
    names = cluster_names(cluster or default_cluster())
    staged = read_staged(source, overrides)
    job, folder = staged or read_job(source, overrides)
    submit_to = partial(
        _submit_to,
        job,
        folder,
        run_id=run_id,
        pause_at=pause_at,
        progress=progress,
        sent=sent,
        announce=announce,
    )
    if len(names) == 1:
        return submit_to(names[0], why=None)
    if isinstance(job, StagedJob):
        raise InputError(f"--cluster: found {cluster}; allowed for a job of stages: one cluster")
    return on_chosen_cluster(names, job, run_id, lambda choice: submit_to(choice.cluster, why=choice.why))


def _submit_to(
    job: Job | StagedJob,
    folder: Path,
    cluster: str,
    *,
    why: str | None,
    run_id: str | None,
    pause_at: int | None,
    progress: SourceProgress,
    sent: Sent,
    announce: Callable[[Submission], None],
) -> Submission:
    """Check a job, whose paths are meant from a folder, and hand it to one cluster."""
    backend = open_to_submit(cluster)
    site = backend.site
    check = partial(_checked, cluster=backend, progress=progress)
    job_there: Job | StagedJob
    if isinstance(job, StagedJob):
        models, warnings = check_stages(job, site.is_here, check)
        job_there, frozen = frozen_stages(job, models, folder, cluster, backend, sent)
    else:
        checked = check(job)
        warnings = checked.warnings
        make_request(backend, job, new_id(job.name))  # what can never be served is refused before files are sent
        job_there, frozen = frozen_training(job, checked.model, folder, cluster, site, sent)
    described = partial(Submission, cluster=cluster, warnings=warnings, why=why)
    return submit_frozen(
        backend,
        job_there,
        frozen,
        described,
        run_id=run_id,
        pause_at=pause_at,
        announce=announce,
    )


def submit_frozen(
    backend: Cluster,
    job: AnyJob,
    frozen: Mapping[str, Any],
    described: Callable[..., Submission],
    *,
    run_id: str | None,
    pause_at: int | None = None,
    announce: Callable[[Submission], None],
) -> Submission:
    """Hand a job with its frozen record to its cluster, once; `described` makes the submission of what came of it.

    Raises RunEnded where the run of that id has ended otherwise than well.
    """
    with _chosen_id(job, frozen, run_id) as chosen_id:
        request = make_request(backend, job, chosen_id)
        expected_start(backend, request)  # where the cluster would never start it, nothing is made
        remember(chosen_id, frozen["cluster"])
        adopted = _create_or_adopt(backend.site, chosen_id, frozen)
        if pause_at is not None:
            _ask_pause(backend.site, chosen_id, pause_at)
        backend.site.write_secrets(chosen_id, secret_values(request.secrets) | secrets_of(job))
        try:
            _hand_over(backend, request, adopted)
        except (FarFileError, EnvironmentMissing):
            raise
        except Unreachable as error:
            raise _NotKnown(str(error)) from None
        submission = described(run_id=chosen_id, run_dir=Path(request.run_dir), adopted=adopted)
        announce(submission)
    return submission


def dry_run(
    source: JobSource,
    *,
    cluster: str | None = None,
    overrides: Iterable[str] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> str:
    """Check a job and give what would be submitted; nothing is made. Raises InputError.

    `warn` is called with each warning.
    """
    names = cluster_names(cluster or default_cluster())
    staged = read_staged(source, overrides)
    job, _ = staged or read_job(source, overrides)
    name = names[0]
    if len(names) > 1 and isinstance(job, Job):
        choice = planned_cluster(names, job)
        name = choice.cluster
        warn(f"cluster {name} would get it now ({choice.why})")
    backend = open_cluster(name)
    check = partial(_checked, cluster=backend, progress=lambda _source, _rows: None)
    if isinstance(job, StagedJob):
        _, warnings = check_stages(job, backend.site.is_here, check)
    else:
        warnings = check(job).warnings
    for warning in warnings:
        warn(warning)
    return make_request(backend, job, new_id(job.name)).text


def _checked(job: Job, cluster: Cluster, progress: SourceProgress) -> Findings:
    """What the checks of a job found, for the place where it will run."""
    if cluster.site.is_here:
        return check_job(job, progress)
    unknown: tuple[str, ...] = ()
    try:
        capacity = cluster.capacity()
    except CapacityNotTold as error:
        capacity = UNTOLD
        unknown = (f"resources: whether the job fits is not known ({error})",)
    found = check_job(job, progress, capacity, is_here=False)
    return replace(found, warnings=found.warnings + unknown)


def _chosen_id(job: AnyJob, frozen: Mapping[str, Any], run_id: str | None) -> AbstractContextManager[str]:
    """The run id of a submission: the one that somebody gave it, or one that is kept for repetitions."""
    if run_id is None:
        return id_of_begun(identity_of(frozen), job.name)
    if not RUN_ID.fullmatch(run_id) or name_of(run_id) != job.name:
        raise InputError(f"--run-id: found {run_id!r}; allowed: {job.name}-<10 characters>, like {new_id(job.name)}")
    cluster = remembered_cluster(run_id) or frozen["cluster"]
    if cluster != frozen["cluster"]:
        raise InputError(
            f"--run-id: {run_id} is on cluster {cluster}; allowed: --cluster {cluster}, or another run id"
        )
    return nullcontext(run_id)


def _hand_over(cluster: Cluster, request: ClusterRequest, adopted: bool) -> None:
    """Submit a request; raises InputError where the cluster does not take it, and closes a run that was made for it.

    Raises Unreachable, too, where an earlier submission has no job any more: only who knows why can let it go on.
    """
    run_id = request.run_id
    try:
        cluster.submit(request)
    except SubmittedOtherwise as error:
        raise InputError(str(error)) from None
    except SubmissionRefused as error:
        raise JobRefused(str(error)) if adopted else withdrawn(cluster, run_id, str(error)) from None
    except Unreachable as error:
        if not adopted:
            raise
        raise Unreachable(f"{error}\nrun {run_id} waits for it; give it up: fleetune cancel {run_id}") from None
    if adopted:
        status = cluster.status([run_id])[run_id]
        if status.state == "unknown":
            raise Unreachable(f"run {run_id}: {status.reason}")


def _ask_pause(site: Site, run_id: str, step: int) -> None:
    """Have a run of which nothing has begun pause after a step; one that has begun was asked before that."""
    found = site.snapshots([run_id])[run_id]
    if found.attempt == 0:
        site.ask(run_id, "pause", step)


def _create_or_adopt(site: Site, run_id: str, frozen: Mapping[str, Any]) -> bool:
    """Make the run folder whole or not at all; gives whether the same one was there already."""
    earlier = site.create(run_id, frozen)
    if earlier is None:
        return False
    if identity_of(earlier) != identity_of(frozen):
        raise InputError(f"--run-id: {run_id} is taken by another job")
    found = site.snapshots([run_id])[run_id]
    state = (found.result or {}).get("state")
    if found.asked == ASKED_TO_END or state == "cancelled":
        ending = "is cancelled"
    elif state == "failed":
        ending = "has failed"
    else:
        return True
    raise RunEnded(f"run {run_id}: it {ending}; go on with it: fleetune resume {run_id}; or submit it anew")
