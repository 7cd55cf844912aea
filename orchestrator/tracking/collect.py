"""Delivery by whoever compares: of runs whose own machines know nothing of this MLflow, and of what was held up.

The rows are in the run folders. Those of another machine are mirrored first (runfolder/mirror.py); so the MLflow run
of a job without `tracking.uri` is in the database of this machine, however many others deliver into their own.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clusters.base import Unreachable
from orchestrator.backends import open_cluster
from orchestrator.runs import Handle, handles, run_ids, runs_folder
from orchestrator.tracking.delivery import Delivery, deliver_held_up
from orchestrator.tracking.password import KINDS_TRACKED
from orchestrator.tracking.store import check_uri, sqlite_file
from orchestrator.tracking.trouble import Trouble, trouble_of_run
from runfolder.chain import last_attempt, result
from runfolder.delivered import is_delivered, note_delivered, tracked_run
from runfolder.mirror import Mirror, mirrored_from
from runfolder.news import UNREADABLE
from runfolder.record import load_any_job
from runfolder.service import ServiceSpec
from runfolder.site import LocalSite
from runfolder.snapshot import snapshot
from runfolder.stages import begun_stages

CollectProgress = Callable[[str, int], None]  # a cluster, and how many of its runs were looked at
Undelivered = dict[str, str]  # run id or cluster -> why MLflow has not got all of it
_MLFLOW_TIMEOUT_S = 10.0  # with an MLflow that does not answer


def deliver_all(cluster: str | None = None, progress: CollectProgress = lambda _cluster, _runs: None) -> Undelivered:
    """Deliver what MLflow lacks of the runs that this machine has or knows of, and of those of a cluster.

    Gives what it could not get. Raises InputError for an unknown cluster.
    """
    undelivered: Undelivered = {}
    for name, its_run_ids in _by_cluster(cluster, undelivered).items():
        try:
            with _one_at_a_time(name):
                _collect(name, its_run_ids, undelivered, progress)
        except (Unreachable, *UNREADABLE) as error:
            undelivered[name] = str(error)
    deliver_held_up()
    for run_id, trouble in troubles().items():
        undelivered[run_id] = str(trouble)
    return undelivered


def with_reasons(problem: str, undelivered: Undelivered) -> str:
    """A problem, which may come from what MLflow has not got: with a line for each reason."""
    lines = [problem]
    for name, why in undelivered.items():
        lines.append(f"{name}: {why}")
    return "\n".join(lines)


def troubles() -> dict[str, Trouble]:
    """What keeps the rows of runs of this home from MLflow, by run id."""
    by_run_id = {}
    for run_id in run_ids():
        trouble = trouble_of_run(runs_folder() / run_id)
        if trouble:
            by_run_id[run_id] = trouble
    return by_run_id


def _by_cluster(cluster: str | None, undelivered: Undelivered) -> dict[str, list[str]]:
    """The runs that this machine knows of, and all of a cluster, by cluster, newest first.

    Those of this machine's own cluster are delivered as they go, unless another machine submitted them.
    """
    runs = set(handles())
    if cluster:
        try:
            there = handles(cluster)
            runs.update(there)
        except Unreachable as error:
            undelivered[cluster] = str(error)
    by_cluster: dict[str, list[str]] = {}
    for run in sorted(runs, key=_when_submitted, reverse=True):
        if run.cluster_name == "local" and not _is_left(run.run_id):
            continue
        its_run_ids = by_cluster.setdefault(run.cluster_name, [])
        its_run_ids.append(run.run_id)
    return by_cluster


def _when_submitted(run: Handle) -> str:
    return run.run_id[-10:]


def _collect(cluster: str, its_run_ids: list[str], undelivered: Undelivered, progress: CollectProgress) -> None:
    """Deliver what there is of runs of one cluster; raises Unreachable, with what came before it delivered."""
    down: dict[str, str] = {}  # MLflow -> why it takes nothing: that is tried once
    folders = _folders(cluster, its_run_ids)
    for number, (run_dir, flaw) in enumerate(folders, start=1):
        try:
            why = flaw or _deliver(run_dir, down)
        except UNREADABLE as error:
            why = f"{run_dir}: {error}"
        if why:
            undelivered[run_dir.name] = why
        progress(cluster, number)


def _folders(cluster: str, its_run_ids: list[str]) -> Iterator[tuple[Path, str | None]]:
    """The folders of runs of which something may wait, or their mirrors, each with why it cannot be read."""
    site = open_cluster(cluster).site
    if isinstance(site, LocalSite):
        for run_id in its_run_ids:
            yield site.root / run_id, None
        return
    mirror = Mirror.of_cluster(cluster)
    stages: list[str] = []
    staged = []
    for run_id, flaw in mirror.update(site, its_run_ids):
        run_dir = mirror.run_dir(run_id)
        begun = [] if flaw else begun_stages(run_dir)
        stages += begun
        if begun:
            staged.append(run_dir)
        else:
            yield run_dir, flaw
    for run_id, flaw in mirror.update(site, stages):
        yield mirror.run_dir(run_id), flaw
    for run_dir in staged:  # once its stages are there, by which it is told how far it has come
        yield run_dir, None


def _deliver(run_dir: Path, down: dict[str, str]) -> str | None:
    """Deliver what there is of a run, unless its MLflow is down; gives why not, None where it was."""
    newest = last_attempt(run_dir)
    if tracked_run(run_dir) or snapshot(run_dir).attempt == 0 or isinstance(load_any_job(run_dir), ServiceSpec):
        return None
    if not _is_reached(run_dir):
        if result(run_dir):
            note_delivered(run_dir, None)
        return None
    delivery = Delivery(run_dir, newest.number, leads=False)
    if delivery.uri in down:
        return down[delivery.uri]
    is_done = delivery.catch_up(_MLFLOW_TIMEOUT_S)
    trouble = trouble_of_run(run_dir)
    if is_done or trouble is None:
        return None
    why = str(trouble)
    if not trouble.lasting:
        down[delivery.uri] = why
    return why


def _is_reached(run_dir: Path) -> bool:
    """Whether a run's MLflow can be asked from here: not a database file of another machine. Raises InputError.

    An evaluation has none of its own.
    """
    job = load_any_job(run_dir)
    if not isinstance(job, KINDS_TRACKED):
        return False
    uri = job.tracking.uri
    if uri is None or mirrored_from(run_dir) is None:
        return True
    check_uri(uri)
    return sqlite_file(uri) is None


def _is_left(run_id: str) -> bool:
    """Whether a closed run of this machine was left to whoever compares."""
    run_dir = runs_folder() / run_id
    try:
        return is_delivered(run_dir) and tracked_run(run_dir) is None
    except UNREADABLE:
        return False


@contextmanager
def _one_at_a_time(cluster: str) -> Iterator[None]:
    """Keep other processes of this machine from the same runs; the lock falls with its process."""
    folder = Mirror.of_cluster(cluster).folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
