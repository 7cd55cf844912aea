"""`python -m clusters.answer`: a cluster's own machine answers for it, one line of JSON for each request.

The first line says which cluster is meant, as the clusters file of the one who asks describes it; run folders are in
FLEETUNE_HOME/runs. A request is {"verb": ..., its arguments}; the answer is {"answer": ...}, or {"error": its kind,
"message": one line}. The end of the input ends it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fleetune_start
from clusters.backends import open_backend
from clusters.base import Cluster, ClusterRequest
from clusters.config import CLUSTER_KINDS
from clusters.controllers import COLLECTED
from clusters.remote.far_side import READY, kind_of
from clusters.remote.shelf import Shelf
from runfolder.folders import home
from runfolder.job import Job
from runfolder.requested import answer_request
from runfolder.site import PlainData


def main() -> None:
    """Answer requests until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    first = json.loads(sys.stdin.readline())
    plain = first["cluster"]
    config = CLUSTER_KINDS[plain["kind"]].model_validate(plain)
    code = Path(fleetune_start.__file__).parent  # runs go on with the code that submitted them
    env = {**config.env, **COLLECTED, "PYTHONPATH": str(code)}
    cluster = open_backend(config.model_copy(update={"env": env}), home())
    shelf = Shelf(home() / "files")
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        reply = reply_to(cluster, shelf, json.loads(line))
        print(json.dumps(reply), file=answers, flush=True)


def reply_to(cluster: Cluster, shelf: Shelf, request: PlainData) -> dict[str, Any]:
    """The reply to a request; errors that are part of the interface go back to the one who asks."""
    try:
        return {"answer": answer(cluster, shelf, request)}
    except Exception as error:
        kind = kind_of(error)
        if kind is None:
            raise
        return {"error": kind, "message": str(error)}


def answer(cluster: Cluster, shelf: Shelf, request: PlainData) -> Any:
    """Do what a request asks, as plain data that goes through JSON."""
    match request["verb"]:
        case "request":
            job = Job.model_validate(request["job"])
            secrets = tuple(request["secrets"])
            made = cluster.request(job, request["run_id"], request["submission"], secrets)
            return asdict(made)
        case "forecast":
            return cluster.forecast(ClusterRequest(**request["request"]))
        case "submit":
            return cluster.submit(ClusterRequest(**request["request"]))
        case "status":
            statuses = cluster.status(request["run_ids"])
            return {run_id: asdict(status) for run_id, status in statuses.items()}
        case "logs":
            return asdict(cluster.logs(request["run_id"], request["offset"]))
        case "cancel":
            return cluster.cancel(request["run_id"])
        case "capacity":
            return asdict(cluster.capacity())
        case "shelf_state":
            return shelf.state(request["digest"], request["name"])
        case "shelf_add":
            return shelf.add(request["digest"], request["offset"], request["data"])
        case "shelf_accept":
            return shelf.accept(request["digest"], request["name"])
        case "shelf_folder":
            return shelf.folder(request["files"])
    root = home() / "runs"
    return answer_request(root, request)


if __name__ == "__main__":
    main()
