"""`python -m clusters.answer`: a cluster's own machine answers for it, one line of JSON for each request.

The first line says which cluster is meant, as the clusters file of the one who asks describes it; run folders are in
FLEETUNE_HOME/runs. A request is {"verb": ..., its arguments}; the answer is {"answer": ...}, or {"error": its kind,
"message": one line}. What takes long, like the digest of a large file, has lines that say so before its answer. The
end of the input ends it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import fleetune_start
from clusters.backends import backend_of, open_backend
from clusters.base import Cluster, ClusterRequest, Standing
from clusters.controllers import COLLECTED
from clusters.pod_submissions import answer_of_submissions
from clusters.remote.far_side import AT_WORK, READY, kind_of, words_of
from clusters.remote.leftovers import leftovers_in, remove_leftovers
from clusters.remote.shelf import Shelf
from runfolder.evaluation_job import any_job
from runfolder.folders import home
from runfolder.requested import answer_request
from runfolder.site import PlainData

_SIGN_S = 10.0  # between two signs of work
_WORK_S = 0.001  # of processor time in between that counts as work, beside what a look takes


def main() -> None:
    """Answer requests until the input ends."""
    os.umask(os.umask(0) | 0o002)  # whatever the site's own lines set: a run is not for everybody to write
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    first = sys.stdin.readline()
    if not first.endswith("\n"):
        return  # the link was cut, as below
    plain = json.loads(first)["cluster"]
    config = backend_of(plain["kind"]).Config.model_validate(plain)
    code = Path(fleetune_start.__file__).parent  # runs go on with the code that submitted them
    env = {**config.env, **COLLECTED, "PYTHONPATH": str(code)}
    cluster = open_backend(config.model_copy(update={"env": env}), home())
    shelf = Shelf(home() / "files")
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        if not line.endswith("\n"):
            break  # the link was cut in the middle of a request
        with _signs_of_work(answers):
            reply = reply_to(cluster, shelf, json.loads(line))
        _say(json.dumps(reply), answers)


def _say(line: str, answers: TextIO) -> None:
    """Send a line to the one who asks."""
    try:
        print(line, file=answers, flush=True)
    except BrokenPipeError:
        os._exit(0)  # nobody is there to hear it


@contextmanager
def _signs_of_work(answers: TextIO) -> Iterator[None]:
    """Within it, a line now and then says that this process works; not where it waits for a dead file system."""
    ended = threading.Event()
    thread = threading.Thread(target=_give_signs, args=(ended, answers), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _give_signs(ended: threading.Event, answers: TextIO) -> None:
    """After each interval in which this process did something, say so, until the work has ended."""
    before_s = time.process_time()
    while not ended.wait(_SIGN_S):
        worked_s = time.process_time() - before_s
        if worked_s > _WORK_S:
            _say(AT_WORK, answers)
        before_s = time.process_time()


def reply_to(cluster: Cluster, shelf: Shelf, request: PlainData) -> dict[str, Any]:
    """The reply to a request; errors that are part of the interface go back to the one who asks."""
    try:
        return {"answer": answer(cluster, shelf, request)}
    except Exception as error:
        kind = kind_of(error)
        if kind is None:
            raise
        return {"error": kind, "message": words_of(error)}


def answer(cluster: Cluster, shelf: Shelf, request: PlainData) -> Any:
    """Do what a request asks, as plain data that goes through JSON."""
    match request["verb"]:
        case "request":
            job = any_job(request["job"])
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
        case "look":
            standings = cluster.look(request["run_ids"], request["in_full"])
            return {run_id: _plain_standing(standing) for run_id, standing in standings.items()}
        case "logs":
            return asdict(cluster.logs(request["run_id"], request["offset"]))
        case "cancel":
            return cluster.cancel(request["run_id"])
        case "capacity":
            return asdict(cluster.capacity())
        case "latest_start" | "note_try" | "tried":
            return answer_of_submissions(home() / "runs", request)
        case "shelf_state":
            return shelf.state(request["digest"], request["name"])
        case "shelf_add":
            return shelf.add(request["digest"], request["offset"], request["data"])
        case "shelf_accept":
            return shelf.accept(request["digest"], request["name"])
        case "shelf_folder":
            return shelf.folder(request["files"])
        case "leftovers":
            return [leftover.dump() for leftover in leftovers_in(home())]
        case "remove_leftovers":
            return [leftover.dump() for leftover in remove_leftovers(home(), request["paths"])]
    root = home() / "runs"
    return answer_request(root, request)


def _plain_standing(standing: Standing) -> dict[str, Any]:
    folder = standing.folder.dump()
    on_cluster = dict(vars(standing.on_cluster))
    return {"folder": folder, "on_cluster": on_cluster}


if __name__ == "__main__":
    main()
