"""What MLflow is told of a run beside its metrics: the job as params, the data as inputs, the rest as tags."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.tracking.password import KINDS_TRACKED, secrets_of
from runfolder.appended import read_lines
from runfolder.chain import attempts, result
from runfolder.costs import read_costs
from runfolder.files import Record
from runfolder.job import Job, Tracking
from runfolder.mirror import mirrored_from
from runfolder.record import load_any_job, load_job
from runfolder.snapshot import read_plan
from runfolder.staged_job import StagedJob
from runfolder.stages import stage_folders

# Facts under the names by which MLflow's pages look for them.
_MLFLOW_TAGS = {
    "fleetune.git.commit": "mlflow.source.git.commit",
    "fleetune.versions.fleetune": "fleetune.version",
}
NOT_TRAINING = "fleetune.not_training"  # of a job of stages as a whole, and of a stage that writes
MACHINE = "machine"  # the event that says what machine an attempt runs on
REASON_TAG = "fleetune.reason"
_LONGEST_REASON = 1000  # characters; a tag of MLflow has a limit
_CONTEXTS = {"train": "training", "eval": "evaluation"}
STATUSES = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}  # MLflow's words for ours


def state_in_mlflow(status: str) -> str:
    """Our word for the status of a run in MLflow; one that we have none for is MLflow's own."""
    for state, word in STATUSES.items():
        if word == status:
            return state
    return status.lower()


def tracking_of(run_dir: Path) -> Tracking:
    """Where the metrics of a run go; raises Damaged for one that has none."""
    job = load_any_job(run_dir)
    if isinstance(job, KINDS_TRACKED):
        return job.tracking
    return load_job(run_dir).tracking


def job_params(run_dir: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The frozen job with its defaults as flat params, and the digests of data and base; nulls are left out."""
    job = load_any_job(run_dir)
    params = dict(_flat(job.dump()))
    if isinstance(job, Job):
        params["train.lr"] = repr(job.lr)
    digests = {}
    for name, digest in record.get("digests", {}).items():
        digests[f"{name}_digest"] = digest
    params.update(_flat(digests))
    # In jobs made by hand, or by an earlier version. Left out, not changed: MLflow refuses another value of a param.
    for secret in secrets_of(job):
        params.pop(secret, None)
        params.pop(f"env.{secret}", None)
    return params


def job_tags(run_dir: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """What the record of a run has beside job and digests, the plan, its name, method and folder, as tags.

    Of one that has ended also why, which is empty where it has succeeded: it may have been paused before.
    """
    job = load_any_job(run_dir)
    facts = dict(record)
    for name in ("job", "digests", "run_id"):
        facts.pop(name, None)
    facts["plan"] = _plan(run_dir)
    facts["memory"] = _memory_tags(run_dir)
    tags = _machine_there(run_dir)
    for name, text in _flat(facts):
        tags[f"fleetune.{name}"] = text
    tags["fleetune.name"] = job.name
    if isinstance(job, Job):
        tags["fleetune.method"] = job.method.kind
    else:
        tags[NOT_TRAINING] = "true"
    if isinstance(job, StagedJob):
        folders = stage_folders(run_dir, job.stages)
        for stage, folder in folders.items():
            tags[f"fleetune.stages.{stage}"] = folder.name
    tags["fleetune.run_dir"] = mirrored_from(run_dir) or str(run_dir)
    ended = result(run_dir)
    if ended:
        reason = ended.get("reason") or ""
        tags[REASON_TAG] = reason[:_LONGEST_REASON]
    for fact, mlflow_name in _MLFLOW_TAGS.items():
        if fact in tags:
            tags[mlflow_name] = tags[fact]
    return tags


def _machine_there(run_dir: Path) -> dict[str, str]:
    """What the controller of the newest attempt said of its machine, where it left the delivery to others."""
    for attempt in reversed(attempts(run_dir)):
        for event in read_lines(attempt, "events.jsonl"):
            if event["event"] == MACHINE:
                return dict(event["tags"])
    return {}


def _plan(run_dir: Path) -> Record:
    """The plan of the first attempt that has one."""
    plans = map(read_plan, attempts(run_dir))
    return next(filter(None, plans), {})


def _memory_tags(run_dir: Path) -> Record:
    """The bytes that were foretold of the longest micro-batch, and those that it took, where they are known."""
    costs = read_costs(run_dir)
    if costs is None:
        return {}
    return {"foretold_bytes": costs.foretold, "measured_bytes": costs.measured}


def datasets(record: Mapping[str, Any]) -> list[Any]:
    """The data sources of a job whose digests are known, as inputs for MLflow."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for key, context in _CONTEXTS.items():
        digest = record.get("digests", {}).get(f"data.{key}")
        if digest:
            source = record["job"]["data"][key]
            dataset = Dataset(Path(source).name, digest[:36], "local", source)
            tag = InputTag("mlflow.data.context", context)
            inputs.append(DatasetInput(dataset, [tag]))
    return inputs


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested records as text, by their names joined with dots; nulls are left out."""
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value))
        elif value is not None:
            yield name, str(value)
