"""A cluster of another machine: its backend runs there, and all that is asked of it goes over one link."""

from collections.abc import Iterable
from dataclasses import asdict

from clusters.base import Capacity, ClusterRequest, ClusterStatus, Logs, Standing
from clusters.remote.far_side import FarSide
from clusters.remote.site import RemoteSite
from runfolder.evaluation_job import AnyJob
from runfolder.snapshot import Snapshot


class RemoteCluster:
    """A cluster whose far side answers for it. Every method may raise Unreachable; repeating it is safe."""

    def __init__(self, far_side: FarSide) -> None:
        self.far_side = far_side
        self.site = RemoteSite(far_side)

    def request(
        self, job: AnyJob, run_id: str, submission: int | None = 1, secrets: tuple[str, ...] = ()
    ) -> ClusterRequest:
        """What would be submitted, as the backend there makes it; raises SubmissionRefused."""
        question = {"verb": "request", "job": job.dump(), "run_id": run_id, "submission": submission}
        made = self.far_side.ask({**question, "secrets": secrets})
        made["secrets"] = secrets
        return ClusterRequest(**made)

    def forecast(self, request: ClusterRequest) -> float | None:
        """In how many seconds it would start there; raises SubmissionRefused where it never would."""
        plain = asdict(request)
        wait_s: float | None = self.far_side.ask({"verb": "forecast", "request": plain})
        return wait_s

    def submit(self, request: ClusterRequest) -> None:
        """Hand a request over, once however often it is repeated."""
        plain = asdict(request)
        self.far_side.ask({"verb": "submit", "request": plain})

    def status(self, run_ids: Iterable[str]) -> dict[str, ClusterStatus]:
        """The state of each run, by one look for all of them."""
        answer = self.far_side.ask({"verb": "status", "run_ids": list(run_ids)})
        statuses = {}
        for run_id, plain in answer.items():
            statuses[run_id] = ClusterStatus(**plain)
        return statuses

    def look(self, run_ids: Iterable[str] | None = None, in_full: bool = False) -> dict[str, Standing]:
        """How runs stand, None: all of them: one trip for what their folders and the cluster say."""
        wanted = None
        if run_ids is not None:
            wanted = list(run_ids)
        answer = self.far_side.ask({"verb": "look", "run_ids": wanted, "in_full": in_full})
        standings = {}
        for run_id, plain in answer.items():
            status = ClusterStatus(**plain["on_cluster"])
            folder = Snapshot.load(plain["folder"])
            standings[run_id] = Standing(folder, status)
        return standings

    def logs(self, run_id: str, offset: int = 0) -> Logs:
        """What the run's controller printed before it had an attempt to write to."""
        answer = self.far_side.ask({"verb": "logs", "run_id": run_id, "offset": offset})
        return Logs(**answer)

    def cancel(self, run_id: str) -> None:
        """Make sure that a controller will see the cancel request that is in the run folder."""
        question = {"verb": "cancel", "run_id": run_id}
        self.far_side.ask(question)

    def capacity(self) -> Capacity:
        """What the cluster has for workers."""
        answer = self.far_side.ask({"verb": "capacity"})
        return Capacity(**answer)
