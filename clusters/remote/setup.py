"""`python -m clusters.remote.setup FOLDER`: have an environment in a folder, made once, and show how it is made.

Who makes it (maker.py) is a detached process that holds FOLDER/lock as long as it lives and writes FOLDER/log. So one
of two who ask at once makes it and the other one waits, and who was cut off finds it again. Standard input says what
to make: {requirements, constraints, env}. There are no packages yet: this needs Python alone.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clusters.file_locks import lock_file

_LOOK_AGAIN_S = 0.1  # between two looks at the log
_INDEX = (
    "; can pip reach its index from there? variables of pip go into `env` of the cluster: "
    "PIP_INDEX_URL, PIP_FIND_LINKS, or HTTPS_PROXY"
)


def main() -> None:
    """Make the environment or wait for who makes it; a last line says why there is none."""
    folder = Path(sys.argv[1])
    wanted = json.load(sys.stdin)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "log").touch()
    if not is_ready(folder):
        _start_maker(folder, wanted)
        _show_log(folder)
    if not is_ready(folder):
        sys.exit(f"the environment was not made: {_why_not(folder)} (all of it: {folder / 'log'})")


def is_ready(folder: Path) -> bool:
    """Whether the environment of a folder is there, whole, with a Python that is still there."""
    python = folder / "ready" / "bin" / "python"
    return os.access(python, os.X_OK)


def _start_maker(folder: Path, wanted: dict[str, Any]) -> None:
    """Start who makes the environment, unless one lives or was done just now."""
    with lock_file(folder / "lock").open("a") as lock:
        if _is_held(lock.fileno(), fcntl.LOCK_EX) or is_ready(folder):
            return
        (folder / "requirements.txt").write_text(wanted["requirements"])
        (folder / "constraints.txt").write_text(wanted["constraints"])
        environment = {**os.environ, **wanted["env"]}
        with (folder / "log").open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-P", "-m", "clusters.remote.maker", str(folder)],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # it holds the lock from its first moment to its last
            )


def _show_log(folder: Path) -> None:
    """Print the log as it grows, until who makes the environment has ended."""
    with (folder / "log").open("rb") as log, lock_file(folder / "lock").open() as lock:
        lives = True
        while lives:
            lives = _is_held(lock.fileno(), fcntl.LOCK_SH)
            while data := log.read(1 << 16):
                sys.stdout.buffer.write(data)
            sys.stdout.flush()
            time.sleep(_LOOK_AGAIN_S)


def _is_held(descriptor: int, operation: int) -> bool:
    """Whether another process holds the lock on an open file; where none does, this one has it now."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _why_not(folder: Path) -> str:
    """The line of the log that says why there is no environment, and what to do."""
    text = (folder / "log").read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines or ["it was ended from outside"])[-1]
    remedy = ""
    if "No matching distribution" in reason:
        remedy = _INDEX
    return f"{reason}{remedy}"


if __name__ == "__main__":
    main()
