"""What an MLflow refuses is told, with how to mend it, and delivered once when it has been mended."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Guard, Server
from run_folders import claim, expected, make_run, steps

import fleetune
from fleetune import InputError
from orchestrator import doctor, runs
from orchestrator.tracking import environment, store
from orchestrator.tracking.delivery import Delivery, deliver_held_up
from orchestrator.tracking.trouble import diagnose, trouble_of_run
from runfolder.appended import read_lines
from runfolder.chain import Attempt
from runfolder.delivered import is_delivered


@pytest.fixture(autouse=True)
def no_other_runs(home: Path) -> Iterator[None]:
    yield
    shutil.rmtree(home / "runs", ignore_errors=True)


def begun(home: Path, name: str, uri: str | None, delivered: int = 3) -> tuple[Path, Delivery]:
    """A run of an experiment of its own, of which some steps have been delivered."""
    run_dir = make_run(home / "runs", runs.new_id(name), uri, tracking={"uri": uri, "experiment": name})
    delivery = Delivery(run_dir, claim(run_dir).number)
    if delivered:
        steps(Attempt(run_dir, 1), 1, delivered)
        delivery.pump()
        assert fleetune.status(run_dir.name).tracking is None
    return run_dir, delivery


def ends(run_dir: Path, delivery: Delivery, final: int = 5) -> None:
    """The steps after the third, and a success, in front of an MLflow that takes nothing."""
    attempt = Attempt(run_dir, 1)
    steps(attempt, 4, final)
    delivery.pump()
    delivery._next_try = 0.0
    delivery.pump()
    assert [e["event"] for e in read_lines(attempt, "events.jsonl")] == ["tracking_refused"]
    assert attempt.close({"state": "succeeded"})
    assert not delivery.finish("succeeded", 1.0)
    assert fleetune.status(run_dir.name).state == "succeeded"


def told(run_dir: Path, *words: str) -> None:
    """Status, doctor and compare say each of some words."""
    (check,) = doctor._deliveries()
    assert check.level == "fail"
    assert run_dir.name in check.found
    for text in (fleetune.status(run_dir.name).tracking or "", f"{check.found} {check.mend}"):
        assert [word for word in words if word not in text] == []


def delivered(run_dir: Path, uri: str | None, final: int = 5) -> None:
    """A comparison brings what was held up, and all of it is there once."""
    assert fleetune.compare(None, uri).undelivered == {}
    assert is_delivered(run_dir)
    found = fleetune.status(run_dir.name)
    assert (found.tracking, [check.level for check in doctor._deliveries()]) == (None, ["ok"])
    client = store.client(store.resolve(uri))
    history = client.get_metric_history(found.mlflow_run_id, "loss")
    assert sorted((m.step, m.value, m.timestamp) for m in history) == expected((1, 1, final))
    assert client.get_run(found.mlflow_run_id).info.status == "FINISHED"


def test_a_deleted_experiment_is_restored_by_its_owner_alone(home: Path) -> None:
    run_dir, delivery = begun(home, "deleted", None)
    other, _ = begun(home, "healthy", None)
    client = store.client(store.resolve(None))
    experiment = client.get_experiment_by_name("deleted").experiment_id
    client.delete_experiment(experiment)
    ends(run_dir, delivery)
    words = ("experiment 'deleted' was deleted", f"mlflow experiments restore --experiment-id {experiment}")
    told(run_dir, *words)
    assert Attempt(other, 1).close({"state": "failed"})
    found = fleetune.compare(None, None)  # the other one is not held up by it
    assert other.name in [run.run_id for run in found.runs]
    assert run_dir.name not in [run.run_id for run in found.runs]
    assert all(word in found.undelivered[run_dir.name] for word in words)
    assert is_delivered(other)
    assert client.get_experiment(experiment).lifecycle_stage == "deleted"
    client.restore_experiment(experiment)
    delivered(run_dir, None)


def test_a_deleted_run_and_one_that_is_gone(home: Path) -> None:
    run_dir, delivery = begun(home, "trash", None)
    client = store.client(store.resolve(None))
    mlflow_run_id = str(fleetune.status(run_dir.name).mlflow_run_id)
    client.delete_run(mlflow_run_id)
    ends(run_dir, delivery)
    told(run_dir, f"mlflow runs restore --run-id {mlflow_run_id}")
    client._tracking_client.store._hard_delete_run(mlflow_run_id)
    with pytest.raises(InputError, match=f"{run_dir.name}: MLflow refuses: MLflow run {mlflow_run_id} is not there"):
        fleetune.compare("trash", None)
    told(run_dir, f"rm -r {run_dir}/mlflow")
    shutil.rmtree(run_dir / "mlflow")
    delivered(run_dir, None)
    assert fleetune.status(run_dir.name).mlflow_run_id != mlflow_run_id


@pytest.mark.parametrize(("status", "word"), [(401, "MLFLOW_TRACKING_PASSWORD"), (403, "the right to write")])
def test_a_password_that_is_not_taken(
    home: Path, server: Server, monkeypatch: pytest.MonkeyPatch, status: int, word: str
) -> None:
    guard = Guard(server.port, "right", status)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    run_dir, delivery = begun(home, f"accounts-{status}", guard.uri, delivered=0)
    steps(Attempt(run_dir, 1), 1, 3)
    ends(run_dir, delivery)
    told(run_dir, str(status), word)
    with pytest.raises(InputError, match=f"MLflow at {guard.uri}: .*{status}.*{word}"):
        fleetune.compare(None, guard.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    delivered(run_dir, guard.uri)
    guard.stop()


@contextmanager
def pragma(text: str) -> Iterator[None]:
    """Every connection to SQLite has a setting."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def connect(connection: Any, _: object) -> None:
        connection.execute(f"PRAGMA {text}")

    event.listen(Engine, "connect", connect)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connect)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("max_page_count = 1", ("full", "free some space")),
        ("query_only = 1", ("readonly", "make the database writable")),
    ],
)
def test_a_database_that_takes_nothing(home: Path, tmp_path: Path, setting: str, words: tuple[str, ...]) -> None:
    begun(home, "schema", None)
    shutil.copy(home / "mlflow.db", tmp_path / "small.db")
    uri = f"sqlite:///{tmp_path}/small.db"
    run_dir, delivery = begun(home, setting.split()[0].replace("_", "-"), uri)
    engine = store.client(uri)._tracking_client.store.engine
    with pragma(setting):
        engine.dispose()
        ends(run_dir, delivery, 2000)
        told(run_dir, *words)
    engine.dispose()
    delivered(run_dir, uri, 2000)


def of_another_version(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = 'feedfeedfeed'")


def no_database(path: Path) -> None:
    path.write_text("no database " * 1000)


@pytest.mark.parametrize(("spoil", "word"), [(of_another_version, "schema"), (no_database, "not a database")])
def test_a_database_of_something_else(home: Path, tmp_path: Path, spoil: Callable[[Path], None], word: str) -> None:
    begun(home, "schema", None)
    shutil.copy(home / "mlflow.db", tmp_path / "other.db")
    spoil(tmp_path / "other.db")
    run_dir, _ = begun(home, "spoiled", f"sqlite:///{tmp_path}/other.db", delivered=0)
    Delivery(run_dir, 1).pump()
    told(run_dir, word)


def test_a_user_whose_number_has_no_name_is_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert environment.machine_tags()["mlflow.user"] == str(os.getuid())


def test_what_passes_by_itself(home: Path, server: Server) -> None:
    run_dir, _ = begun(home, "nobody", "http://127.0.0.1:1", delivered=0)
    Delivery(run_dir, 1).pump()
    (check,) = doctor._deliveries()
    assert (check.level, check.mend) == ("warn", "it is delivered when MLflow answers")
    assert str(fleetune.status(run_dir.name).tracking).startswith("MLflow does not answer: ")
    with pytest.raises(ConnectionError, match="MLflow at http://127.0.0.1:1"):
        fleetune.compare(None, "http://127.0.0.1:1")
    locked = sqlite3.OperationalError("database is locked")
    locked.sqlite_errorcode = 5
    assert not diagnose(locked, "sqlite:////x").lasting
    assert diagnose(KeyError("x"), server.uri).reason == "KeyError: 'x'"


@pytest.mark.parametrize(
    "name", ["mlflow/run.json", "secrets.json", "attempts/1/metrics.jsonl", "attempts/1/system.jsonl"]
)
@pytest.mark.parametrize("text", ["", "[]\n", '{"x": 1}\n', "{torn\n"])
def test_a_damaged_run_holds_up_no_other(home: Path, name: str, text: str) -> None:
    good, delivery = begun(home, "fine", None)
    assert Attempt(good, 1).close({"state": "succeeded"})
    bad, _ = begun(home, "bad", None)
    assert Attempt(bad, 1).close({"state": "succeeded"})
    steps(Attempt(bad, 1), 4, 4)
    (bad / name).parent.mkdir(exist_ok=True)
    (bad / name).write_text(text)
    deliver_held_up(0.0)
    assert is_delivered(good)
    trouble = trouble_of_run(bad)
    told = trouble.fix if trouble else fleetune.status(bad.name).reason
    assert is_delivered(bad) or "mend that file" in str(told) or Path(name).name in str(told)
    assert delivery.uri
