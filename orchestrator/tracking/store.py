"""The MLflow side: which store, the one MLflow run of a run id, and what it says beside metrics.

MLflow cannot create a run exclusively, so the run folder decides: an MLflow run counts once its id is in
RUN_DIR/mlflow/, a folder that is taken by a rename that only one can win. Whoever loses adopts the winner's, and
everybody removes runs of that run id that do not count. Nothing is ever delivered to those, so they are empty.
In a mirror (runfolder/mirror.py) only a claim that came from the run folder itself counts for all.
"""

import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clusters.controllers import is_collected
from orchestrator.errors import InputError
from orchestrator.tracking.environment import machine_tags
from orchestrator.tracking.facts import datasets, job_params, job_tags, tracking_of
from orchestrator.tracking.new_database import make_database
from orchestrator.tracking.password import KINDS_TRACKED, TRACKING_URI
from orchestrator.tracking.trouble import DeliveryRefused
from runfolder.chain import attempts, result
from runfolder.files import Record, list_names, read_json, take_name, write_json
from runfolder.folders import home
from runfolder.mirror import mirrored_from
from runfolder.record import load_any_job, read_brief, read_record
from runfolder.secrets import read_secrets
from runfolder.shapes import MLFLOW_RUN
from runfolder.variables import public

RUN_ID_TAG = "fleetune.run_id"
PARENT_TAG = "mlflow.parentRunId"  # by which MLflow shows a run below another one
SERVERS = ("http", "https", "databricks", "postgresql", "mysql", "mssql")
ALLOWED = "null, sqlite:////ABSOLUTE/FILE.db, http(s)://HOST:PORT, postgresql://..., mysql://..., mssql://..."
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what fails is delivered again later
}
_PARAMS_PER_BATCH = 100
_SQLITE = "sqlite:///"


def resolve(uri: str | None) -> str:
    """The tracking URI; null stands for SQLite in FLEETUNE_HOME (default ~/.fleetune)."""
    if uri:
        return uri
    database = home() / "mlflow.db"
    return f"{_SQLITE}{database}"


def check_uri(uri: str | None) -> None:
    """Raise InputError where MLflow could not be reached by this URI from every folder."""
    if uri is None or uri == "databricks":
        return
    file = sqlite_file(uri)
    if file and file.is_absolute():
        return
    parts = urlsplit(uri)
    kind = parts.scheme.split("+")[0]  # without the driver of a database
    if not parts.netloc or kind not in SERVERS:
        raise InputError(f"tracking.uri: found {public(uri)!r}; allowed: {ALLOWED} (MLflow's file store is gone)")


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite URI; None for another URI."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE))


def check_mlflow() -> None:
    """Raise InputError where MLflow is not installed."""
    if find_spec("mlflow") is None:
        raise InputError("MLflow is not installed here: pip install mlflow")


def client(uri: str) -> Any:
    """An MlflowClient that gives up early; it makes a missing SQLite store, which takes seconds."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    check_mlflow()
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        make_database(file, MlflowClient)
    return MlflowClient(tracking_uri=uri)


def ui_command(uri: str | None, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """What serves MLflow's pages for a store on loopback: a command, and what its environment has beside this one.

    Start it in its own process group. Everybody can read commands, so the URI with its password is not in it.
    """
    uri = resolve(uri)
    if urlsplit(uri).scheme in ("http", "https", "databricks"):
        raise InputError(f"tracking.uri: {public(uri)} is a server already; open it in a browser")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(_free_port(port)), "--workers", "1"]
    artifact_root = _artifact_root(uri)
    if artifact_root:
        command += ["--default-artifact-root", artifact_root]
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_BACKEND_STORE_URI": uri,
    }
    return command, settings


def address(run_dir: Path) -> str:
    """The URI of the MLflow that gets a run, with its password: of the one that has it, else of the one asked for."""
    secrets = read_secrets(run_dir)
    requested = secrets.get(TRACKING_URI) or resolve(tracking_of(run_dir).uri)
    record = counting_run(run_dir)
    if record is None:
        return requested
    if public(record["uri"]) == public(requested):
        return requested  # which has the password
    return str(record["uri"])


def is_left_to_others(run_dir: Path) -> bool:
    """Whether this process delivers nothing of a run: the MLflow that gets it is that of whoever compares.

    What comes of an evaluation is in the runs of its adapters, once the answers are judged.
    """
    job = load_any_job(run_dir)
    if not isinstance(job, KINDS_TRACKED):
        return True
    return is_collected() and job.tracking.uri is None


def open_run(client: Any, run_dir: Path, uri: str, fence: Callable[[], None]) -> Any:
    """Open or adopt the one MLflow run of a run folder; `fence` is called before anything is made.

    Raises DeliveryRefused where the run or its experiment was deleted in MLflow: what somebody deleted is not brought
    back, and not made anew beside it, without being asked. The rows stay in the run folder.
    """
    parent = _open_parent(client, run_dir, uri, fence)
    experiment_name = tracking_of(run_dir).experiment
    experiment = _experiment(client, experiment_name, uri)
    mlflow_run_ids = _tagged_runs(client, experiment, run_dir.name)
    counts_for_all = (run_dir / "mlflow").exists() or mirrored_from(run_dir) is None
    if not (run_dir / "mlflow").exists():
        fence()
        if not mlflow_run_ids:
            created = _create_mlflow_run(client, experiment, run_dir, parent)
            mlflow_run_ids = [created]
        oldest = mlflow_run_ids[0]
        claim = {"mlflow_run_id": oldest, "uri": public(uri), "experiment_id": experiment}
        _claim_mlflow_run(run_dir, claim)
    record = read_json(run_dir / "mlflow" / "run.json", MLFLOW_RUN)
    write_json(run_dir / "mlflow.json", record)
    counting = record["mlflow_run_id"]
    if counts_for_all:
        for other in set(mlflow_run_ids) - {counting}:
            client.delete_run(other)
    return _get_run(client, run_dir, counting)


def _open_parent(client: Any, run_dir: Path, uri: str, fence: Callable[[], None]) -> str | None:
    """Open or adopt the MLflow run of the job that a run is a stage of; None for a run that is none."""
    files = list_names(run_dir)
    whole = read_brief(run_dir, files).get("stage_of")
    folder = run_dir.parent / str(whole)
    if whole is None or not folder.exists():
        return None
    parent = open_run(client, folder, uri, fence)
    mlflow_run_id: str = parent.info.run_id
    if result(folder) is None and parent.info.status != "RUNNING":
        client.update_run(mlflow_run_id, status="RUNNING")
    return mlflow_run_id


def _tagged_runs(client: Any, experiment: str, run_id: str) -> list[str]:
    """The ids of the MLflow runs that were made for a run, the first one first."""
    runs = client.search_runs([experiment], f"tags.`{RUN_ID_TAG}` = '{run_id}'")
    by_age = []
    for run in runs:
        by_age.append((run.info.start_time, run.info.run_id))
    by_age.sort()
    return [mlflow_run_id for _, mlflow_run_id in by_age]


def _get_run(client: Any, run_dir: Path, mlflow_run_id: str) -> Any:
    """The MLflow run that counts, which must still be there."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        run = client.get_run(mlflow_run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        fix = f"look whether this is its MLflow; for a new MLflow run with all rows: rm -r {run_dir / 'mlflow'}"
        raise DeliveryRefused(f"MLflow run {mlflow_run_id} is not there", fix) from None
    if run.info.lifecycle_stage == "deleted":
        fix = f"restore it: mlflow runs restore --run-id {mlflow_run_id}"
        raise DeliveryRefused(f"MLflow run {mlflow_run_id} was deleted", fix)
    return run


def counting_run(run_dir: Path) -> Record | None:
    """The MLflow run that counts; None while there is none."""
    path = run_dir / "mlflow" / "run.json"
    if not path.exists():
        return None
    return read_json(path, MLFLOW_RUN)


def describe_run(client: Any, run_dir: Path, mlflow_run_id: str, here: bool) -> None:
    """Log the job as params, the data as inputs, the rest as tags; with `here` this machine too, as where it runs."""
    from mlflow.entities import Param, RunTag

    record = read_record(run_dir)
    params = []
    for key, value in job_params(run_dir, record).items():
        params.append(Param(key, value))
    for start in range(0, len(params), _PARAMS_PER_BATCH):
        stop = start + _PARAMS_PER_BATCH
        client.log_batch(mlflow_run_id, params=params[start:stop])
    texts = job_tags(run_dir, record)
    texts[RUN_ID_TAG] = run_dir.name
    if here:
        texts.update(machine_tags())
    tags = []
    for name, text in texts.items():
        tags.append(RunTag(name, text))
    client.log_batch(mlflow_run_id, tags=tags)
    inputs = datasets(record)
    client.log_inputs(mlflow_run_id, datasets=inputs)


def _artifact_root(uri: str) -> str | None:
    file = sqlite_file(uri)
    if file is None:
        return None
    return (file.parent / "artifacts").as_uri()


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment, which is made where there is none; raises DeliveryRefused where it was deleted."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_root(uri)))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:  # else somebody else made it just now
                raise
    if experiment.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        raise DeliveryRefused(f"experiment {name!r} was deleted", f"restore it: {restore}")
    return str(experiment.experiment_id)


def _create_mlflow_run(client: Any, experiment: str, run_dir: Path, parent: str | None = None) -> str:
    """Make an MLflow run that begins when the first attempt did, or a job of stages; gives its id."""
    tried = attempts(run_dir)
    began = tried[0].claim["time"] if tried else read_record(run_dir)["submitted"]
    start_ms = int(began * 1000)
    name = run_dir.name
    tags = {RUN_ID_TAG: name}
    if parent is not None:
        tags[PARENT_TAG] = parent
    run = client.create_run(experiment, start_time=start_ms, tags=tags, run_name=name)
    return str(run.info.run_id)


def _claim_mlflow_run(run_dir: Path, record: Record) -> None:
    """Make the MLflow run of a record the one that counts, unless another one does."""
    prepared = run_dir / f".mlflow-{uuid.uuid4().hex}"
    prepared.mkdir()
    write_json(prepared / "run.json", record)
    take_name(prepared, run_dir / "mlflow")


def _free_port(wanted: int) -> int:
    """A port of loopback: the one that is wanted, or another one where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
