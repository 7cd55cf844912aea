"""The MLflow side: which store, the one MLflow run of a run id, and what it says beside metrics.

MLflow cannot create a run exclusively, so the run folder decides: an MLflow run counts once its id is in
RUN_DIR/mlflow/, a folder that is taken by a rename that only one can win. Whoever loses adopts the winner's, and
everybody removes runs of that run id that do not count. Nothing is ever delivered to those, so they are empty.
"""

import getpass
import logging
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import InputError
from orchestrator.tracking.environment import environment
from orchestrator.tracking.password import TRACKING_URI, public, secrets_of
from orchestrator.tracking.trouble import Refused
from runfolder.chain import Attempt, attempts
from runfolder.files import Record, read_json, write_json
from runfolder.folders import home
from runfolder.record import load_job, read_record
from runfolder.secrets import read_secrets
from runfolder.snapshot import planned

RUN_ID = "fleetune.run_id"
SERVERS = ("http", "https", "databricks", "postgresql", "mysql", "mssql")
ALLOWED = "null, sqlite:////ABSOLUTE/FILE.db, http(s)://HOST:PORT, postgresql://..., mysql://..., mssql://..."
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what fails is delivered again later
}
_PARAMS_PER_BATCH = 100
_UPLOAD_BYTES = 512 << 20


def resolve(uri: str | None) -> str:
    """The tracking URI; null stands for SQLite in FLEETUNE_HOME (default ~/.fleetune)."""
    return uri or f"sqlite:///{home() / 'mlflow.db'}"


def check_uri(uri: str | None) -> None:
    """Raise InputError where MLflow could not be reached by this URI from every folder."""
    if uri is None or uri == "databricks":
        return
    file = sqlite_file(uri)
    if not (file and file.is_absolute()) and not (
        (parts := urlsplit(uri)).netloc and parts.scheme.split("+")[0] in SERVERS
    ):
        raise InputError(f"tracking.uri: found {public(uri)!r}; allowed: {ALLOWED} (MLflow's file store is gone)")


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite URI; None for another URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def client(uri: str) -> Any:
    """An MlflowClient that gives up early; it makes a missing SQLite store, which takes seconds."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError:
        raise InputError("MLflow is not installed here: pip install mlflow") from None
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def ui_command(uri: str | None, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """What serves MLflow's pages for a store on loopback: a command, and what its environment has beside this one.

    Start it in its own process group. Everybody can read commands, so the URI with its password is not in it.
    """
    uri = resolve(uri)
    if urlsplit(uri).scheme in ("http", "https", "databricks"):
        raise InputError(f"tracking.uri: {public(uri)} is a server already; open it in a browser")
    artifacts = ["--default-artifact-root", root] if (root := _artifact_root(uri)) else []
    serve = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(_free_port(port))]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return [*serve, "--workers", "1", *artifacts], {**settings, "MLFLOW_BACKEND_STORE_URI": uri}


def address(run_dir: Path) -> str:
    """The URI of the MLflow that gets a run, with its password: of the one that has it, else of the one asked for."""
    asked = read_secrets(run_dir).get(TRACKING_URI) or resolve(load_job(run_dir).tracking.uri)
    found = recorded(run_dir)
    return asked if found is None or public(found["uri"]) == public(asked) else str(found["uri"])


def open_run(client: Any, run_dir: Path, uri: str, fence: Callable[[], None]) -> Any:
    """Open or adopt the one MLflow run of a run folder; `fence` is called before anything is made.

    Raises Refused where the run or its experiment was deleted in MLflow: what somebody deleted is not brought back,
    and not made anew beside it, without being asked. The rows stay in the run folder.
    """
    experiment = _experiment(client, load_job(run_dir).tracking.experiment, uri)
    tagged = client.search_runs([experiment], f"tags.`{RUN_ID}` = '{run_dir.name}'")
    found = [run.info.run_id for run in sorted(tagged, key=lambda run: (run.info.start_time, run.info.run_id))]
    if not (run_dir / "mlflow").exists():
        fence()
        found = found or [_create(client, experiment, run_dir)]
        _take(run_dir, {"mlflow_run_id": found[0], "uri": public(uri), "experiment_id": experiment})
    counts = read_json(run_dir / "mlflow" / "run.json")
    write_json(run_dir / "mlflow.json", counts)
    for other in set(found) - {counts["mlflow_run_id"]}:
        client.delete_run(other)
    return _get_run(client, run_dir, counts["mlflow_run_id"])


def _get_run(client: Any, run_dir: Path, mlflow_run_id: str) -> Any:
    """The MLflow run that counts, which must still be there."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        run = client.get_run(mlflow_run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        mend = f"look whether this is its MLflow; for a new MLflow run with all rows: rm -r {run_dir / 'mlflow'}"
        raise Refused(f"MLflow run {mlflow_run_id} is not there", mend) from None
    if run.info.lifecycle_stage == "deleted":
        raise Refused(
            f"MLflow run {mlflow_run_id} was deleted", f"restore it: mlflow runs restore --run-id {mlflow_run_id}"
        )
    return run


def recorded(run_dir: Path) -> Record | None:
    """The MLflow run that counts; None while there is none."""
    path = run_dir / "mlflow" / "run.json"
    return read_json(path) if path.exists() else None


def describe(client: Any, run_dir: Path, mlflow_run_id: str, here: bool) -> None:
    """Log the job as params, the data as inputs, the rest as tags; with `here` this machine too, as where it runs."""
    from mlflow.entities import Param, RunTag

    record = read_record(run_dir)
    params = [Param(key, value) for key, value in job_params(run_dir, record).items()]
    for start in range(0, len(params), _PARAMS_PER_BATCH):
        client.log_batch(mlflow_run_id, params=params[start : start + _PARAMS_PER_BATCH])
    tags = _job_tags(run_dir, record) | (_machine_tags() if here else {})
    client.log_batch(mlflow_run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.log_inputs(mlflow_run_id, datasets=_datasets(record))


def job_params(run_dir: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The frozen job with its defaults as flat params, and the digests of data and base; nulls are left out."""
    job = load_job(run_dir)
    digests = {f"{name}_digest": digest for name, digest in record.get("digests", {}).items()}
    params = {**dict(_flat(job.dump())), "train.lr": repr(job.lr), **dict(_flat(digests))}
    # Made by hand, or by an earlier version. Not changed but left out: MLflow refuses another value of a param.
    return {name: value for name, value in params.items() if name not in secrets_of(job)}


def upload(client: Any, run_dir: Path, mlflow_run_id: str, succeeded: bool) -> None:
    """Upload job, result and, of a run that succeeded, the output files, small ones first, up to 512 MiB.

    Raises ConnectionError, as stores of artifacts raise what they like.
    """
    try:
        for path, folder in _artifacts(run_dir, succeeded):
            client.log_artifact(mlflow_run_id, str(path), folder)
    except Exception as error:
        raise ConnectionError(f"artifacts: {error}") from error


def _artifacts(run_dir: Path, succeeded: bool) -> Iterator[tuple[Path, str | None]]:
    telling = ("result.json",) if secrets_of(load_job(run_dir)) else ("job.yaml", "result.json")
    yield from ((run_dir / name, None) for name in telling if (run_dir / name).exists())
    output, left = run_dir / "output", _UPLOAD_BYTES
    files = [path for path in output.rglob("*") if path.is_file()] if succeeded else []
    for path in sorted(files, key=lambda path: path.stat().st_size):
        left -= path.stat().st_size
        if left >= 0:
            yield path, str("output" / path.parent.relative_to(output))


def _artifact_root(uri: str) -> str | None:
    file = sqlite_file(uri)
    return (file.parent / "artifacts").as_uri() if file else None


def _experiment(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_root(uri)))
        except MlflowException:
            if (found := client.get_experiment_by_name(name)) is None:  # else somebody else made it just now
                raise
    if found.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise Refused(f"experiment {name!r} was deleted", f"restore it: {restore}")
    return str(found.experiment_id)


def _create(client: Any, experiment: str, run_dir: Path) -> str:
    began = attempts(run_dir) or [Attempt(run_dir, 1)]
    start = int(began[0].claim["time"] * 1000)
    run = client.create_run(experiment, start_time=start, tags={RUN_ID: run_dir.name}, run_name=run_dir.name)
    return str(run.info.run_id)


def _take(run_dir: Path, record: Record) -> None:
    """Make the record count, unless another one does."""
    prepared = run_dir / f".mlflow-{uuid.uuid4().hex}"
    prepared.mkdir()
    write_json(prepared / "run.json", record)
    try:
        prepared.rename(run_dir / "mlflow")
    except OSError:
        shutil.rmtree(prepared)
        if not (run_dir / "mlflow").exists():
            raise


def _job_tags(run_dir: Path, record: Mapping[str, Any]) -> dict[str, str]:
    job = load_job(run_dir)
    facts = {key: value for key, value in record.items() if key not in ("job", "digests", "run_id")}
    plan: Record = next(filter(None, map(planned, attempts(run_dir))), {})
    tags = {f"fleetune.{key}": value for key, value in _flat({**facts, "plan": plan})}
    tags |= {RUN_ID: run_dir.name, "fleetune.name": job.name, "fleetune.method": job.method.kind}
    tags["fleetune.run_dir"] = str(run_dir)
    # The names under which MLflow's pages look for them.
    known = {"git.commit": "mlflow.source.git.commit", "versions.fleetune": "fleetune.version"}
    return tags | {name: tags[f"fleetune.{key}"] for key, name in known.items() if f"fleetune.{key}" in tags}


def _machine_tags() -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container the number of a user may have no name
        user = str(os.getuid())
    return {"mlflow.user": user, **{f"fleetune.env.{key}": text for key, text in environment().items()}}


def _datasets(record: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    contexts = {"train": "training", "eval": "evaluation"}
    return [
        DatasetInput(
            Dataset(Path(record["job"]["data"][key]).name, digest[:36], "local", record["job"]["data"][key]),
            [InputTag("mlflow.data.context", context)],
        )
        for key, context in contexts.items()
        if (digest := record.get("digests", {}).get(f"data.{key}"))
    ]


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def _free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
