"""What of this machine is usable, and how to mend what is not. Every check is bounded in time and changes nothing."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from clusters.base import Unreachable
from clusters.checks import DEVICES, GIB, Check, Level, disk_check
from clusters.local import Local
from methods.options import UNUSABLE
from orchestrator.cluster_doctor import cluster_checks
from orchestrator.errors import InputError
from orchestrator.tracking.collect import troubles
from orchestrator.tracking.delivery import undelivered
from orchestrator.tracking.store import resolve, sqlite_file
from runfolder.folders import cache_folder, home, library_folders, writable
from runfolder.variables import without_password
from trainer.versions import unknown

_TRAIN = ("torch", "deepspeed", "transformers", "peft", "ray", "mlflow", "datasets", "safetensors")
_PROBE_TIMEOUT_S = 90.0  # importing torch from a cold disk takes long
_STALE_S = 600.0  # after which a build lock belongs to nobody


def doctor(cluster: str | None = None, test_job: bool = False) -> list[Check]:
    """Look at everything that submitting and training need on this machine, or at a cluster of the clusters file.

    `test_job`: see what GPUs a job of one minute sees there. Raises InputError.
    """
    if cluster not in (None, "local"):
        return cluster_checks(cluster, test_job)
    if test_job:
        raise InputError("--test-job: this machine is looked at without one; allowed: with --cluster NAME")
    probes: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _packages,
        _methods,
        _devices,
        _home,
        _caches,
        _disk,
        _memory,
        _open_files,
        _build_lock,
        _cluster,
        _mlflow,
        _deliveries,
    )
    checks: list[Check] = []
    for probe in probes:
        checks.extend(probe())
    return checks


def _level(usable: bool, otherwise: Level) -> Level:
    if usable:
        return "ok"
    return otherwise


def _python() -> Iterator[Check]:
    is_new_enough = sys.version_info >= (3, 11)
    level = _level(is_new_enough, "fail")
    python = f"{platform.python_version()} at {sys.executable}"
    yield Check("python", level, python, "make .venv with Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    missing = []
    installed = []
    for name in _TRAIN:
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        fix = "pip install 'fleetune[train]' to train here; submitting elsewhere needs none of them"
        yield Check("packages", "warn", f"missing: {', '.join(missing)}", fix)
    else:
        yield Check("packages", "ok", ", ".join(installed))
    for line in unknown():
        problem, _, fix = line.partition("; allowed: ")
        yield Check("packages", "fail", problem, fix)


def _methods() -> Iterator[Check]:
    """Methods that other packages register, where they cannot be used."""
    for reason in UNUSABLE.values():
        yield Check("methods", "warn", reason, "mend that package or uninstall it")


def _devices() -> Iterator[Check]:
    """Ask torch in a process of its own: a broken driver may hang or kill it."""
    command = [sys.executable, "-P", "-c", DEVICES]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield Check("devices", "fail", f"torch did not answer in {_PROBE_TIMEOUT_S:.0f} s", "look at nvidia-smi")
        return
    if probe.returncode:
        lines = probe.stderr.strip().splitlines() or [f"exit {probe.returncode}"]
        yield Check("devices", "warn", f"torch cannot be used: {lines[-1]}", "pip install 'fleetune[train]'")
        return
    devices = probe.stdout.strip()
    has_driver = shutil.which("nvidia-smi") is not None
    if devices == "CPU only" and has_driver:
        yield Check("devices", "warn", "nvidia-smi is there, but torch sees no GPU", "install a CUDA build of torch")
    else:
        yield Check("devices", "ok", f"{devices}, {os.cpu_count()} CPU cores")


def _home() -> Iterator[Check]:
    folder = home()
    level = _level(writable(folder), "fail")
    yield Check("home", level, str(folder), "set FLEETUNE_HOME to a folder that you can write")


def _caches() -> Iterator[Check]:
    """Tokenised data, and what libraries build and download."""
    folder = cache_folder()
    level = _level(writable(folder), "fail")
    variable = "FLEETUNE_CACHE" if os.environ.get("FLEETUNE_CACHE") else "FLEETUNE_HOME"
    yield Check("token cache", level, str(folder), f"set {variable} to a folder that you can write")
    for library in (_extensions(), _hub_folder()):
        if not writable(library):
            fix = "set TORCH_EXTENSIONS_DIR, HF_HOME or XDG_CACHE_HOME to a folder that you can write"
            yield Check("library cache", "warn", f"{library} cannot be written", fix)


def _extensions() -> Path:
    """Where torch builds extensions in workers."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if folder:
        return Path(folder)
    return _library_cache() / "torch_extensions"


def _hub_folder() -> Path:
    """Where workers keep what they download from the hub."""
    folder = _worker_variable("HF_HOME")
    if folder:
        return Path(folder)
    return _library_cache() / "huggingface"


def _library_cache() -> Path:
    folder = _worker_variable("XDG_CACHE_HOME")
    if folder:
        return Path(folder)
    return Path.home() / ".cache"


def _worker_variable(name: str) -> str | None:
    """What an environment variable is in workers."""
    environment = os.environ | library_folders()
    return environment.get(name)


def _disk() -> Iterator[Check]:
    yield disk_check(home(), "free some space, or set FLEETUNE_HOME to another disk")


def _memory() -> Iterator[Check]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return  # macOS
    free = shutil.disk_usage(shared).free
    level = _level(free > GIB, "warn")
    fix = "Ray and NCCL keep their buffers there: mount it larger (docker: --shm-size=8g)"
    yield Check("/dev/shm", level, f"{free / GIB:.1f} GiB free", fix)


def _open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    level = _level(soft >= 4096, "warn")
    fix = f"ulimit -n 65536 (at most {hard} here)"
    yield Check("open files", level, f"at most {soft}", fix)


def _build_lock() -> Iterator[Check]:
    """A build of an extension that was killed leaves a lock on which every later one waits for ever."""
    root = _extensions()
    now = time.time()
    stale = []
    for path in root.glob("**/lock"):
        age_s = now - path.stat().st_mtime
        if age_s > _STALE_S:
            stale.append(str(path))
    if stale:
        yield Check("build lock", "warn", ", ".join(stale), f"rm {' '.join(stale)}")
    else:
        yield Check("build lock", "ok", "none")


def _cluster() -> Iterator[Check]:
    try:
        state = Local.here().state()
    except Unreachable as error:
        yield Check("local cluster", "warn", str(error), "use it from there, or set FLEETUNE_HOME")
        return
    except OSError as error:
        yield Check("local cluster", "fail", f"{error.filename}: {error.strerror}", "set FLEETUNE_HOME")
        return
    capacity = state["capacity"]
    free = f"{capacity.free} of {capacity.total} {capacity.kind} free"
    for run_id, why in state["damaged"].items():
        yield Check("queue", "warn", why, f"fleetune resume {run_id}, or remove the file")
    if state["trouble"]:
        fix = "mend it; runs that wait go on by themselves (at once with: fleetune cluster stop, then start)"
        yield Check("local cluster", "fail", state["trouble"], fix)
    elif state["supervisor"]:
        yield Check("local cluster", "ok", f"runs, {free}")
    elif state["queued"] or state["controllers"]:
        yield Check("local cluster", "warn", f"stopped, {len(state['queued'])} runs wait", "fleetune cluster start")
    else:
        yield Check("local cluster", "ok", f"starts with the first job, {free}")


def _mlflow() -> Iterator[Check]:
    uri = resolve(os.environ.get("MLFLOW_TRACKING_URI"))
    shown = without_password(uri, uri)
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        level = _level(_can_write(sqlite_file(uri)), "fail")
        yield Check("mlflow", level, shown, "make the database writable")
        return
    try:
        port = address.port or {"http": 80, "https": 443}[address.scheme]
        socket.create_connection((address.hostname or "", port), timeout=3).close()
        yield Check("mlflow", "ok", f"{shown} answers")
    except OSError as error:
        yield Check("mlflow", "warn", f"{shown}: {error}", "training goes on without it, and delivers later")


def _can_write(database: Path | None) -> bool:
    """Whether SQLite can write its file, or make it; None: the database is none of SQLite's."""
    if database is None:
        return True
    if not writable(database.parent):
        return False
    return not database.exists() or os.access(database, os.W_OK)


def _deliveries() -> Iterator[Check]:
    """What MLflow has not got of runs that go on or are closed."""
    by_run_id = troubles()
    for trouble in dict.fromkeys(by_run_id.values()):
        run_ids = []
        for run_id, its_trouble in by_run_id.items():
            if its_trouble == trouble:
                run_ids.append(run_id)
        reason = f"{_shortened(run_ids)}: {trouble.reason}"
        if trouble.lasting:
            yield Check("deliveries", "fail", reason, f"{trouble.fix}; then: fleetune compare")
        else:
            yield Check("deliveries", "warn", reason, "it is delivered when MLflow answers")
    others = []
    for path in undelivered():
        if path.name not in by_run_id:
            others.append(path.name)
    if others:
        yield Check("deliveries", "warn", f"{_shortened(others)}: not all in MLflow yet", "fleetune compare")
    if not by_run_id and not others:
        yield Check("deliveries", "ok", "MLflow has all of the runs that have ended")


def _shortened(run_ids: list[str]) -> str:
    """Run ids as a short text."""
    if len(run_ids) == 1:
        return run_ids[0]
    return f"{run_ids[-1]} and {len(run_ids) - 1} others"
