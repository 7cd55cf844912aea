"""`python -m clusters.remote.maker FOLDER`: make the environment of a folder, from the requirements that lie there.

A virtual environment has its own path in many of its files, so it is made in the folder where it stays, and `ready`
becomes a link to it when it is whole: what is half-made has no name that anybody uses. There is one maker at a time,
by the lock that setup.py starts it with.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Make it; its output is the log."""
    folder = Path(sys.argv[1])
    prefix = f"made-{socket.gethostname()}-"  # not all file systems carry a lock to other hosts
    for abandoned in folder.glob(f"{prefix}*"):
        shutil.rmtree(abandoned)
    made = tempfile.mkdtemp(prefix=prefix, dir=folder)
    python = str(Path(made, "bin", "python"))
    _make_step("python -m venv (on Debian it needs python3-venv)", [sys.executable, "-m", "venv", made])
    files = ["--requirement", str(folder / "requirements.txt"), "--constraint", str(folder / "constraints.txt")]
    options = ["--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    _make_step("pip", [python, "-m", "pip", "install", *options, *files])
    name = Path(made).name
    link = folder / f"link-{name}"
    link.symlink_to(name)
    link.replace(folder / "ready")


def _make_step(step: str, command: list[str]) -> None:
    """Run a step, and end where it fails; what a cluster's modules put on PYTHONPATH is not for the environment."""
    environment = {**os.environ, "DS_BUILD_OPS": "0"}  # DeepSpeed's operators are built on the nodes that use them
    environment.pop("PYTHONPATH", None)
    print("+", *command, flush=True)
    ended = subprocess.run(command, env=environment, check=False)
    if ended.returncode:
        sys.exit(f"{step} failed, exit code {ended.returncode}")


if __name__ == "__main__":
    main()
