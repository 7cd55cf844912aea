import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from waiting import until

from clusters import holder, process
from clusters.base import Unreachable

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
FAMILY = [
    sys.executable,
    "-c",
    "import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '60']);"
    "open(sys.argv[1], 'w').write(str(p.pid)); time.sleep(60)",
]


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "lock"
    process.end(tmp_path / "lock")
    process.reap()


def spawn(lock: Path, command: list[str] = SLEEP) -> bool:
    return process.spawn(lock, command, os.environ, lock.with_suffix(".log"))


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_lock_has_one_owner_that_leads_its_session(lock: Path) -> None:
    assert process.owner(lock) is None
    assert spawn(lock)
    pid = process.owner(lock)
    assert pid and os.getsid(pid) == pid != os.getsid(0)
    assert not spawn(lock)
    assert process.owner(lock) == pid


def test_the_lock_falls_with_its_owner(lock: Path) -> None:
    spawn(lock)
    pid = process.owner(lock)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: process.owner(lock) is None)
    assert spawn(lock)
    assert process.owner(lock) not in (None, pid)


def test_many_who_start_at_once_start_one(lock: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from clusters import process;"
        "lock = Path(sys.argv[1]); print(process.spawn(lock, sys.argv[2:], os.environ, lock.with_suffix('.log')))"
    )
    starters = [
        subprocess.Popen([sys.executable, "-c", code, str(lock), *SLEEP], stdout=subprocess.PIPE) for _ in range(6)
    ]
    said = [starter.communicate()[0].strip() for starter in starters]
    assert sorted(said) == [b"False"] * 5 + [b"True"]


def test_end_kills_what_the_owner_started_also_after_its_death(lock: Path, tmp_path: Path) -> None:
    spawn(lock, [*FAMILY, str(tmp_path / "child")])
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    child, owner = int((tmp_path / "child").read_text()), process.owner(lock)
    assert owner
    os.kill(owner, signal.SIGKILL)
    until(lambda: process.owner(lock) is None)
    assert lives(child)
    process.reap()
    process.end(lock)
    assert not lives(child)
    assert lock.read_text() == ""  # the number may be given to a stranger now


HOLD = (
    "import fcntl, sys; lock = open(sys.argv[1], 'r+'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True);"
    "sys.stdin.read()"
)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else, which leads a session."""
    with subprocess.Popen(SLEEP, start_new_session=True) as found:
        yield found
        assert found.poll() is None, "a stranger was killed"
        found.kill()


@contextmanager
def held_by(lock: Path, said: str) -> Iterator[None]:
    """The lock is held by a process while its file says something."""
    lock.write_text(said)
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=-1, stdout=subprocess.PIPE) as holding:
        assert holding.stdout and holding.stdout.readline() == b"held\n"
        yield
        assert holding.poll() is None
        holding.communicate()


def said(stranger: subprocess.Popen[bytes], **changed: object) -> str:
    """What a lock file says of a holder whose number the stranger has."""
    true = {**asdict(holder.current_holder()), "pid": stranger.pid, "started": holder.start_of(stranger.pid)}
    return json.dumps({**true, **changed})


def test_a_number_that_a_stranger_has_now_is_left_alone(lock: Path, stranger: subprocess.Popen[bytes]) -> None:
    """After a death and many processes, after a reboot, on another host, and as an earlier version wrote it."""
    others = ({"started": "1"}, {"boot_id": "before"}, {"host": "elsewhere", "boot_id": "other"})
    for text in (*(said(stranger, **other) for other in others), str(stranger.pid), "{}", '{"pid": ', "[]"):
        lock.write_text(text)
        assert process.owner(lock) is None
        process.end(lock)
        assert stranger.poll() is None, text
    with held_by(lock, said(stranger, started="1")):  # as while somebody takes it who has not written yet
        assert process.owner(lock) is None
        process.end(lock)


def test_a_lock_that_another_host_holds_is_told_and_nothing_is_done(
    lock: Path, stranger: subprocess.Popen[bytes]
) -> None:
    for text, host in (
        (said(stranger, host="login2", boot_id="other"), "login2"),
        (str(stranger.pid), "an unknown host"),
    ):
        with held_by(lock, text):
            for act in (process.owner, process.end, spawn):
                with pytest.raises(Unreachable) as error:
                    act(lock)
                assert f"{lock} is held by process {stranger.pid} on {host}; run this there" in str(error.value)
            assert lock.read_text() == text


def test_nobody_starts_while_the_lock_is_held(lock: Path) -> None:
    with process.hold_lock(lock):
        assert not spawn(lock)
    assert spawn(lock)
