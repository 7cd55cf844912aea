"""Which start of a batch job works, and when it has to stop; programs stand for SLURM's commands."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from programs import program
from waiting import until

from clusters import allocation, job_start
from clusters import requeue as requeueing
from clusters.allocated_nodes import AllocatedNodes
from clusters.allocation import keep_controller, warnings
from clusters.base import Unreachable
from clusters.controllers import REQUEUE, end_of_allocation
from clusters.first_node import reachable_address
from clusters.job_start import JobStart
from clusters.requeue import requeue
from runfolder.chain import claim_next
from runfolder.snapshot import snapshot

pytestmark = pytest.mark.usefixtures("running")
AWAY = 'echo "slurm_requeue error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


@pytest.fixture
def running(asked: Path) -> None:
    """SLURM says that the job runs."""
    in_state(asked, "RUNNING|None")


def in_state(asked: Path, said: str) -> None:
    """Have squeue say what state the job is in, and why."""
    program(asked.with_name("asked.squeue"), "squeue", f"echo '{said}'")


def start(tmp_path: Path, requeues: int) -> JobStart:
    """A start of the run that has noted itself."""
    noted = JobStart(tmp_path, 1, requeues)
    noted.note()
    return noted


def test_a_later_requeue_and_a_later_submission_are_later_starts(tmp_path: Path) -> None:
    first = start(tmp_path, 0)
    assert first.is_latest()
    second = start(tmp_path, 1)
    assert second.is_latest() and not first.is_latest()
    JobStart(tmp_path, 2, 0).note()
    assert not second.is_latest()


def test_a_node_asks_until_slurm_hears_it(tmp_path: Path, asked: Path) -> None:
    program(asked, "scontrol", f'[ "$(wc -l < {asked})" -ge 3 ] || {{ {AWAY}; }}')
    assert requeue(start(tmp_path, 0)) == 0
    assert asked.read_text().splitlines() == ["requeue 4"] * 3


def test_a_node_asks_again_where_slurm_does_not_answer(
    tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeueing, "_QUESTION_S", 2.0)
    program(asked, "scontrol", f'[ "$(wc -l < {asked})" -ge 2 ] || exec sleep 60')
    assert requeue(start(tmp_path, 0)) == 0
    assert asked.read_text().count("requeue 4\n") > 1


@pytest.mark.parametrize(
    ("said", "is_asked"),
    [("COMPLETING|None", False), ("CANCELLED|None", False), ("COMPLETING|TimeLimit", True), ("", True)],
)
def test_a_job_that_was_cancelled_by_hand_does_not_come_back(
    said: str, is_asked: bool, tmp_path: Path, asked: Path
) -> None:
    program(asked, "scontrol", ":")
    in_state(asked, said)
    assert requeue(start(tmp_path, 0)) == 0
    assert asked.exists() == is_asked


def test_a_node_without_the_commands_of_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unreachable, match="SLURM: squeue: No such file or directory"):
        requeue(start(tmp_path, 0))


def test_what_slurm_refuses_is_told(tmp_path: Path, asked: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program(asked, "scontrol", 'echo "Job is pending execution for job 4" >&2; exit 1')
    assert requeue(start(tmp_path, 0)) == 1
    assert "Job is pending execution" in capfd.readouterr().out


def test_a_node_that_slurm_does_not_hear_stops_once_the_run_was_started_again(tmp_path: Path, asked: Path) -> None:
    program(asked, "scontrol", f'touch "{tmp_path}/starts/1.1"; {AWAY}')
    assert requeue(start(tmp_path, 0)) == 0
    assert asked.read_text().splitlines() == ["requeue 4"]
    assert requeue(start(tmp_path, 0)) == 0
    assert asked.read_text().splitlines() == ["requeue 4"]


def test_a_node_that_slurm_hears_late_does_not_end_the_next_start(tmp_path: Path, asked: Path) -> None:
    """It was cut off while it asked about its job, and the run was started again before the answer came."""
    program(asked, "scontrol", ":")
    program(asked.with_name("asked.squeue"), "squeue", f'touch "{tmp_path}/starts/1.1"; echo "RUNNING|None"')
    assert requeue(start(tmp_path, 0)) == 0
    assert not asked.exists()


def test_a_node_asks_for_nothing_before_slurm_hears_it(tmp_path: Path, asked: Path) -> None:
    """A request that waits for the network to come back may reach SLURM when the next start is under way."""
    heard = asked.with_name("asked.squeue")
    program(asked, "scontrol", ":")
    away = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
    program(heard, "squeue", f'[ "$(wc -l < {heard})" -ge 2 ] || {{ {away}; }}; echo "RUNNING|None"')
    assert requeue(start(tmp_path, 0)) == 0
    assert len(heard.read_text().splitlines()) == 2
    assert asked.read_text() == "requeue 4\n"


def test_a_full_disk_keeps_no_job_from_the_queue(
    tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job_start, "refresh", full)
    program(asked, "scontrol", ":")
    assert requeue(start(tmp_path, 0)) == 0
    assert asked.read_text() == "requeue 4\n"


def test_starts_that_make_no_attempt_are_counted(tmp_path: Path) -> None:
    claim_next(tmp_path, None)
    counts = [start(tmp_path, requeues).fruitless() for requeues in (0, 1, 3)]  # SLURM could not start one
    assert counts == [0, 1, 2]
    claim_next(tmp_path, None)
    assert start(tmp_path, 4).fruitless() == 0
    assert start(tmp_path, 5).fruitless() == 1
    noted = JobStart(tmp_path, 2, 0)
    noted.note()
    assert noted.fruitless() == 0


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of one node."""
    job = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}}
    folder = tmp_path / "sums-0123456789"
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump({"cluster": "hpc", "submitted": 0.0, "job": job}))
    return folder


def test_a_job_whose_starts_make_no_attempt_ends(
    run_dir: Path, asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(asked, "srun", "exit 1")
    for requeues in range(5):
        start(run_dir, requeues)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    assert allocation.main(run_dir, f"{run_dir.name}-s1", [sys.executable]) == 1
    said = capsys.readouterr().out
    assert "5 starts in a row made no attempt" in said and f"fleetune resume {run_dir.name}" in said


def test_a_run_folder_that_is_no_folder_is_told(
    run_dir: Path, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not asked.exists()
    (run_dir / "submissions").write_text("")
    assert allocation.main(run_dir, f"{run_dir.name}-s1", [sys.executable]) == 1
    assert capsys.readouterr().out.startswith("the run folder cannot be used: ")


def test_controllers_that_make_no_attempt_give_the_nodes_back(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter([1] * 100)
    monkeypatch.setattr(allocation, "run_controller", lambda *_: next(codes))
    monkeypatch.setattr(allocation, "Backoff", ReadyAtOnce)
    monkeypatch.setattr(AllocatedNodes, "settled_count", lambda _: 1)
    assert keep_controller(start(run_dir, 0), AllocatedNodes([]), threading.Event(), ["true"]) == REQUEUE
    assert "5 controllers in a row made no attempt" in capsys.readouterr().out
    assert len(list(codes)) == 95


def test_an_attempt_is_left_once_its_job_or_its_controller_is_started_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was lost, or its controller killed, so that nobody has said how it ended."""
    start(run_dir, 0)
    claim_next(run_dir, None)
    assert not snapshot(run_dir).left
    again = start(run_dir, 1)
    assert snapshot(run_dir).left
    seen = []

    def controller(*_: object) -> int:
        seen.append(snapshot(run_dir).left)
        claim_next(run_dir, None)
        return 0 if len(seen) == 2 else -9

    monkeypatch.setattr(allocation, "run_controller", controller)
    monkeypatch.setattr(allocation, "Backoff", ReadyAtOnce)
    monkeypatch.setattr(AllocatedNodes, "settled_count", lambda _: 1)
    assert keep_controller(again, AllocatedNodes([]), threading.Event(), ["true"]) == 0
    assert seen == [True, True] and not snapshot(run_dir).left


class ReadyAtOnce:
    """A backoff that waits for nothing."""

    def ready(self) -> bool:
        """Whether it may be started now."""
        return True

    def began(self) -> None:
        """Take note of nothing."""


def test_a_warning_before_python_listens_is_not_lost(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("FLEETUNE_ALLOCATION_END", "")  # which is set here
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3600))
    program(asked, "srun", "cat >/dev/null")
    program(asked, "squeue", f'[ -z "$SQUEUE_FORMAT" ] && echo {end}')
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        for before_end_s, is_told in ((3000, False), (3700, True)):
            told = threading.Event()
            with warnings(told, before_end_s):
                assert told.wait(10 if is_told else 0) == is_told
                assert abs(end_of_allocation() - time.time() - 3600) < 60
        told = threading.Event()
        program(asked, "squeue", "echo NONE")
        with warnings(told, 90):
            os.kill(os.getpid(), signal.SIGUSR1)
            until(told.is_set)
            ignored = subprocess.run(["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True).stdout
            assert int(ignored.split()[1], 16) & 1 << signal.SIGUSR1 - 1 == 0  # what starts here hears it
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_node_of_several_whose_address_is_its_own_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = iter(["127.0.1.1", "10.0.0.1", "127.0.1.1"])
    monkeypatch.setattr(socket, "gethostbyname", lambda _: next(addresses))
    assert reachable_address() == "127.0.1.1"
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert reachable_address() == "10.0.0.1"
    with pytest.raises(SystemExit, match="127.0.1.1 as its address, where no other node reaches it: .*/etc/hosts"):
        reachable_address()
