"""Run ids, and runs by what people call them."""

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from clusters.base import Cluster
from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from runfolder.files import names
from runfolder.folders import home
from runfolder.site import Site
from runfolder.snapshot import Snapshot

RUN_ID = re.compile(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?-[0-9a-hjkmnp-tv-z]{10}")
_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # base 32 in the order of ASCII, so that ids sort by time
_EPOCH_MS = 1_735_689_600_000  # 2025-01-01; 40 bits of milliseconds last for 34 years


def runs_folder() -> Path:
    """Where the run folders of this machine are."""
    return home() / "runs"


def new_id(name: str) -> str:
    """`<name>-<10 characters>`: eight of time, in milliseconds, and two of chance."""
    value = ((time.time_ns() // 1_000_000 - _EPOCH_MS) << 10) | secrets.randbits(10)
    return f"{name}-{''.join(_DIGITS[(value >> shift) & 31] for shift in range(45, -1, -5))}"


def name_of(run_id: str) -> str:
    """The job's name in a run id."""
    return run_id[:-11]


@dataclass(frozen=True)
class Handle:
    """A run: its id, and the cluster that it was submitted to."""

    run_id: str
    cluster_name: str

    @property
    def cluster(self) -> Cluster:
        """The cluster; raises InputError where its name is not known here."""
        return open_cluster(self.cluster_name)

    @property
    def site(self) -> Site:
        """Where its folder is."""
        return self.cluster.site

    def snapshot(self) -> Snapshot:
        """How it stands, as its folder says; raises InputError where there is none."""
        found = self.site.snapshots([self.run_id])
        if self.run_id not in found:
            raise InputError(f"run {self.run_id!r}: no such run on cluster {self.cluster_name}")
        return found[self.run_id]


def remember(run_id: str, cluster_name: str) -> None:
    """Note on this machine which cluster has a run: a convenience, as `--cluster` says it too."""
    folder = home() / "known"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / run_id).write_text(cluster_name)


def handles(cluster_name: str | None = None) -> list[Handle]:
    """All runs of a cluster, or all that this machine has or knows of; oldest first."""
    if cluster_name is not None:
        found = dict.fromkeys(open_cluster(cluster_name).site.ids(), cluster_name)
    else:
        known = {name: home() / "known" / name for name in names(home() / "known")}
        found = {run_id: path.read_text() for run_id, path in known.items()}
        found |= dict.fromkeys(open_cluster("local").site.ids(), "local")
    runs = [Handle(run_id, its) for run_id, its in found.items() if RUN_ID.fullmatch(run_id)]
    return sorted(runs, key=lambda run: run.run_id[-10:])


def run_ids() -> list[str]:
    """The runs whose folders are on this machine, oldest first."""
    return [run.run_id for run in handles("local")]


def find(reference: str, cluster_name: str | None = None) -> Handle:
    """A run by its id, by a job's name (its latest run), or by a prefix of one id; raises InputError."""
    known = {run.run_id: run for run in handles(cluster_name)}
    named = [run_id for run_id in known if name_of(run_id) == reference]
    starting = [run_id for run_id in known if run_id.startswith(reference)]
    if reference in known:
        return known[reference]
    if named:
        return known[named[-1]]
    if len(starting) == 1:
        return known[starting[0]]
    if starting:
        raise InputError(f"run {reference!r}: found {len(starting)} runs, like {', '.join(starting[-3:])}; give more")
    there = cluster_name or f"this machine ({runs_folder()})"
    latest = f"the latest are {', '.join(list(known)[-3:])}" if known else f"there are none on {there}"
    raise InputError(f"run {reference!r}: no such run; {latest}")
