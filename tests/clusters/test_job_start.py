"""Which start of a batch job works, and what SLURM is asked. A script stands for SLURM's commands, which says what no
real slurmctld says on demand."""

from pathlib import Path

import pytest

from clusters import requeue as requeueing
from clusters.job_start import JobStart
from clusters.requeue import requeue
from clusters.slurm import Slurm
from clusters.slurm_script import SlurmConfig

RUN_ID = "sums-0123456789"
AWAY = 'echo "slurm_requeue error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets what scontrol is asked; programs are looked for in `tmp_path`/bin first."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    monkeypatch.setattr(requeueing, "_REPEAT_S", 0.01)
    (tmp_path / "bin").mkdir()
    return tmp_path / "asked"


def program(asked: Path, name: str, script: str) -> None:
    """Make a program that writes down its arguments, and then does what a line of sh says."""
    path = asked.parent / "bin" / name
    path.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n{script}\n')
    path.chmod(0o755)


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


def test_a_job_that_slurm_holds_since_a_node_could_not_start_it_is_let_go_on(tmp_path: Path, asked: Path) -> None:
    program(asked, "squeue", f"echo '4|PENDING|launch failed requeued held|N/A|{RUN_ID}-s1'")
    program(asked, "scontrol", ":")
    slurm = Slurm(SlurmConfig(kind="slurm", root=str(tmp_path)), tmp_path)
    status = slurm.status([RUN_ID])[RUN_ID]
    assert (status.state, status.stuck) == ("queued", False)
    assert status.reason == "SLURM job 4: a node could not start it, and SLURM held it; it is let go on"
    assert asked.read_text().splitlines()[-1] == "release 4"
