"""What others can read of the processes of this machine, while something is done."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PAUSE_S = 0.02


@contextmanager
def leaks(secret: bytes, holders: set[int]) -> Iterator[set[str]]:
    """Where a secret was seen in the block: in the command line of any process, or in the environment of one.

    The environment that somebody submits in is theirs: of the sessions of `holders`, and of ssh, which they talk
    through, the command lines alone are looked at.
    """
    found: set[str] = set()
    before = set(_pids())
    ended = threading.Event()

    def look_on() -> None:
        while not ended.wait(_PAUSE_S):
            found.update(_look(secret, holders, set(_pids()) - before))  # often, as most live for moments

    thread = threading.Thread(target=look_on, daemon=True)
    thread.start()
    yield found
    ended.set()
    thread.join()
    found.update(_look(secret, holders, _pids()))


def _pids() -> Iterator[int]:
    return (int(process.name) for process in Path("/proc").glob("[0-9]*"))


def _look(secret: bytes, holders: set[int], pids: Iterable[int]) -> Iterator[str]:
    for pid in pids:
        process = Path("/proc", str(pid))
        with suppress(OSError):  # it has ended
            name = (process / "comm").read_text().strip()
            if secret in (process / "cmdline").read_bytes():
                yield f"command line of {name}"
            is_holder = name == "ssh" or os.getsid(pid) in holders
            if not is_holder and secret in (process / "environ").read_bytes():
                yield f"environment of {name}"


def submit_unseen(job: Path, cluster: str, secret: str) -> str:
    """Submit a job by the command, where two variables have a secret that nobody else may see; gives the run id."""
    command = [str(Path(sys.executable).with_name("fleetune")), "submit", str(job), "--cluster", cluster]
    environment = os.environ | {"HF_TOKEN": secret, "MLFLOW_TRACKING_PASSWORD": secret}
    child = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)
    with leaks(secret.encode(), {child.pid}) as seen:
        run_id = child.communicate()[0].strip()
    assert (child.returncode, seen) == (0, set())
    return run_id


def files_with(secret: str, *folders: Path) -> list[Path]:
    """The files below some folders that have a secret in them."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]
