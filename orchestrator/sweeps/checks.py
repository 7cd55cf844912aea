"""What a sweep asks of its job, and of trials that were begun: their ids are digests of settings, not of rows."""

from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.planning.freeze import input_digests
from orchestrator.planning.spec import PlainJob
from orchestrator.sweeps.spec import BETTER_HIGH, Sweep
from runfolder.digests import Digests
from runfolder.files import Damaged
from runfolder.job import Job
from runfolder.site import Site


def steps_of(sweep: Sweep, job: Job, path: Path, job_path: Path) -> int:
    """The steps of a full run of a sweep's job; raises InputError where it cannot be swept so."""
    steps = job.train.steps
    if steps is None:
        raise InputError(f"{job_path}: train.steps: found nothing; a sweep compares runs of equally many steps")
    if not job.data.eval:
        raise InputError(f"{job_path}: data.eval: found nothing; allowed: rows by which trials are judged")
    if sweep.test and job.evaluation.goes_by_loss:
        problem = "evaluation.keep best or stop_after in a sweep with test rows"
        raise InputError(f"{job_path}: {problem}; allowed: neither, or test: 0 in {path}")
    if sweep.measure == BETTER_HIGH and not job.evaluation.max_new_tokens:
        problem = f"evaluation.max_new_tokens: found 0, and measure {sweep.measure}, which needs answers, in {path}"
        raise InputError(f"{job_path}: {problem}; allowed: one of both")
    kinds = [method.options.get("kind") for method in sweep.methods]
    if kinds and "reference" in sweep.model_fields_set and sweep.reference not in kinds:
        raise InputError(f"{path}: reference: found {sweep.reference!r}; allowed: one of the methods")
    return steps


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
