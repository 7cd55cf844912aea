import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from clusters import process

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


def until(true: Callable[[], object], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


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


def test_a_number_that_a_stranger_has_now_is_left_alone(lock: Path) -> None:
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    lock.write_text(str(stranger.pid))
    process.end(lock)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_nobody_starts_while_the_lock_is_held(lock: Path) -> None:
    with process.held(lock):
        assert not spawn(lock)
    assert spawn(lock)
