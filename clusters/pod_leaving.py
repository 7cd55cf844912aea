"""What a pod does that is told to end: `python -m clusters.pod_leaving RUN_DIR GRACE_S`, before its containers do.

It asks for a checkpoint, and waits until the attempt has its verdict. A pod whose run is done, or goes on in a later
cluster, ends at once. All of this is for fewer steps to be lost; nothing relies on it.
"""

import sys
import time
from pathlib import Path

from clusters.pod_starts import note_leaving, works_now
from runfolder.chain import last_attempt, result

_VERDICT_S = 10.0  # behind the grace, for the verdict
_VERDICT_POLL_S = 0.25


def main(run_dir: Path, grace_s: float) -> None:
    """Have the live attempt save and end, where this pod is one of its cluster."""
    if not works_now(run_dir) or result(run_dir) is not None:
        return
    attempt = last_attempt(run_dir)
    if attempt.number == 0 or attempt.verdict is not None:
        return
    note_leaving(run_dir)
    deadline = time.monotonic() + grace_s + _VERDICT_S
    while time.monotonic() < deadline and attempt.is_live() and attempt.verdict is None:
        time.sleep(_VERDICT_POLL_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
