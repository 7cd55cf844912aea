"""A SLURM site of two nodes as a place for the contract suite."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slurm_site import SlurmSite
from waiting import until

from clusters.base import run_of_submission
from runfolder.chain import last_attempt

# On all cores of both nodes, before the runs, which are in the partition `low`.
_BEFORE_ALL = ["sbatch", "--parsable", "-p", "main", "-N2", "--ntasks-per-node=1", "--cpus-per-task=4"]
_BEFORE_ALL += ["--output=/dev/null", "--wrap"]


class SlurmPlace:
    """The site, with run folders in `root`/runs."""

    waits = r"SLURM job \d+: (waits for free nodes|others have a higher priority)"
    lost = r"SLURM job \d+ ended: CANCELLED"

    def __init__(self, name: str, site: SlurmSite, root: Path) -> None:
        self.name, self.root = name, root
        self.resources = {"nodes": 2, "workers_per_node": 1}
        self._site = site

    @contextmanager
    def filled(self) -> Iterator[None]:
        """A job of the other partition has all cores."""
        job_id = self._site.run(*_BEFORE_ALL, "sleep 600").strip()
        try:
            until(lambda: self._site.run("squeue", "-h", "-j", job_id, "-o", "%T").strip() == "RUNNING")
            yield
        finally:
            self._site.run("scancel", job_id)

    def taken(self) -> list[str]:
        """The runs whose jobs wait or run."""
        names = self._site.run("squeue", "-h", "-t", "PENDING,CONFIGURING,RUNNING", "-o", "%j").split()
        return [run_id for name in names if (run_id := run_of_submission(name))]

    def forget(self, run_id: str) -> None:
        """Cancel the run's job, as who has the rights may do."""
        self._site.run("scancel", "--name", f"{run_id}-s1")

    def end_worker(self, run_id: str) -> None:
        """Kill the process that the log of rank 0 names, on its node."""
        log = last_attempt(self.root / "runs" / run_id).folder / "logs" / "rank-0.log"
        found = re.match(r"\[rank 0\] pid (\d+) on (\w+)", log.read_text())
        assert found
        self._site.run_on(found[2], "kill", "-KILL", found[1])

    def warn(self, run_id: str) -> None:  # noqa: ARG002
        """A job of the other partition takes the cores for some seconds."""
        self._site.run(*_BEFORE_ALL, "sleep 5")

    def lose_node(self) -> None:
        """A power failure of the second node."""
        self._site.kill("node2")
        time.sleep(1)
        self._site.boot("node2")

    def is_idle(self) -> bool:
        """Whether no job is left, and with it no process."""
        return not self._site.run("squeue", "-h")
