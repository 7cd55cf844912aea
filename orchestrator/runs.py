"""Run ids, and runs by what people call them."""

import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clusters.base import Cluster
from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from runfolder.files import list_names
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
    """`<name>-<10 characters>`: eight of time, in milliseconds, and two random ones."""
    now_ms = time.time_ns() // 1_000_000
    since_epoch = now_ms - _EPOCH_MS
    value = (since_epoch << 10) | secrets.randbits(10)
    characters = ""
    for shift in range(45, -1, -5):  # five bits a character, the highest first
        digit = (value >> shift) & 31
        characters += _DIGITS[digit]
    return f"{name}-{characters}"


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
        """The place that has its run folder."""
        return self.cluster.site

    def snapshot(self) -> Snapshot:
        """How it stands, as its folder says; raises InputError where there is none."""
        snapshots = self.site.snapshots([self.run_id])
        if self.run_id not in snapshots:
            raise InputError(f"run {self.run_id}: its folder is not there any more, on cluster {self.cluster_name}")
        return snapshots[self.run_id]


def at_stage(run: Handle) -> Handle:
    """Of a job of stages the run of its newest one, which has logs and an output; any other run as it is."""
    stage = run.snapshot().stage
    if stage is None:
        return run
    return Handle(stage["run_id"], run.cluster_name)


def remember(run_id: str, cluster_name: str) -> None:
    """Note on this machine which cluster has a run: a convenience, as `--cluster` says it too."""
    folder = home() / "known"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / run_id).write_text(cluster_name)


def remembered_cluster(run_id: str) -> str | None:
    """The cluster that this machine knows to have a run."""
    return _remembered_clusters().get(run_id)


def handles(cluster_name: str | None = None) -> list[Handle]:
    """All runs of a cluster, or all that this machine has or knows of; oldest first."""
    if cluster_name is not None:
        clusters = _clusters_of_runs_on(cluster_name)
    else:
        clusters = _clusters_of_runs_on("local") | _remembered_clusters()
    runs = []
    for run_id in by_age(clusters):
        cluster = clusters[run_id]
        runs.append(Handle(run_id, cluster))
    return runs


def by_age(names: Iterable[str]) -> list[str]:
    """Those of these names that are run ids, oldest first."""
    run_ids = list(filter(RUN_ID.fullmatch, names))
    run_ids.sort(key=lambda run_id: run_id[-10:])
    return run_ids


def _clusters_of_runs_on(cluster_name: str) -> dict[str, str]:
    """The runs whose folders one cluster has: run id -> name of the cluster."""
    cluster = open_cluster(cluster_name)
    ids = cluster.site.ids()
    return dict.fromkeys(ids, cluster_name)


def _remembered_clusters() -> dict[str, str]:
    """What `remember` noted: run id -> name of the cluster."""
    folder = home() / "known"
    clusters = {}
    for run_id in list_names(folder):
        path = folder / run_id
        if path.is_file():
            clusters[run_id] = path.read_text(errors="replace")
    return clusters


def run_ids() -> list[str]:
    """The runs whose folders are on this machine, oldest first."""
    return [run.run_id for run in handles("local")]


def find(reference: str, cluster_name: str | None = None) -> Handle:
    """A run by its id, by a job's name (its latest run), or by a prefix of one id; raises InputError."""
    runs = {run.run_id: run for run in handles(cluster_name)}
    if reference in runs:
        return runs[reference]
    with_name = []
    with_prefix = []
    for run_id in runs:
        if name_of(run_id) == reference:
            with_name.append(run_id)
        if run_id.startswith(reference):
            with_prefix.append(run_id)
    if with_name:
        latest = with_name[-1]
        return runs[latest]
    number = len(with_prefix)
    if number == 1:
        only = with_prefix[0]
        return runs[only]
    problem = f"run {reference!r}: "
    if with_prefix:
        examples = ", ".join(with_prefix[-3:])
        raise InputError(f"{problem}found {number} runs, like {examples}; give more")
    if runs:
        newest_ids = ", ".join(list(runs)[-3:])
        raise InputError(f"{problem}no such run; the latest are {newest_ids}")
    place = cluster_name or f"this machine ({runs_folder()})"
    raise InputError(f"{problem}no such run; there are none on {place}")
