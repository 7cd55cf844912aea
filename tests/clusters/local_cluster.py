"""What tests of the local cluster share: jobs, entries, and a supervisor whose head answers."""

import json
from pathlib import Path

from clusters.entry import QueueEntry
from clusters.local import Local
from clusters.supervisor import Supervisor
from runfolder.job import Job


def job(**resources: int) -> Job:
    parts = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}, "resources": resources}
    return Job.model_validate(parts)


def text(run_id: str, workers: int = 1, run_dir: str = "/") -> str:
    plan = {"format": 1, "run_id": run_id, "run_dir": run_dir, "workers": workers}
    return json.dumps({**plan, "command": [], "environment": {}})


def entry(run_id: str, workers: int) -> QueueEntry:
    return QueueEntry(run_id, Path("/"), [], workers, {}, "", 0)


def submit(cluster: Local, run_id: str, workers: int = 1) -> Path:
    run_dir = cluster.home / "runs" / run_id
    run_dir.mkdir(parents=True)
    cluster.submit(cluster.request(job(workers_per_node=workers), run_id))
    return run_dir


def serve(cluster: Local) -> Supervisor:
    """A supervisor whose head answers."""
    found = Supervisor(cluster)
    found._head.keep = lambda: "127.0.0.1:1"  # type: ignore[method-assign]
    return found


def running(cluster: Local) -> dict[str, int]:
    controllers: dict[str, int] = cluster.state()["controllers"]
    return controllers
