"""The password of a tracking URI reaches MLflow, and nobody else."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from jobs import make_job, only_queued
from mlflow_server import Guard, Server
from ports import free_port
from run_folders import claim, make_run, steps

import fleetune
from fleetune import InputError
from orchestrator.comparison.report import write_report
from orchestrator.tracking import store
from orchestrator.tracking.delivery import Delivery
from orchestrator.tracking.password import public, without_password
from runfolder.delivered import is_delivered
from runfolder.record import load_job
from runfolder.secrets import read_secrets, write_secrets

PASSWORD = "hunter2"
REPLAY = """
import sys
from pathlib import Path
from orchestrator.tracking.delivery import replay
replay(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://bob:hunter2@host:5000/at", "https://bob@host:5000/at"),
        ("https://bob@host", "https://bob@host"),
        ("http://host:5000/who@where", "http://host:5000/who@where"),
        ("http://:hunter2@host", "http://@host"),
        ("postgresql+psycopg2://bob:hunter2%40@host/db", "postgresql+psycopg2://bob@host/db"),
        ("postgresql://bob:hunter2@home@host/db", "postgresql://bob@host/db"),
        ("postgresql://bob:hunter2/?#1@host/db", "postgresql://bob@host/db"),
        (
            "postgresql://host/db?user=bob&password=hunter2&sslmode=require",
            "postgresql://host/db?user=bob&sslmode=require",
        ),
        ("mysql://bob@host/db?ssl_ca=x&Passwd=hunter2", "mysql://bob@host/db?ssl_ca=x"),
        ("mssql+pyodbc://host/?odbc_connect=UID%3Dbob%3BPWD%3Dhunter2", "mssql+pyodbc://host/"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
        ("databricks", "databricks"),
    ],
)
def test_a_uri_is_public_without_its_password(uri: str, shown: str) -> None:
    assert public(uri) == shown
    assert public(shown) == shown
    hidden = without_password(f"cannot connect to {uri}: try again", uri)
    assert "hunter2" not in hidden
    assert hidden.startswith("cannot connect to ") and hidden.endswith(": try again")


def those_that_tell(folder: Path) -> list[str]:
    """The files below a folder that hold the password."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in files if PASSWORD.encode() in path.read_bytes())


def test_a_password_is_in_one_file_for_its_owner_and_reaches_mlflow_from_any_process(
    home: Path, server: Server, tmp_path: Path
) -> None:
    guard = Guard(server.port, PASSWORD)
    uri = guard.uri.replace("//", f"//ada:{PASSWORD}@")
    changes = {"tracking": {"uri": uri.replace(PASSWORD, "mistyped"), "experiment": "secret"}}
    path = make_job(tmp_path, **changes)
    with only_queued(home):
        submitted = fleetune.submit(path)
        again = fleetune.submit(path, overrides=[f"tracking.uri={uri}"], run_id=submitted.run_id)
        assert again.adopted  # the same job with another password
    run_dir = submitted.run_dir
    assert those_that_tell(home) == [f"runs/{run_dir.name}/secrets.json"]
    assert stat.S_IMODE((run_dir / "secrets.json").stat().st_mode) == 0o600
    assert load_job(run_dir).tracking.uri == guard.uri.replace("//", "//ada@")

    attempt = claim(run_dir)
    steps(attempt, 1, 3)
    Delivery(run_dir, attempt.number).pump()
    steps(attempt, 4, 5)
    attempt.close({"state": "succeeded"})
    subprocess.run([sys.executable, "-P", "-c", REPLAY, run_dir], check=True)
    assert is_delivered(run_dir)
    assert those_that_tell(home) == [f"runs/{run_dir.name}/secrets.json"]
    assert json.loads((run_dir / "mlflow.json").read_text())["uri"] == guard.uri.replace("//", "//ada@")

    compared = fleetune.compare("secret", uri)
    (run,) = compared.runs
    assert run.params["tracking.uri"] == guard.uri.replace("//", "//ada@")
    write_report(compared, tmp_path / "report.html")
    assert PASSWORD not in (tmp_path / "report.html").read_text() + repr(compared)
    guard.stop()


def test_a_job_that_holds_its_password_itself_is_delivered_without_it(home: Path, server: Server) -> None:
    """Written by hand, or by an earlier version, which also told MLflow of it."""
    guard = Guard(server.port, PASSWORD)
    uri = guard.uri.replace("//", f"//ada:{PASSWORD}@")
    run_dir = make_run(home / "runs", "by-hand-0123456789", None, tracking={"uri": uri, "experiment": "by-hand"})
    attempt = claim(run_dir)
    steps(attempt, 1, 3)
    attempt.close({"state": "succeeded"})
    for _ in range(2):
        assert Delivery(run_dir, attempt.number).finish("succeeded", 1.0)
    assert those_that_tell(run_dir) == ["job.yaml"]
    client = store.client(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("by-hand").experiment_id])
    assert PASSWORD not in repr(run.to_dictionary())
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["result.json"]
    client.log_param(run.info.run_id, "tracking.uri", uri)
    assert fleetune.compare("by-hand", uri).runs[0].params["tracking.uri"] == public(uri)
    guard.stop()


def test_the_pages_of_mlflow_are_served_without_the_password_in_the_list_of_processes(home: Path) -> None:
    uri = f"postgresql://bob:{PASSWORD}@127.0.0.1:{free_port()}/db"
    with pytest.raises(InputError, match="found 'ftp://bob@host'"):
        store.check_uri(f"ftp://bob:{PASSWORD}@host")
    command = [sys.executable, "-P", "-m", "orchestrator", "mlflow", "--uri", uri]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        seen = psutil.Process(process.pid)
        while "server" not in (arguments := seen.cmdline()) and process.poll() is None:
            time.sleep(0.02)
        environment = seen.environ()
        process.kill()
    assert "server" in arguments and PASSWORD not in " ".join(arguments)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri


def test_secrets_are_replaced_whole(tmp_path: Path) -> None:
    assert read_secrets(tmp_path) == {}
    before = os.umask(0)
    try:
        for value in ("first", "second"):
            write_secrets(tmp_path, {"name": value})
    finally:
        os.umask(before)
    assert read_secrets(tmp_path) == {"name": "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["secrets.json"]
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
