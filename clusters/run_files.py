"""What clusters with a scheduler do where run folders are: join what was printed, and close what was cancelled."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from clusters.base import Logs
from clusters.controllers import COLLECTED, controller_command

_CLOSE_S = 60.0


def joined_logs(paths: Iterable[Path], offset: int) -> Logs:
    """What these files have from an offset on, as if they were one, the oldest first."""
    texts = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        texts.append(path.read_bytes())
    data = b"".join(texts)[offset:]
    return Logs(data.decode(errors="replace"), offset + len(data))


def close_by_controller(run_dir: Path) -> None:
    """Have a controller close a cancelled run: that needs no workers."""
    environment = os.environ | COLLECTED
    environment.pop("RAY_ADDRESS", None)
    command = controller_command(str(run_dir))
    subprocess.run(command, env=environment, capture_output=True, timeout=_CLOSE_S, check=False)
