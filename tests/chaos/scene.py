"""What the tests of survival look at: processes, run folders, MLflow."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import waiting
from waiting import Found

from orchestrator.tracking import store
from orchestrator.tracking.history import history
from runfolder.appended import read_lines
from runfolder.chain import Attempt, last_attempt

REPORTED = ("loss", "lr", "grad_norm")


def until(true: Callable[[], Found], timeout_s: float = 900, every_s: float = 0.02) -> Found:
    """Wait for something that is true, and give it."""
    return waiting.until(true, timeout_s, every_s)


def lives(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def signal_all(pids: list[int], number: int) -> None:
    """Send a signal to all that are left of some processes."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def session(leader: int) -> list[int]:
    """A process and all that it started, as far as that did not leave its session."""
    return [pid for pid in psutil.pids() if lives(pid) and os.getsid(pid) == leader]


def inhabitants(home: Path) -> list[str]:
    """All processes whose environment or output belongs to a home. (A title that Ray sets hides the environment.)"""
    places = (str(home), (home / "local" / "ray.folder").read_text())
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        ours = (process.info["environ"] or {}).get("FLEETUNE_HOME") == str(home)
        if process.info["status"] != psutil.STATUS_ZOMBIE and (ours or _output(process.pid).startswith(places)):
            found.append(f"{process.pid} {process}")
    return found


def _output(pid: int) -> str:
    link = Path(f"/proc/{pid}/fd/1")
    try:
        return str(link.readlink())
    except OSError:
        return ""  # it has ended, or has none


def workers(attempt: Attempt) -> list[int]:
    """The process ids of an attempt's workers by rank, as the heads of their logs tell them."""
    logs = sorted((attempt.folder / "logs").glob("rank-*.log"))
    return [int(found[1]) for log in logs if (found := re.match(r"\[rank \d+\] pid (\d+) on", log.read_text()))]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """What the newest attempt reported."""
    newest = last_attempt(run_dir)
    return read_lines(newest, "metrics.jsonl") if newest.number else []


def unfinished_saves(run_dir: Path) -> Iterator[Path]:
    """Checkpoints of the newest attempt that have no manifest."""
    for folder in (last_attempt(run_dir).folder / "checkpoints").glob("step-*"):
        if not (folder / "manifest.json").exists():
            yield folder


def reported(run_dir: Path, key: str = "loss") -> list[tuple[int, float]]:
    """One metric of a run as its readers see it."""
    return [(row["step"], row[key]) for row in history(run_dir) if key in row]


def delivered(uri: str, run_dir: Path, key: str = "loss") -> list[tuple[int, float]]:
    """Everything that MLflow holds of one metric of the one MLflow run of a run."""
    client = store.client(uri)
    run = mlflow_run(uri, run_dir)
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))


def mlflow_run(uri: str, run_dir: Path) -> Any:
    """The MLflow run of a run; fails when there are several."""
    client = store.client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`fleetune.run_id` = '{run_dir.name}'")
    return run
