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
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from clusters.base import Unreachable
from clusters.local import Local
from methods.options import UNUSABLE
from orchestrator.tracking.delivery import all_held_up, undelivered
from orchestrator.tracking.password import without_password
from orchestrator.tracking.store import resolve, sqlite_file
from runfolder.folders import cache_folder, home, library_folders, nearest, writable
from trainer.versions import unknown

Level = Literal["ok", "warn", "fail"]
_TRAIN = ("torch", "deepspeed", "transformers", "peft", "ray", "mlflow", "datasets", "safetensors")
_GIB = 1 << 30
_PROBE_TIMEOUT = 90.0  # seconds; importing torch from a cold disk takes long
_STALE = 600.0  # seconds after which a build lock belongs to nobody
_TORCH = """
import torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print("; ".join(f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices) or "CPU only")
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `mend` says what to do where it is not ok."""

    name: str
    level: Level
    found: str
    mend: str = ""


def doctor() -> list[Check]:
    """Look at everything that submitting and training need."""
    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _packages,
        _methods,
        _devices,
        _home,
        _caches,
        _disk,
        _memory,
        _files,
        _build_lock,
        _cluster,
        _mlflow,
        _deliveries,
    )
    return [check for look in looks for check in look()]


def _python() -> Iterator[Check]:
    found = f"{platform.python_version()} at {sys.executable}"
    yield Check(
        "python", "ok" if sys.version_info >= (3, 11) else "fail", found, "make .venv with Python 3.11 or newer"
    )


def _packages() -> Iterator[Check]:
    missing = []
    found = []
    for name in _TRAIN:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        mend = "pip install 'fleetune[train]' to train here; submitting elsewhere needs none of them"
        yield Check("packages", "warn", f"missing: {', '.join(missing)}", mend)
    else:
        yield Check("packages", "ok", ", ".join(found))
    for line in unknown():
        told, _, mend = line.partition("; allowed: ")
        yield Check("packages", "fail", told, mend)


def _methods() -> Iterator[Check]:
    """Methods that other packages register, where they cannot be used."""
    for reason in UNUSABLE.values():
        yield Check("methods", "warn", reason, "mend that package or uninstall it")


def _devices() -> Iterator[Check]:
    """Ask torch in a process of its own: a broken driver may hang or kill it."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH], capture_output=True, text=True, timeout=_PROBE_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        yield Check("devices", "fail", f"torch did not answer in {_PROBE_TIMEOUT:.0f} s", "look at nvidia-smi")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        yield Check("devices", "warn", f"torch cannot be used: {last}", "pip install 'fleetune[train]'")
        return
    found = done.stdout.strip()
    driver = shutil.which("nvidia-smi") is not None
    if found == "CPU only" and driver:
        yield Check("devices", "warn", "nvidia-smi is there, but torch sees no GPU", "install a CUDA build of torch")
    else:
        yield Check("devices", "ok", f"{found}, {os.cpu_count()} CPU cores")


def _home() -> Iterator[Check]:
    level: Level = "ok" if writable(home()) else "fail"
    yield Check("home", level, str(home()), "set FLEETUNE_HOME to a folder that you can write")


def _caches() -> Iterator[Check]:
    """Tokenised data, and what libraries build and download."""
    folder = cache_folder()
    level: Level = "ok" if writable(folder) else "fail"
    name = "FLEETUNE_CACHE" if os.environ.get("FLEETUNE_CACHE") else "FLEETUNE_HOME"
    yield Check("token cache", level, str(folder), f"set {name} to a folder that you can write")
    for library in (_extensions(), _hub()):
        if not writable(library):
            mend = "set TORCH_EXTENSIONS_DIR, HF_HOME or XDG_CACHE_HOME to a folder that you can write"
            yield Check("library cache", "warn", f"{library} cannot be written", mend)


def _extensions() -> Path:
    """Where torch builds extensions in workers."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _library_cache() / "torch_extensions")


def _hub() -> Path:
    """Where workers keep what they download from the hub."""
    return Path((os.environ | library_folders()).get("HF_HOME") or _library_cache() / "huggingface")


def _library_cache() -> Path:
    return Path((os.environ | library_folders()).get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(nearest(home())).free
    level: Level = "ok" if free > 20 * _GIB else "warn" if free > 2 * _GIB else "fail"
    yield Check("disk", level, f"{free / _GIB:.1f} GiB free", "free some space, or set FLEETUNE_HOME to another disk")


def _memory() -> Iterator[Check]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return  # macOS
    free = shutil.disk_usage(shared).free
    mend = "Ray and NCCL keep their buffers there: mount it larger (docker: --shm-size=8g)"
    yield Check("/dev/shm", "ok" if free > _GIB else "warn", f"{free / _GIB:.1f} GiB free", mend)


def _files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mend = f"ulimit -n 65536 (at most {hard} here)"
    yield Check("open files", "ok" if soft >= 4096 else "warn", f"at most {soft}", mend)


def _build_lock() -> Iterator[Check]:
    """A build of an extension that was killed leaves a lock on which every later one waits for ever."""
    root = _extensions()
    now = time.time()
    stale = [path for path in root.glob("**/lock") if now - path.stat().st_mtime > _STALE]
    if stale:
        yield Check("build lock", "warn", ", ".join(map(str, stale)), f"rm {' '.join(map(str, stale))}")
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
    room = f"{capacity.free} of {capacity.total} {capacity.kind} free"
    for run_id, why in state["damaged"].items():
        yield Check("queue", "warn", why, f"fleetune resume {run_id}, or remove the file")
    if state["trouble"]:
        mend = "mend it; runs that wait go on by themselves (at once with: fleetune cluster stop, then start)"
        yield Check("local cluster", "fail", state["trouble"], mend)
    elif state["supervisor"]:
        yield Check("local cluster", "ok", f"runs, {room}")
    elif state["queued"] or state["controllers"]:
        yield Check("local cluster", "warn", f"stopped, {len(state['queued'])} runs wait", "fleetune cluster start")
    else:
        yield Check("local cluster", "ok", f"starts with the first job, {room}")


def _mlflow() -> Iterator[Check]:
    uri = resolve(os.environ.get("MLFLOW_TRACKING_URI"))
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        file = sqlite_file(uri)
        takes = file is None or (writable(file.parent) and (not file.exists() or os.access(file, os.W_OK)))
        yield Check("mlflow", "ok" if takes else "fail", without_password(uri, uri), "make the database writable")
        return
    try:
        port = address.port or {"http": 80, "https": 443}[address.scheme]
        socket.create_connection((address.hostname or "", port), timeout=3).close()
        yield Check("mlflow", "ok", f"{without_password(uri, uri)} answers")
    except OSError as error:
        found = f"{without_password(uri, uri)}: {error}"
        yield Check("mlflow", "warn", found, "training goes on without it, and delivers later")


def _deliveries() -> Iterator[Check]:
    """What MLflow has not got of runs that go on or are closed."""
    held = all_held_up()
    for trouble in dict.fromkeys(held.values()):
        names = [run_id for run_id, its in held.items() if its == trouble]
        mend = f"{trouble.mend}; then: fleetune compare" if trouble.lasting else "it is delivered when MLflow answers"
        yield Check("deliveries", "fail" if trouble.lasting else "warn", f"{_few(names)}: {trouble.reason}", mend)
    if others := [path.name for path in undelivered() if path.name not in held]:
        yield Check("deliveries", "warn", f"{_few(others)}: not all in MLflow yet", "fleetune compare")
    if not held and not others:
        yield Check("deliveries", "ok", "MLflow has all of the runs that have ended")


def _few(names: list[str]) -> str:
    """Run ids as a short text."""
    return f"{names[-1]} and {len(names) - 1} others" if len(names) > 1 else names[0]
