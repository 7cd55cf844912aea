"""The folders of allocations whose owners were killed: removed by a later start, and never those of the living."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import program

from clusters import own_folder as own_folders
from clusters.holder import Holder, boot_id
from clusters.node_folder import make_node_folder, remove_folders_of_job
from clusters.own_folder import own_folder

OWNER = """
import sys, time
from pathlib import Path
from clusters.node_folder import make_node_folder
print(make_node_folder(Path(sys.argv[1])), flush=True)
time.sleep(600)
"""
Begin = Callable[[str], tuple[Path, subprocess.Popen[str]]]


@pytest.fixture
def begin(tmp_path: Path, asked: Path) -> Iterator[Begin]:
    """Start an owner of a folder, for a job; it is killed at the end."""
    program(asked, "squeue", "exit 1")
    owners: list[subprocess.Popen[str]] = []

    def begin(job_id: str) -> tuple[Path, subprocess.Popen[str]]:
        environment = os.environ | {"SLURM_JOB_ID": job_id}
        command = [sys.executable, "-c", OWNER, str(tmp_path)]
        owner = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        owners.append(owner)
        assert owner.stdout
        return Path(owner.stdout.readline().strip()), owner

    yield begin
    for owner in owners:
        owner.kill()
        owner.communicate()


def test_the_next_start_removes_what_a_killed_owner_left(begin: Begin, tmp_path: Path) -> None:
    (living, _), (left, killed) = begin("7"), begin("8")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (left / "token").touch()
    own = make_node_folder(tmp_path)
    assert {*tmp_path.glob(".ray-*")} == {living, own}


def folder_of(home: Path, job_id: str, owner: Holder | None) -> Path:
    """A folder of a job, as an owner leaves it."""
    folder = home / f".ray-{job_id}-abc"
    folder.mkdir()
    if owner:
        (folder / "owner").write_bytes(owner.dump())
    return folder


def test_of_an_owner_elsewhere_slurm_knows(tmp_path: Path, asked: Path) -> None:
    elsewhere = Holder("node9", "another boot", os.getpid(), "1")
    living, ended = folder_of(tmp_path, "7", elsewhere), folder_of(tmp_path, "8", elsewhere)
    unnamed, new = folder_of(tmp_path, "other", elsewhere), folder_of(tmp_path, "9", None)
    program(asked, "squeue", "echo slurmctld is away >&2; exit 1")
    own = make_node_folder(tmp_path)
    assert {*tmp_path.glob(".ray-*")} == {living, ended, unnamed, new, own}
    program(asked, "squeue", "echo 7; echo 9; echo 4")
    make_node_folder(tmp_path)
    assert not ended.exists() and living.exists() and new.exists() and unnamed.exists() and own.exists()


def test_a_number_that_another_process_has_now_is_no_living_owner(tmp_path: Path, asked: Path) -> None:
    program(asked, "squeue", "echo 7")
    left = folder_of(tmp_path, "7", Holder(socket.gethostname(), boot_id(), os.getpid(), "before"))
    make_node_folder(tmp_path)
    assert not left.exists()


def test_the_end_of_a_run_removes_what_its_earlier_starts_left(tmp_path: Path) -> None:
    own, other = folder_of(tmp_path, "7", None), folder_of(tmp_path, "77", None)
    remove_folders_of_job(tmp_path, "7")
    assert not own.exists() and other.exists()


def test_an_own_folder_goes_with_its_process_or_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_folders, "_PARENT", tmp_path)
    left = tmp_path / "ft-ray-left"
    left.mkdir()
    (left / "lock").touch()
    with own_folder("ft-ray-") as first, own_folder("ft-ray-") as second, own_folder("ft-warned-"):
        assert not left.exists() and first.exists() and second.exists()
    assert not list(tmp_path.iterdir())
