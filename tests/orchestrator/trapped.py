"""A local cluster with room for two workers, in an environment full of traps."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clusters.local import Local

CAN_TRAP = hasattr(os, "sched_setaffinity")
WHY_NOT = "the room is made by processor affinity"


@contextmanager
def trapped_cluster(factory: pytest.TempPathFactory) -> Iterator[Local]:
    """The cluster of FLEETUNE_HOME, where files would shadow ours, and names of folders are long or impossible."""
    folder, before = Path.cwd(), os.sched_getaffinity(0)
    traps = factory.mktemp("traps")
    for name in ("trainer", "orchestrator", "methods", "clusters", "torch"):
        (traps / f"{name}.py").write_text("raise SystemExit('a file of the user shadows ours')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(factory.mktemp("home")))
        patch.delenv("FLEETUNE_CACHE", raising=False)
        patch.setenv("HOME", str(traps / "trainer.py" / "home"))  # below a file: nobody can make it
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(traps))
        patch.setenv("TMPDIR", str(factory.mktemp("x" * 120)))  # too long for the paths of sockets
        os.sched_setaffinity(0, set(sorted(before)[:2]))
        os.chdir(traps)
        found = Local.here()
        try:
            yield found
        finally:
            found.stop()
            os.chdir(folder)
            os.sched_setaffinity(0, before)
