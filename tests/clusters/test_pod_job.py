"""What runs in the pods of a RayJob: small processes stand for controllers, and a list for Ray's nodes."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import until

from clusters import closing, pod_job, pod_leaving
from clusters.allocation import JobStart
from clusters.pod_job import PodJob, entrypoint_log
from clusters.pod_starts import begin_start, leaving_pods, note_leaving, works_now
from clusters.ray_head import Backoff
from clusters.ray_nodes import nodes_with_cores
from runfolder import chain
from runfolder.job import Job
from runfolder.site import LocalSite
from runfolder.snapshot import snapshot

JOB = Job.model_validate({"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
NAME = "a-0123456789-s1"
# A controller: it claims an attempt, says so, and waits for SIGTERM, after which the attempt has its verdict.
WAITS = """
import signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from runfolder import chain
run_dir = Path(sys.argv[1])
attempt = chain.claim_next(run_dir, None)
def end(*_):
    attempt.write_verdict({"kind": "preemption"})
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
(run_dir / f"ready-{attempt.number}").touch()
time.sleep(60)
"""
CLOSES = """
import sys
from pathlib import Path
from types import SimpleNamespace
from runfolder import chain
chain.close(Path(sys.argv[1]), {"state": "succeeded"})
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from runfolder import chain
chain.claim_next(Path(sys.argv[1]), None)
os.kill(os.getpid(), signal.SIGKILL)
"""
LOOKS = """
import sys
from pathlib import Path
from runfolder import chain
from runfolder.files import list_names
from runfolder.latest_start import is_left
run_dir = Path(sys.argv[1])
if is_left(chain.last_attempt(run_dir), list_names(run_dir)):
    (run_dir / "left").touch()
chain.close(run_dir, {"state": "succeeded"})
"""
HANGS = "import time; time.sleep(600)"
FAILS = "import sys; sys.exit(1)"
BROKEN = "import a_package_that_the_image_lacks"
DONE = "pass"
RESULT = {"state": "succeeded"}


@dataclass
class Nodes:
    """Nodes whose number the test sets."""

    alive: int = 2
    others: frozenset[str] = frozenset()
    asked: int = 0
    refuses: Exception | None = None
    silent: bool = False

    def join(self) -> None:
        if self.refuses:
            raise self.refuses

    def ids(self) -> set[str]:
        self.asked += 1
        if self.silent:
            raise RuntimeError("the head does not answer")
        return {*map(str, range(self.alive)), *self.others}


@dataclass
class Controllers:
    """The programs of a run's controllers, one after the other; the last again and again."""

    programs: list[str] = field(default_factory=list)
    started: int = 0

    def command(self, run_dir: str) -> list[str]:
        program = self.programs[min(self.started, len(self.programs) - 1)]
        self.started += 1
        return [sys.executable, "-c", program, run_dir]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, seen from a worker pod of the cluster `one`; what is waited for comes soon or never."""
    be_in("one", monkeypatch)
    monkeypatch.setattr(pod_job, "_POD_POLL_S", 0.02)
    folder = tmp_path / "runs" / "a-0123456789"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def controllers(monkeypatch: pytest.MonkeyPatch) -> Controllers:
    """Controllers that are started again at once, however soon they end."""
    programs = Controllers()
    monkeypatch.setattr(pod_job, "Backoff", partial(Backoff, 0.0))
    monkeypatch.setattr(pod_job, "controller_command", programs.command)
    return programs


def be_in(cluster: str, monkeypatch: pytest.MonkeyPatch, pod: str = "worker-1") -> None:
    """Have this process be in a pod of a cluster of Ray."""
    monkeypatch.setenv("FLEETUNE_RAY_CLUSTER", cluster)
    monkeypatch.setenv("FLEETUNE_POD", pod)


def ask_to_end(run_dir: Path, when: Callable[[], bool]) -> None:
    """Ask for the end of a run once something has come true."""
    until(when)
    LocalSite(run_dir.parent).ask(run_dir.name, "cancel")


def with_walltime(walltime: int) -> Job:
    """A job whose walltime is over for a run that began before."""
    resources = JOB.resources.model_copy(update={"walltime": walltime})
    return JOB.model_copy(update={"resources": resources})


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_the_latest_start_of_a_run_works(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begin_start(run_dir, NAME)
    assert first.is_latest() and works_now(run_dir)
    be_in("two", monkeypatch)
    second = begin_start(run_dir, NAME)
    assert second == JobStart(run_dir, 1, 1)
    assert second.is_latest() and not first.is_latest() and works_now(run_dir)
    be_in("one", monkeypatch)
    assert not works_now(run_dir)
    third = begin_start(run_dir, "a-0123456789-s2")
    assert third.is_latest() and not second.is_latest() and works_now(run_dir)


@dataclass
class Entrypoint:
    """The entrypoint of a submission as it is started in cluster after cluster; it says what it prints."""

    run_dir: Path
    nodes: Nodes
    capfd: pytest.CaptureFixture[str]

    def main(self) -> int:
        return pod_job.main(self.run_dir, NAME, 2)

    def said(self) -> str:
        log = entrypoint_log(self.run_dir.parent.parent, NAME)
        return self.capfd.readouterr().out + log.read_text()


@pytest.fixture
def entrypoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Entrypoint]:
    """An entrypoint that rests for no time, and whose run has its job."""
    nodes = Nodes()
    monkeypatch.setattr(pod_job, "_SHORTEST_REST_S", 0.0)
    monkeypatch.setattr(pod_job, "NodesOfRay", lambda: nodes)
    run_dir.rmdir()
    LocalSite(run_dir.parent).create(run_dir.name, {"cluster": "k8s", "submitted": 0.0, "job": JOB.dump()})
    streams = [os.dup(number) for number in (1, 2)]
    handler = signal.getsignal(signal.SIGTERM)
    yield Entrypoint(run_dir, nodes, capfd)
    signal.signal(signal.SIGTERM, handler)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)


def test_controllers_that_make_no_attempt_are_given_up(entrypoint: Entrypoint, controllers: Controllers) -> None:
    controllers.programs = [BROKEN]
    for number in range(1, 4):
        assert entrypoint.main() == (0 if number == 3 else 1)
        assert controllers.started == 5 * number
    hindered = snapshot(entrypoint.run_dir).hindrance
    lacks = "ModuleNotFoundError: No module named 'a_package_that_the_image_lacks'"
    assert hindered and hindered["why"] == (
        "3 starts in a row came to nothing: controllers that made no attempt at the run: 5; "
        f"the last one said: {lacks}; mend that, then: fleetune resume {entrypoint.run_dir.name}"
    )
    chain.claim_next(entrypoint.run_dir, None)
    assert snapshot(entrypoint.run_dir).hindrance is None
    assert entrypoint.main() == 1  # an attempt was made since


def test_a_controller_that_hangs_before_its_attempt_is_given_up(
    entrypoint: Entrypoint, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_job, "_BEGIN_S", 0.5)
    controllers.programs = [HANGS]
    assert [entrypoint.main() for _ in range(3)] == [1, 1, 0]
    assert controllers.started == 3  # one in each cluster: what hangs there does so again
    hindered = snapshot(entrypoint.run_dir).hindrance
    assert hindered and "a controller did nothing for 0 s, and was killed" in hindered["why"]


def test_a_controller_has_all_the_time_for_an_attempt_that_it_has_begun(
    run_dir: Path, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_job, "_BEGIN_S", 600.0)
    controllers.programs = [WAITS]
    nodes = Nodes()
    job = PodJob(begin_start(run_dir, NAME), nodes, 2)
    keeping = in_thread(job.keep)
    until((run_dir / "ready-1").exists)
    monkeypatch.setattr(pod_job, "_BEGIN_S", 0.0)
    asked = nodes.asked
    until(lambda: nodes.asked > asked + 20 or not keeping.is_alive())
    assert keeping.is_alive() and chain.last_attempt(run_dir).verdict is None
    job.told.set()
    keeping.join(30)


def test_what_a_controller_without_words_ends_with_is_said(
    entrypoint: Entrypoint, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    controllers.programs = [BROKEN, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(pod_job, "_MOST_FRUITLESS", 2)
    assert entrypoint.main() == 1
    hindered = snapshot(entrypoint.run_dir).hindrance
    assert hindered and hindered["why"].endswith("the last one said: exit code -9")


def test_a_cancel_ends_what_no_controller_can(
    entrypoint: Entrypoint, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controllers cannot start, so the entrypoint itself closes the run."""
    controllers.programs = [BROKEN]
    monkeypatch.setattr(closing, "controller_command", controllers.command)
    monkeypatch.setattr(pod_job, "_SHORTEST_REST_S", 600.0)
    asking = in_thread(lambda: ask_to_end(entrypoint.run_dir, lambda: controllers.started > 1))
    assert entrypoint.main() == 0
    asking.join()
    ended = chain.result(entrypoint.run_dir)
    assert ended and ended["state"] == "cancelled"
    assert "cancelled by request" in ended["reason"] and "a_package_that_the_image_lacks" in ended["reason"]


@pytest.mark.parametrize("waits", ["for nodes", "at rest", "for its next controller"])
def test_a_cancel_ends_what_waits(
    waits: str, entrypoint: Entrypoint, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    controllers.programs = [FAILS]
    if waits == "for nodes":
        entrypoint.nodes.alive = 1
    elif waits == "at rest":
        monkeypatch.setattr(pod_job, "_SHORTEST_REST_S", 600.0)
        monkeypatch.setattr(pod_job, "_MOST_FRUITLESS", 1)
    else:
        monkeypatch.setattr(Backoff, "ready", lambda _: controllers.started == 0)
    until_it_waits = {"for nodes": lambda: entrypoint.nodes.asked > 2}.get(waits, lambda: controllers.started > 0)
    asking = in_thread(lambda: ask_to_end(entrypoint.run_dir, until_it_waits))
    assert entrypoint.main() == 0
    asking.join()
    ended = chain.result(entrypoint.run_dir)
    assert ended and (ended["state"], ended["reason"]) == ("cancelled", "cancelled by request")


def test_a_walltime_ends_what_waits_for_nodes(entrypoint: Entrypoint, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.claim_next(entrypoint.run_dir, None)
    entrypoint.nodes.alive = 1
    monkeypatch.setattr(pod_job, "load_any_job", lambda _: with_walltime(1))
    assert entrypoint.main() == 0
    ended = chain.result(entrypoint.run_dir)
    assert ended and (ended["state"], ended["verdict"], ended["attempt"]) == ("failed", "walltime", 1)
    assert ended["reason"].startswith("resources.walltime of 1 s is over")


def test_what_ray_raises_is_said_and_rested_for(entrypoint: Entrypoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[float] = []
    monkeypatch.setattr(pod_job, "_SHORTEST_REST_S", 15.0)
    monkeypatch.setattr(PodJob, "_wait_for", lambda _job, _condition, rest_s: rested.append(rest_s))
    entrypoint.nodes.refuses = RuntimeError("Version mismatch: Ray: 2.59.0")
    assert [entrypoint.main() for _ in range(3)] == [1, 1, 0]
    assert rested == [15.0, 30.0]
    assert "RuntimeError: Version mismatch: Ray: 2.59.0" in entrypoint.said()
    entrypoint.nodes.refuses = ConnectionError("no head there")
    entrypoint.main()
    said = entrypoint.said()
    assert "ConnectionError: no head there" in said and "run folder cannot be used" not in said


def test_a_question_that_ray_does_not_answer_ends_no_controller(
    entrypoint: Entrypoint, controllers: Controllers
) -> None:
    controllers.programs = [WAITS]
    job = PodJob(begin_start(entrypoint.run_dir, NAME), entrypoint.nodes, 2)
    keeping = in_thread(job.keep)
    until((entrypoint.run_dir / "ready-1").exists)
    entrypoint.nodes.silent = True
    asked = entrypoint.nodes.asked
    until(lambda: entrypoint.nodes.asked > asked + 5 or not keeping.is_alive())
    assert keeping.is_alive() and controllers.started == 1
    assert chain.last_attempt(entrypoint.run_dir).verdict is None
    job.told.set()
    keeping.join(30)
    assert chain.last_attempt(entrypoint.run_dir).verdict is not None


def test_a_run_that_was_started_again_is_left_alone(run_dir: Path, controllers: Controllers) -> None:
    earlier = begin_start(run_dir, NAME)
    begin_start(run_dir, NAME)
    assert PodJob(earlier, Nodes(), 2).keep() == 0
    assert controllers.started == 0


def test_the_controller_is_started_until_the_run_has_its_result(run_dir: Path, controllers: Controllers) -> None:
    controllers.programs = [FAILS, DONE, CLOSES]
    assert PodJob(begin_start(run_dir, NAME), Nodes(), 2).keep() == 0
    assert controllers.started == 3
    assert chain.result(run_dir) == RESULT


def test_an_attempt_is_left_once_the_next_controller_starts(run_dir: Path, controllers: Controllers) -> None:
    controllers.programs = [KILLED, LOOKS]
    assert PodJob(begin_start(run_dir, NAME), Nodes(), 2).keep() == 0
    assert (run_dir / "left").exists()


def test_what_has_lost_a_pod_for_long_goes_to_a_new_cluster(
    run_dir: Path, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_job, "_REPLACED_S", 0.0)
    job = PodJob(begin_start(run_dir, NAME), Nodes(alive=1), 2)
    assert job.keep() == 1
    assert controllers.started == 0
    job.told.set()
    assert job.rest() == 1


def test_it_waits_for_the_pod_that_replaces_a_lost_one(run_dir: Path, controllers: Controllers) -> None:
    controllers.programs = [CLOSES]
    nodes = Nodes(alive=1)
    waiting = in_thread(PodJob(begin_start(run_dir, NAME), nodes, 2).keep)
    until(lambda: nodes.asked > 3)
    assert controllers.started == 0
    nodes.alive = 2
    waiting.join(30)
    assert controllers.started == 1


def test_a_controller_that_waits_for_a_lost_pod_is_killed(
    run_dir: Path, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_job, "_POD_LOSS_S", 0.0)
    controllers.programs = ["import time; time.sleep(60)", CLOSES]
    nodes = Nodes()
    keeping = in_thread(PodJob(begin_start(run_dir, NAME), nodes, 2).keep)
    until(lambda: controllers.started == 1)
    nodes.alive = 1
    asked = nodes.asked
    until(lambda: nodes.asked > asked + 3)
    nodes.alive = 2
    keeping.join(30)
    assert controllers.started == 2


def test_a_pod_that_must_end_has_the_run_saved_and_goes(run_dir: Path, controllers: Controllers) -> None:
    controllers.programs = [WAITS, CLOSES]
    nodes = Nodes()
    job = PodJob(begin_start(run_dir, NAME), nodes, 2)
    keeping = in_thread(job.keep)
    until((run_dir / "ready-1").exists)
    pod_leaving.main(run_dir, 30)
    verdict = chain.last_attempt(run_dir).verdict
    assert verdict and verdict["kind"] == "preemption"
    assert leaving_pods(run_dir) == {"worker-1"}
    asked = nodes.asked
    until(lambda: nodes.asked > asked + 50)
    assert controllers.started == 1  # the pod is still there, and the next attempt would lose it
    nodes.alive = 1
    until(lambda: not job.awaits_end)
    nodes.alive = 2
    keeping.join(30)
    assert controllers.started == 2


def test_what_replaces_a_pod_may_be_there_before_that_is_gone(run_dir: Path, controllers: Controllers) -> None:
    controllers.programs = [WAITS, CLOSES]
    nodes = Nodes()
    keeping = in_thread(PodJob(begin_start(run_dir, NAME), nodes, 2).keep)
    until((run_dir / "ready-1").exists)
    pod_leaving.main(run_dir, 30)
    nodes.others = frozenset({"another"})
    asked = nodes.asked
    until(lambda: nodes.asked > asked + 50)
    assert controllers.started == 1
    nodes.alive = 1
    keeping.join(30)
    assert controllers.started == 2


def test_a_pod_that_has_ended_is_no_warning_to_the_next_controller(run_dir: Path, controllers: Controllers) -> None:
    controllers.programs = [WAITS, WAITS]
    nodes = Nodes()
    job = PodJob(begin_start(run_dir, NAME), nodes, 2)
    keeping = in_thread(job.keep)
    until((run_dir / "ready-1").exists)
    note_leaving(run_dir)
    until(lambda: job.awaits_end)
    nodes.alive = 1
    until(lambda: not job.awaits_end)
    nodes.alive = 2
    until((run_dir / "ready-2").exists)
    asked = nodes.asked
    until(lambda: nodes.asked > asked + 20)
    assert chain.last_attempt(run_dir).verdict is None
    job.told.set()
    keeping.join(30)
    assert not keeping.is_alive() and controllers.started == 2


def test_a_pod_that_has_left_before_this_start_is_no_news(
    run_dir: Path, controllers: Controllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the head pod that was drained: its successor in the same cluster has this entrypoint."""
    be_in("one", monkeypatch, pod="head-1")
    note_leaving(run_dir)
    be_in("one", monkeypatch, pod="head-2")
    controllers.programs = [WAITS]
    nodes = Nodes()
    job = PodJob(begin_start(run_dir, NAME), nodes, 2)
    keeping = in_thread(job.keep)
    until((run_dir / "ready-1").exists)
    asked = nodes.asked
    until(lambda: nodes.asked > asked + 20)
    assert job.awaits_end == 0 and chain.last_attempt(run_dir).verdict is None
    job.told.set()
    keeping.join(30)


def test_an_entrypoint_that_is_told_to_end_passes_it_on(run_dir: Path, controllers: Controllers) -> None:
    controllers.programs = [WAITS]
    job = PodJob(begin_start(run_dir, NAME), Nodes(), 2)
    codes: list[int] = []
    keeping = in_thread(lambda: codes.append(job.keep()))
    until((run_dir / "ready-1").exists)
    job.told.set()
    keeping.join(30)
    assert codes == [1]
    assert chain.last_attempt(run_dir).verdict is not None


@pytest.mark.parametrize("state", ["no attempt", "verdict", "result", "another cluster", "no start"])
def test_a_pod_ends_at_once_where_there_is_nothing_to_save(
    state: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state != "no start":
        begin_start(run_dir, NAME)
    attempt = None if state == "no attempt" else chain.claim_next(run_dir, None)
    if state == "verdict" and attempt:
        attempt.write_verdict({"kind": "node_lost"})
    if state == "result" and attempt:
        attempt.close(RESULT)
    if state == "another cluster":
        be_in("two", monkeypatch)
    pod_leaving.main(run_dir, 3600)
    assert leaving_pods(run_dir) == set()


def test_a_pod_waits_no_longer_than_it_may(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_leaving, "_VERDICT_S", 0.0)
    begin_start(run_dir, NAME)
    chain.claim_next(run_dir, None)
    pod_leaving.main(run_dir, 0)
    assert leaving_pods(run_dir) == {"worker-1"}


def test_a_head_without_cores_is_no_node_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeID": "head", "Alive": True, "Resources": {"memory": 1.0}},
        {"NodeID": "worker", "Alive": True, "Resources": {"CPU": 16.0}},
        {"NodeID": "lost", "Alive": False, "Resources": {"CPU": 16.0}},
    ]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: nodes))
    assert nodes_with_cores() == 1
