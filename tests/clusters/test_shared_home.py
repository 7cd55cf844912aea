"""A home that hosts, shells and versions of Fleetune share: none of them stands in another one's way."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from local_cluster import job, running, serve, submit, text
from waiting import until

from clusters import entry
from clusters.base import Unreachable
from clusters.local import Local
from clusters.ray_head import Head


def test_what_is_no_entry_stands_in_nobodys_way(cluster: Local, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.loads(text("bad", run_dir=str(cluster.home)))
    texts: list[tuple[str, object]] = [
        ("run_id: found NoneType", {}),
        ("found list", []),
        ("found format 7; allowed: format 1", {**good, "format": 7}),
        ("workers: found str", {**good, "workers": "2"}),
        ("run_id: found 'bad'; allowed: the name of the file", good),
        ("File name too long", {**good, "run_id": "x", "run_dir": "/" + "x" * 300}),
        *(
            (
                why,
                {**good, "run_id": "x", "environment": environment},
            )
            for why, environment in (
                ("environment or command: found a value that no process can have", {"A": 1}),
                ("environment or command: found a value that no process can have", {"A": "a\0b"}),
                ("environment: A: found 200,000 characters", {"A": "x" * 200_000}),
                ("environment: 'A=B' is no name of a variable", {"A=B": "x"}),
            )
        ),
    ]
    submit(cluster, "fine")
    served, path = serve(cluster), cluster.queue.folder / "x.json"
    for why, plan in texts:
        path.write_text(json.dumps(plan))
        served.tick()
        assert why in cluster.state()["damaged"]["x"]
        assert why in capsys.readouterr().out
        served.tick()
        assert capsys.readouterr().out == ""  # said once
        told = cluster.status(["fine", "x"])
        assert (told["fine"].state, told["x"].state) == ("running", "unknown")
        assert why in told["x"].reason and "fleetune resume x" in told["x"].reason
        path.unlink()
        served.tick()
    path.write_text("{}")
    (cluster.queue.folder / "torn.json").write_text('{"run_id": ')
    (cluster.queue.folder / "bytes.json").write_bytes(b"\xff")
    (cluster.queue.folder / "folder.json").mkdir()
    served.tick()
    assert sorted(cluster.state()["damaged"]) == ["bytes", "folder", "torn", "x"]
    submit(cluster, "x")  # replaces what is there
    assert [e.run_id for e in cluster.queue.list()] == ["fine", "x"]


def test_a_run_that_cannot_be_started_stands_in_nobodys_way(
    cluster: Local, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(cluster, "first")
    submit(cluster, "second")
    cluster.log("first").mkdir()
    serve(cluster).tick()
    assert list(running(cluster)) == ["second"]
    assert cluster.taken_workers() == 1
    assert capsys.readouterr().out.startswith("first cannot be started: ")


def test_a_run_gets_its_own_environment_alone(cluster: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the shell that the supervisor was started from, in which another run was submitted."""
    names = ("HF_HUB_OFFLINE", "MLFLOW_TRACKING_TOKEN", "NCCL_DEBUG", "FLEETUNE_HANG_AFTER", "FLEETUNE_HOME")
    names += ("DATABRICKS_TOKEN", "PGPASSWORD", "LD_PRELOAD", "TRANSFORMERS_OFFLINE")
    shows = "import os, sys; sys.stdout.write(repr([os.environ.get(name) for name in sys.argv[1:]]))"
    monkeypatch.setattr(entry, "controller_command", lambda _: [sys.executable, "-c", shows, *names])
    monkeypatch.setenv("HF_HUB_OFFLINE", "own")
    submit(cluster, "one")
    for name in names:
        monkeypatch.setenv(name, "of the first shell")
    serve(cluster).tick()
    until(lambda: cluster.logs("one").text.endswith("]"))
    assert cluster.logs("one").text == repr(["own", None, None, None, str(cluster.home), *[None] * 4])


def test_a_supervisor_keeps_nothing_of_the_shell_that_it_was_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's head, and with it every worker of every run, has what the supervisor has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETUNE_HOME", "relative")
    monkeypatch.setenv("FLEETUNE_CACHE", "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cluster = Local.here()
    (cluster.home / "runs" / "a-1").mkdir(parents=True)
    try:
        cluster.submit(cluster.request(job(workers_per_node=1), "a-1"))
        pid = cluster.state()["supervisor"]
        environment = psutil.Process(pid).environ()
    finally:
        cluster.stop()
    assert (environment["FLEETUNE_HOME"], environment.get("HF_HUB_OFFLINE")) == (str(tmp_path / "relative"), None)
    assert "FLEETUNE_CACHE" not in environment
    (queued,) = cluster.queue.list()
    folders = {"FLEETUNE_HOME": str(tmp_path / "relative"), "FLEETUNE_CACHE": str(tmp_path / "cache")}
    assert queued.environment.items() >= {**folders, "HF_HUB_OFFLINE": "1"}.items()


def test_a_cluster_that_another_host_serves_is_left_to_it(cluster: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that hosts share: whichever lock is held there, nothing here is ended or started."""
    submit(cluster, "one")
    submit(cluster, "two")
    serve(cluster).tick()
    monkeypatch.undo()  # the real start
    alive = running(cluster)
    elsewhere = json.dumps({"host": "login2", "boot_id": "other", "pid": alive["one"], "started": "1"})
    for lock in (cluster.supervisor_lock, Head(cluster.folder).lock, cluster.controller_lock("away")):
        cluster.queue.add("away", text("away", run_dir=str(cluster.home)))
        lock.write_text(elsewhere)
        with lock.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            for act in (cluster.stop, cluster.start):
                with pytest.raises(Unreachable, match=f"{lock} is held by process .* on login2; run this there"):
                    act()
            second = [sys.executable, "-m", "clusters.supervisor", str(cluster.home)]
            served = subprocess.run(second, capture_output=True, text=True)
            assert (served.returncode, served.stderr.count("\n")) == (1, 1)
            assert "on login2" in served.stderr
        lock.unlink()
    assert running(cluster) == alive
