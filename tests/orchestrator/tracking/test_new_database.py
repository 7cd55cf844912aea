"""A SQLite store that is made: by one that is killed meanwhile, and by several at once."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from waiting import until

from orchestrator.tracking.new_database import make_database
from orchestrator.tracking.store import client

MAKE = "import sys; from orchestrator.tracking.store import client; client(sys.argv[1])"


def maker(uri: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-P", "-c", MAKE, uri])


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        if path.exists():
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("later_s", [0.0, 0.4])
def test_one_that_is_killed_leaves_none_that_is_half_made(tmp_path: Path, later_s: float) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed = maker(uri)
    until(lambda: bytes_in(tmp_path) > 100_000, 60)
    time.sleep(later_s)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert [found.name for found in client(uri).search_experiments()] == ["Default"]


def test_two_make_one(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    makers = [maker(uri) for _ in range(2)]
    assert [made.wait(120) for made in makers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert [found.name for found in client(uri).search_experiments()] == ["Default"]


def a_table(uri: str) -> None:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as made, made:
        made.execute("CREATE TABLE numbers (number)")
        made.executemany("INSERT INTO numbers VALUES (?)", [(number,) for number in range(100_000)])


def test_makers_that_end_together_stay_out_of_each_others_files(tmp_path: Path) -> None:
    file = tmp_path / "numbers.db"
    with ThreadPoolExecutor(8) as several:
        for made in [several.submit(make_database, file, a_table) for _ in range(16)]:
            made.result()
    assert list(tmp_path.iterdir()) == [file]
    with closing(sqlite3.connect(file)) as whole:
        assert whole.execute("SELECT count(*) FROM numbers").fetchone() == (100_000,)
