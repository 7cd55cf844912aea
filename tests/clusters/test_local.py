"""The queue and the supervisor's choices, without Ray: a sleeping process stands for a controller."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_cluster import entry, job, make_run_dir, running, serve, submit, text
from waiting import until

from clusters import environment, machine, process, ray_head, ray_start
from clusters import local as local_module
from clusters.base import SubmissionRefused, Unreachable
from clusters.entry import Queue, queued_run
from clusters.local import Local
from clusters.ray_head import Backoff, Head
from clusters.supervisor import Supervisor, fitting
from runfolder import chain
from runfolder.delivered import note_delivered
from runfolder.requests import request_cancel
from runfolder.snapshot import snapshot

SUBMIT = (
    "import sys; from pathlib import Path;"
    "from clusters.base import ClusterRequest; from clusters.local import Local;"
    "home, run_id, text = Path(sys.argv[1]), *sys.argv[2:];"
    "Local(home).submit(ClusterRequest(run_id, 1, str(home / 'runs' / run_id), text))"
)


def test_a_request_is_pure_and_all_that_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.SETTINGS, *environment.SECRETS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NCCL_DEBUG", "of the shell")
    wanted = job(workers_per_node=2).model_copy(update={"env": {"NCCL_DEBUG": "WARN"}})
    cluster = Local(tmp_path / "home")
    secrets = environment.secret_names(os.environ)
    request = cluster.request(wanted, "a-1", 1, secrets)
    assert request == cluster.request(wanted, "a-1", 1, secrets)
    assert list(tmp_path.iterdir()) == []
    assert (request.name, request.secrets) == ("a-1-s1", ("HF_TOKEN",))
    shown = request.text.replace(str(cluster.home), "HOME").replace(sys.executable, "PYTHON")
    assert shown == (Path(__file__).parent / "golden" / "local.json").read_text().strip()
    monkeypatch.setattr(Local, "start", lambda _: None)
    cluster.submit(request)
    assert (cluster.folder / "queue" / "a-1.json").read_text() == request.text


def test_what_never_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "total_capacity", lambda: ("gpu", 2))
    with pytest.raises(SubmissionRefused, match="found 4 workers of one GPU each; this machine has 2"):
        Local(tmp_path).request(job(gpus_per_node=4), "a-1")
    assert json.loads(Local(tmp_path).request(job(gpus_per_node=2), "a-1").text)["workers"] == 2
    monkeypatch.setattr(local_module, "total_capacity", lambda: ("cpu", 2))
    with pytest.raises(SubmissionRefused, match=r"found 64 workers; this machine has 2 cores: allowed are at most 8"):
        Local(tmp_path).request(job(workers_per_node=64), "a-1")
    with pytest.raises(SubmissionRefused, match=r"resources\.gpus_per_node: found 4; this machine has no GPU"):
        Local(tmp_path).request(job(gpus_per_node=4), "a-1")
    assert json.loads(Local(tmp_path).request(job(workers_per_node=4), "a-1").text)["workers"] == 4


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEETUNE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(Unreachable, match="this user has no home; set FLEETUNE_HOME"):
        Local.here()


def test_a_repeated_submission_keeps_its_turn(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    for run_id in ("b", "a", "b"):
        queue.add(run_id, text(run_id))
        time.sleep(0.02)  # more than a tick of the clock that files have
    assert [e.run_id for e in queue.list()] == ["b", "a"]


def test_an_entry_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    Queue(tmp_path).add("a", text("a"))
    assert (tmp_path / "a.json").stat().st_mode & 0o077 == 0


def test_a_reopened_run_stays_queued(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue")
    run_dir = make_run_dir(tmp_path / "a", job())
    queue.add("a", text("a", run_dir=str(run_dir)))
    assert chain.close(run_dir, {"state": "failed"})
    (seen,) = queue.list()
    assert queued_run(seen).finished and not queued_run(seen).settled
    assert chain.reopen(run_dir)
    queue.remove(seen)
    assert [e.run_id for e in queue.list()] == ["a"]


def test_nobody_overtakes_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "total_capacity", lambda: ("cpu", 4))
    line = [entry("a", 2), entry("b", 3), entry("c", 1)]
    assert [e.run_id for e in fitting(line, 4)] == ["a"]
    assert [e.run_id for e in fitting(line, 6)] == ["a", "b", "c"]
    huge = entry("huge", 64)
    assert fitting([huge], 4) == [huge]
    assert fitting([huge], 3) == []


def test_runs_start_in_order_as_they_fit(cluster: Local) -> None:
    served = serve(cluster)
    first = submit(cluster, "first", 2)
    submit(cluster, "second", 2)
    submit(cluster, "third", 1)
    served.tick()
    assert list(running(cluster)) == ["first"]
    told = cluster.status(["first", "second", "nobody"])
    assert told["first"].state == "running"
    assert told["nobody"].state == "unknown"
    assert (told["second"].state, cluster.capacity().free) == ("queued", 0)
    assert chain.close(first, {"state": "succeeded", "reason": None})
    served.tick()
    # The controller may stay to deliver; its workers are gone.
    delivering = running(cluster)
    assert list(delivering) == ["first", "second"]
    process.end(cluster.controller_lock("first"))
    until(lambda: served.tick() or running(cluster).get("first", delivering["first"]) != delivering["first"])
    note_delivered(first, "abc")
    process.end(cluster.controller_lock("first"))
    served.tick()
    assert [e.run_id for e in cluster.queue.list()] == ["second", "third"]
    assert cluster.status(["first"])["first"].state == "ended"


def test_a_dead_controller_is_started_again_and_a_living_one_adopted(cluster: Local) -> None:
    submit(cluster, "one", 1)
    submit(cluster, "two", 1)
    serve(cluster).tick()
    before = running(cluster)
    folders = [cluster.site.root / "one", cluster.site.root / "two"]
    for run_dir in folders:
        chain.claim_next(run_dir, None)
    process.end(cluster.controller_lock("one"))
    process.reap()
    serve(cluster).tick()  # another supervisor, as after a kill
    after = running(cluster)
    assert after["two"] == before["two"]
    assert after["one"] != before["one"]
    assert [snapshot(run_dir).left for run_dir in folders] == [True, False], "of which attempt the controller is gone"


def test_a_cancelled_run_gets_its_controller_without_waiting(cluster: Local) -> None:
    served = serve(cluster)
    submit(cluster, "first", 2)
    second = submit(cluster, "second", 2)
    served.tick()
    assert list(running(cluster)) == ["first"]
    request_cancel(second)
    served._head.keep = lambda: None  # type: ignore[method-assign]
    cluster.cancel("second")
    served.tick()
    assert list(running(cluster)) == ["first", "second"]


def test_what_keeps_dying_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    backoff = Backoff()
    delays = []
    for _ in range(7):
        assert backoff.ready()
        backoff.began()
        now[0] += 1
        died = now[0]
        while not backoff.ready():
            now[0] += 0.5
        delays.append(now[0] - died)
    assert delays == [1, 2, 4, 8, 16, 30, 30]
    backoff.began()
    now[0] += 100
    assert backoff.ready()
    backoff.began()
    backoff.succeeded()
    assert backoff.ready()


def test_a_head_that_dies_at_each_start_is_told_and_tried_again(
    cluster: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real Ray, whose command line is wrong for a while."""
    submit(cluster, "one", 1)
    monkeypatch.setattr(ray_start, "OBJECT_STORE_BYTES", "much")
    monkeypatch.setattr(process, "owner", lambda lock, real=process.owner: real(lock) or _supervisor(cluster, lock))
    served = Supervisor(cluster)
    until(lambda: served.tick() or cluster.status(["one"])["one"].stuck, 60)
    told = cluster.status(["one"])["one"]
    assert told.state == "queued"
    assert re.match(r"Ray did not start, \d times in a row: Error: Invalid value .*much", told.reason)
    assert cluster.state()["trouble"] == told.reason
    assert not running(cluster)

    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(Head, "_command", lambda *_: sleeper)
    monkeypatch.setattr(Head, "address", lambda _: "127.0.0.1:1")
    monkeypatch.setattr(ray_head, "answers", lambda _: True)
    until(lambda: served.tick() or running(cluster), 60)
    assert cluster.state()["trouble"] is None


def _supervisor(cluster: Local, lock: Path) -> int | None:
    """The test is the supervisor."""
    return os.getpid() if lock == cluster.supervisor_lock else None


def test_the_heads_folder_is_short_and_nobodys_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / ("x" * 120)
    named.mkdir()
    monkeypatch.setenv("TMPDIR", str(named))
    monkeypatch.setattr(Head, "_command", lambda *_: ["true"])
    head = Head(tmp_path)
    head.keep()
    folder = head.short_folder
    assert folder and folder.stat().st_mode & 0o077 == 0
    assert len(str(head.ray_folder)) < 40
    short = Path(head.environment()["TMPDIR"])
    assert len(str(short)) < 60
    (short / "file").touch()
    assert (named / "file").exists()
    until(lambda: head.keep() or head.failed_starts(), 60)
    assert head.short_folder == folder  # controllers of this cluster use it, too
    head.end()
    assert not folder.exists() and (named / "file").exists()
    folder.symlink_to(named)  # what a stranger does to a name that is free again
    until(lambda: head.keep() or head.short_folder)
    assert head.short_folder != folder
    head.end()
    assert folder.is_symlink() and (named / "file").exists()
    folder.unlink()


def test_a_client_that_is_killed_anywhere_and_repeats_submits_once(tmp_path: Path) -> None:
    """With the real supervisor: one of it, one entry, whenever the client died."""
    cluster = Local(tmp_path)
    (tmp_path / "runs" / "a-1").mkdir(parents=True)
    request = cluster.request(job(workers_per_node=2), "a-1")
    rng = random.Random(0)
    supervisors = set()
    try:
        for turn in range(8):
            command = [sys.executable, "-c", SUBMIT, str(tmp_path), "a-1", request.text]
            client = subprocess.Popen(command, env=os.environ)
            if turn < 7:
                time.sleep(rng.uniform(0.1, 0.5))
                client.kill()
            assert client.wait() in (0, -9)
            supervisors.add(cluster.state()["supervisor"])
        assert [e.run_id for e in cluster.queue.list()] == ["a-1"]
        assert len(supervisors - {None}) == 1
    finally:
        cluster.stop()
    assert cluster.state()["supervisor"] is cluster.state()["head"] is None
    assert cluster.status(["a-1"])["a-1"].state == "queued"
