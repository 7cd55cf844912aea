"""This machine as a cluster: a queue of files, and one detached supervisor that serves it.

FLEETUNE_HOME/runs/ holds the run folders. FLEETUNE_HOME/local/ is the cluster's own: queue/ (one file per run),
controllers/ and supervisor.lock (held by processes as long as they live), the head's lock, token and log, logs/.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from clusters import process
from clusters.base import (
    Capacity,
    ClusterRequest,
    ClusterStatus,
    Logs,
    Standing,
    SubmissionRefused,
    Unreachable,
    look_at,
)
from clusters.config import ClusterConfig
from clusters.entry import Queue, QueueEntry, entry_text, queued_run
from clusters.environment import machine_variables, run_settings, secret_settings
from clusters.machine import capacity_in_words, capacity_needed, misfit_of, total_capacity
from clusters.ray_head import Head
from runfolder.evaluation_job import AnyJob
from runfolder.site import LocalSite
from runfolder.snapshot import has_ended

_HOPELESS = 3  # starts of Ray that failed in a row: more are tried, but somebody should look


class LocalConfig(ClusterConfig):
    """A machine with a queue of its own, which Fleetune keeps: this one, or another one over a link."""

    kind: Literal["local"]


@dataclass(frozen=True)
class Local:
    """The local cluster of one FLEETUNE_HOME; `env` is for all of its runs."""

    home: Path
    env: Mapping[str, str] = field(default_factory=dict)
    Config: ClassVar[type[LocalConfig]] = LocalConfig

    @staticmethod
    def open(config: LocalConfig, home: Path) -> "Local":
        """The one of a machine that the clusters file describes."""
        return Local(home, config.env)

    @staticmethod
    def here() -> "Local":
        """The one of FLEETUNE_HOME, by default ~/.fleetune."""
        try:
            home = Path(os.environ.get("FLEETUNE_HOME") or "~/.fleetune").expanduser()
            return Local(home.absolute())
        except RuntimeError:  # of pathlib, about a user whom the system does not know
            raise Unreachable(
                "cluster local: this user has no home; set FLEETUNE_HOME to a folder for runs"
            ) from None

    @property
    def folder(self) -> Path:
        """Where the cluster keeps its own state."""
        return self.home / "local"

    @property
    def queue(self) -> Queue:
        """The runs that still need a controller: to train, to be closed, or to deliver the rest to MLflow."""
        return Queue(self.folder / "queue")

    @property
    def supervisor_lock(self) -> Path:
        """Held by the supervisor while it lives."""
        return self.folder / "supervisor.lock"

    def controller_lock(self, run_id: str) -> Path:
        """Held by the controller of a run while it lives; there since the run had its turn."""
        return self.folder / "controllers" / run_id

    def log(self, run_id: str) -> Path:
        """What the controllers of a run print before they have an attempt to write to."""
        logs = self.folder / "logs"
        return logs / f"{run_id}.log"

    @property
    def site(self) -> LocalSite:
        """The run folders of this home."""
        return LocalSite(self.home / "runs")

    def request(
        self, job: AnyJob, run_id: str, submission: int | None = 1, secrets: tuple[str, ...] = ()
    ) -> ClusterRequest:
        """What would be queued: the controller's command, and how many workers it needs capacity for.

        The queue has a run once, whatever the number of its submission.
        """
        misfit = misfit_of(job.resources, *total_capacity())
        if misfit:
            raise SubmissionRefused(misfit)
        environment = run_settings(self.env, job, os.environ)
        environment["FLEETUNE_HOME"] = str(self.home)
        of_shell = secret_settings(os.environ)
        all_secrets = tuple(dict.fromkeys((*secrets, *of_shell)))
        run_dir = self.site.root / run_id
        workers = job.resources.world_size
        text = entry_text(run_dir, workers, environment, all_secrets)
        return ClusterRequest(run_id, submission or 1, str(run_dir), text, all_secrets)

    def forecast(self, request: ClusterRequest) -> float | None:
        """Now, where there is capacity for it; else nobody knows."""
        workers: int = json.loads(request.text)["workers"]
        free = self.capacity().free
        if capacity_needed(workers) > free:
            return None
        return 0.0

    def submit(self, request: ClusterRequest) -> None:
        """Queue a run, and see to it that the supervisor runs."""
        self._check_installed()
        self.queue.add(request.run_id, request.text)
        self.start()

    def status(self, run_ids: Iterable[str]) -> dict[str, ClusterStatus]:
        """The state of each run, as files and locks tell it."""
        queued, damaged = self.queue.read()
        entries: dict[str, QueueEntry | str] = {**damaged}
        for entry in queued:
            entries[entry.run_id] = entry
        trouble = self._trouble()
        wait = self._wait_reason()
        waits = {}
        for workers in {entry.workers for entry in queued}:
            waits[workers] = f"needs {capacity_in_words(workers)}, {wait}"
        statuses = {}
        for run_id in run_ids:
            statuses[run_id] = self._status(run_id, entries.get(run_id), trouble, waits)
        return statuses

    def look(self, run_ids: Iterable[str] | None = None, in_full: bool = False) -> dict[str, Standing]:
        """How runs stand, None: all of this home."""
        return look_at(self, run_ids, in_full)

    def logs(self, run_id: str, offset: int = 0) -> Logs:
        """What the run's controllers printed before they had an attempt to write to."""
        path = self.log(run_id)
        if not path.exists():
            return Logs("", offset)
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read()
        text = data.decode(errors="replace")
        return Logs(text, offset + len(data))

    def cancel(self, run_id: str) -> None:
        """Queue the run if it is not, and see to it that the supervisor runs: it starts who closes the run."""
        run_dir = self.site.root / run_id
        if not has_ended(run_dir):
            environment = {**self.env, "FLEETUNE_HOME": str(self.home)}
            text = entry_text(run_dir, 1, environment)
            self.queue.add(run_id, text)
            self.start()

    def capacity(self) -> Capacity:
        """GPUs, or cores where there is none."""
        self._check_installed()
        return self._capacity()

    def taken_workers(self) -> int:
        """Workers of the runs that had their turn and have no result."""
        taken = 0
        for entry in self.queue.list():
            if self.controller_lock(entry.run_id).exists() and self._takes_workers(entry):
                taken += capacity_needed(entry.workers)
        return taken

    def start(self) -> None:
        """See to it that the supervisor runs; it adopts what is there. Repeating it changes nothing."""
        self._check_installed()
        self.check_here()
        folders = (self.folder, self.folder / "controllers", self.folder / "logs")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        home = str(self.home)
        command = [sys.executable, "-P", "-m", "clusters.supervisor", home]
        log = self.folder / "supervisor.log"
        # Ray's workers have what its head, and so the supervisor, was started with.
        environment = machine_variables(os.environ) | {"FLEETUNE_HOME": home}
        process.spawn(self.supervisor_lock, command, environment, log)

    def stop(self) -> None:
        """End the supervisor, all controllers and the Ray head. Runs without a result go on at the next start."""
        if not self.folder.exists():
            return
        self.check_here()
        process.end(self.supervisor_lock)
        with process.hold_lock(self.supervisor_lock):  # nobody starts another one meanwhile
            for lock in (self.folder / "controllers").glob("*"):
                process.end(lock)
            head = Head(self.folder)
            head.end()
            head.forget()

    def check_here(self) -> None:
        """Raise Unreachable when supervisor, head or a controller runs on another host that shares this folder."""
        head = Head(self.folder)
        controllers = (self.folder / "controllers").glob("*")
        for lock in (self.supervisor_lock, head.lock, *controllers):
            process.owner(lock)

    def state(self) -> dict[str, Any]:
        """What runs: process ids of supervisor, head and controllers, the head's address, trouble, capacity.

        `damaged`: what in the queue cannot be read.
        """
        head = Head(self.folder)
        entries, damaged = self.queue.read()
        controllers = {}
        for entry in entries:
            pid = process.owner(self.controller_lock(entry.run_id))
            if pid:
                controllers[entry.run_id] = pid
        head_pid = process.owner(head.lock)
        return {
            "supervisor": process.owner(self.supervisor_lock),
            "head": head_pid,
            "address": head.address() if head_pid else None,
            "trouble": self._trouble(),
            "controllers": controllers,
            "queued": [entry.run_id for entry in entries if not self.controller_lock(entry.run_id).exists()],
            "damaged": damaged,
            "capacity": self._capacity(),
        }

    def _takes_workers(self, entry: QueueEntry) -> bool:
        """Whether a run that had its turn keeps its workers: not one that has ended, or is damaged and dead."""
        queued = queued_run(entry)
        if queued.damaged:
            return process.owner(self.controller_lock(entry.run_id)) is not None
        return not queued.finished

    def _capacity(self) -> Capacity:
        kind, total = total_capacity()
        free = max(0, total - self.taken_workers())
        return Capacity(kind, total, free)

    def _status(
        self, run_id: str, entry: QueueEntry | str | None, trouble: str | None, waits: Mapping[int, str]
    ) -> ClusterStatus:
        """The state of a run; `waits` says why one waits that needs so many workers."""
        if has_ended(self.site.root / run_id):
            return ClusterStatus("ended")
        if entry is None:
            return ClusterStatus("unknown", "this cluster has not got the run; fleetune resume submits it again")
        if isinstance(entry, str):  # why it cannot be read
            return ClusterStatus("unknown", f"{entry}; queue it anew with: fleetune resume {run_id}")
        lock = self.controller_lock(run_id)
        if process.owner(lock):
            return ClusterStatus("running")
        if trouble:
            return ClusterStatus("queued", trouble, stuck=True)
        if lock.exists() and process.owner(self.supervisor_lock):
            return ClusterStatus("starting")
        return ClusterStatus("queued", waits[entry.workers])

    def _trouble(self) -> str | None:
        """Why no run can start until somebody fixes it; None while there is hope."""
        head = Head(self.folder)
        failed = head.failed_starts()
        if failed is None or failed.starts < _HOPELESS:
            return None
        if process.owner(self.supervisor_lock) is None:
            return None
        return f"Ray did not start, {failed.starts} times in a row: {failed.reason} (see {head.log})"

    def _wait_reason(self) -> str:
        """What keeps a queued run waiting."""
        if process.owner(self.supervisor_lock) is None:
            return "the local cluster is stopped: fleetune cluster start"
        head = Head(self.folder)
        if process.owner(head.lock) is None or head.address() is None:
            return "Ray is starting"
        capacity = self._capacity()
        return f"{capacity.free} of {capacity.total} {capacity.kind}s are free"

    def _check_installed(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise Unreachable("cluster local: Ray is not installed here; pip install 'fleetune[train]'")
