"""What a cluster is: a place that turns requests into running controllers, and says what became of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from runfolder.evaluation_job import AnyJob
from runfolder.site import Site
from runfolder.snapshot import Snapshot

ClusterState = Literal["queued", "starting", "running", "ended", "unknown"]


class Unreachable(RuntimeError):
    """The cluster cannot be reached, or is not there; repeating the command later is safe."""


class SubmissionRefused(ValueError):
    """A request that this cluster can never serve: one line with field, what was found, what is allowed."""


class SubmittedOtherwise(SubmissionRefused):
    """A submission that the cluster has already, and as something else; the run is that one's."""


def submission_name(run_id: str, submission: int) -> str:
    """The name that makes a submission unique: `<run_id>-s<submission>`."""
    return f"{run_id}-s{submission}"


def run_of_submission(name: str) -> str:
    """The run id in the name of a submission; empty where the name is none."""
    return name.rpartition("-s")[0]


def number_of_submission(name: str) -> int:
    """The number in the name of a submission."""
    return int(name.rpartition("-s")[2])


@dataclass(frozen=True)
class ClusterRequest:
    """What is submitted, whole: the `text` that a dry run prints, and secrets, by the names of their variables.

    `run_dir` is a path where the run folder is, which the text names: job.yaml in it, made before, has the digests of
    the files that the run reads; what was sent of them lies there by its digest. One submission may carry several
    attempts.
    """

    run_id: str
    submission: int
    run_dir: str
    text: str
    secrets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the submission."""
        return submission_name(self.run_id, self.submission)


@dataclass(frozen=True)
class ClusterStatus:
    """How the cluster sees a run: facts about processes alone; how a run ended is told by its folder.

    `stuck`: the cluster tries again and again, but somebody has to fix what `reason` says. `address`: where a service
    answers that the cluster itself keeps up.
    """

    state: ClusterState
    reason: str = ""
    stuck: bool = False
    address: str | None = None


@dataclass(frozen=True)
class Standing:
    """How a run stands: what its folder says, and what its cluster says."""

    folder: Snapshot
    on_cluster: ClusterStatus


@dataclass(frozen=True)
class Logs:
    """What was appended from an offset on, and the offset to go on from."""

    text: str
    offset: int


class CapacityNotTold(Unreachable):
    """What a cluster has for workers is not for this account to know; a job may fit all the same."""


@dataclass(frozen=True)
class Capacity:
    """Workers that fit at once, and how many of them are free now.

    `gpu` is what its GPUs are called, where all have one name, and `gpu_bytes` the memory of the smallest one: None
    where the cluster does not say.
    """

    kind: Literal["gpu", "cpu"]
    total: int
    free: int
    gpu: str | None = None
    gpu_bytes: int | None = None


class Cluster(Protocol):
    """A backend. Every method but `request` may raise Unreachable."""

    @property
    def site(self) -> Site:
        """Where the run folders of its runs are."""
        ...

    def request(
        self, job: AnyJob, run_id: str, submission: int | None = 1, secrets: tuple[str, ...] = ()
    ) -> ClusterRequest:
        """What would be submitted, with secrets of these names, without any effect; raises SubmissionRefused.

        A `submission` of None is the one after all that the cluster had of the run.
        """
        ...

    def forecast(self, request: ClusterRequest) -> float | None:
        """In how many seconds it would start; None where the cluster does not say. Nothing is submitted.

        Raises SubmissionRefused where it never would.
        """
        ...

    def submit(self, request: ClusterRequest) -> None:
        """Hand a request over, once however often it is repeated. The run folder exists already.

        A run that goes on by an earlier submission is left to that. Raises SubmissionRefused where the cluster does
        not take it: then nothing is queued.
        """
        ...

    def status(self, run_ids: Iterable[str]) -> dict[str, ClusterStatus]:
        """The state of each run, by one look for all of them."""
        ...

    def look(self, run_ids: Iterable[str] | None = None, in_full: bool = False) -> dict[str, Standing]:
        """How runs stand, None: all of its site, in one trip; one whose folder is not there is left out.

        What runs have measured is in full views alone.
        """
        ...

    def logs(self, run_id: str, offset: int = 0) -> Logs:
        """What the run's controller printed before it had an attempt to write to."""
        ...

    def cancel(self, run_id: str) -> None:
        """Make sure that a controller will see the cancel request that is in the run folder."""
        ...

    def capacity(self) -> Capacity:
        """What the cluster has for workers; raises Unreachable where it could start none."""
        ...


def look_at(cluster: Cluster, run_ids: Iterable[str] | None, in_full: bool) -> dict[str, Standing]:
    """How runs of a cluster stand whose folders are on this machine; None: all of them.

    The cluster is asked about those alone that have no result; about a stage, as about the job that it is one of.
    Where it does not answer, they are unknown.
    """
    if run_ids is None:
        run_ids = cluster.site.ids()
    snapshots = cluster.site.snapshots(run_ids, in_full)
    submitted_as: dict[str, str] = {}
    for run_id, run in snapshots.items():
        if run.result is None:
            submitted_as[run_id] = run.stage_of or run_id
    open_runs = list(dict.fromkeys(submitted_as.values()))
    try:
        by_submission = cluster.status(open_runs)
    except Unreachable as error:
        by_submission = dict.fromkeys(open_runs, ClusterStatus("unknown", str(error)))
    statuses = {run_id: by_submission[submission] for run_id, submission in submitted_as.items()}
    closed = [run_id for run_id, status in statuses.items() if status.state == "ended"]
    if closed:  # their results may be there by now
        later = cluster.site.snapshots(closed, in_full)
        snapshots |= later
    ended = ClusterStatus("ended")
    standings: dict[str, Standing] = {}
    for run_id, run in snapshots.items():
        status = statuses.get(run_id, ended)
        standings[run_id] = Standing(run, status)
    return standings
