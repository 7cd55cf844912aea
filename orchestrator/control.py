"""Ending a run, and letting one go on."""

from orchestrator.backends import make_request, open_cluster, wake
from orchestrator.errors import InputError
from orchestrator.runs import find, read_record
from runfolder.chain import last, reopen, result
from runfolder.record import load_job
from runfolder.requests import request_cancel
from trainer.digests import changes


def cancel(reference: str) -> str:
    """Ask for the end of a run and give its id; raises InputError when it has ended otherwise."""
    run_dir = find(reference)
    ended = result(run_dir)
    if ended is None:
        request_cancel(run_dir)
        open_cluster(read_record(run_dir)["cluster"]).cancel(run_dir.name)
    elif ended["state"] != "cancelled":
        raise InputError(f"run {run_dir.name}: it has {ended['state']} already")
    return run_dir.name


def resume(reference: str) -> str:
    """Let a run that has no success go on from its newest checkpoint, and give its id; repeat it safely.

    Raises InputError for a run that has succeeded, or whose data or base are not those of its submission any more.
    """
    run_dir = find(reference)
    ended = result(run_dir)
    if ended is not None and ended["state"] == "succeeded":
        raise InputError(f"run {run_dir.name}: it has succeeded, there is nothing to go on with")
    record, job = read_record(run_dir), load_job(run_dir)
    if lines := changes(job, record.get("digests", {})):
        raise InputError("\n".join(lines))
    cluster = open_cluster(record["cluster"])
    request = make_request(cluster, job, run_dir.name, last(run_dir).number + 1)
    wake(cluster)
    if ended is not None:
        reopen(run_dir)
    cluster.submit(request)
    return run_dir.name
