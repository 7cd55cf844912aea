"""Whether trials that were begun read what their sweep reads now: their ids are digests of settings, not of rows."""

from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.planning.freeze import input_digests
from orchestrator.planning.spec import PlainJob
from runfolder.digests import Digests
from runfolder.files import Damaged
from runfolder.job import Job
from runfolder.site import Site


def check_reads_same(plain: PlainJob, run_id: str, site: Site) -> None:
    """Raise InputError where a run was begun with other rows, another base or other test rows than a job says now."""
    try:
        record = site.record(run_id)
    except Damaged:
        return  # its status says so
    job = Job.model_validate(plain)
    found = []
    then: Digests = record.get("digests") or {}
    for field, now in _digests_now(job, site).items():
        before = then.get(field)
        if now and before and now != before:
            found.append(f"another {field}")
    share = record["job"]["evaluation"]["test"]
    if share != job.evaluation.test:
        found.append(f"test: {share}")
    if found:
        shown = " and ".join(found)
        raise InputError(f"name: found {job.name}, whose run {run_id} was begun with {shown}; allowed: another name")


def _digests_now(job: Job, site: Site) -> Digests:
    """The digests of what a job reads; none where this machine has not got all of it."""
    folder = Path(job.base.model)
    try:
        return input_digests(job, folder if folder.is_dir() else None, site)
    except OSError:
        return {}
