"""What the doctor finds on machines that are not well."""

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from orchestrator import doctor
from orchestrator.doctor import Check


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a folder of builds of its own, and a quick answer about devices."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.doctor()}
    for name in ("python", "home", "build lock", "local cluster", "mlflow"):
        assert checks[name].level == "ok", checks[name]
    assert "CPU cores" in checks["devices"].found
    assert not (tmp_path / "home").exists()
    assert all(check.mend for check in checks.values() if check.level != "ok")


def test_a_lock_that_a_killed_build_left(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (check,) = doctor._build_lock()
    assert check.level == "ok"  # a build may be going on
    os.utime(lock, (time.time() - 3600,) * 2)
    (check,) = doctor._build_lock()
    assert check == Check("build lock", "warn", str(lock), f"rm {lock}")


def test_a_home_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", "/dev/null/home")
    monkeypatch.delenv("FLEETUNE_CACHE", raising=False)
    checks = [*doctor._home(), *doctor._caches(), *doctor._cluster()]
    assert [check.level for check in checks] == ["fail", "fail", "fail"]


def test_a_cache_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_CACHE", "/dev/null/cache")
    monkeypatch.setenv("HF_HOME", "/dev/null/hub")
    tokens, hub = doctor._caches()
    assert (tokens.level, tokens.found) == ("fail", "/dev/null/cache")
    assert tokens.mend == "set FLEETUNE_CACHE to a folder that you can write"
    assert (hub.level, hub.found) == ("warn", "/dev/null/hub cannot be written")


def test_a_tracking_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    (check,) = doctor._mlflow()
    assert (check.level, check.found.split(":")[0]) == ("warn", "http")


def test_a_database_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    (check,) = doctor._mlflow()
    assert (check.level, check.mend) == ("fail", "make the database writable")


def test_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@127.0.0.1:1")
    (check,) = doctor._mlflow()
    assert check.found.startswith("http://ada:***@127.0.0.1:1: ")


def test_a_cluster_that_another_host_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path))
    lock = tmp_path / "local" / "supervisor.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": "login2", "boot_id": "other", "pid": 1, "started": "1"}))
    with lock.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (check,) = doctor._cluster()
    assert check.level == "warn" and "process 1 on login2" in check.found


def test_a_python_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    (check,) = doctor._devices()
    assert (check.level, check.mend) == ("warn", "pip install 'fleetune[train]'")
