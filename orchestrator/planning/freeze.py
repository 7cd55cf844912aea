"""A job as it is read, and its frozen record: absolute paths, versions, digests of data and base, git."""

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.planning import spec
from orchestrator.planning.model import Model
from orchestrator.tracking.environment import PACKAGES
from orchestrator.tracking.password import without_secrets
from runfolder.digests import digests
from runfolder.job import Job
from runfolder.sources import Here, parse

Source = str | Path | Mapping[str, Any] | Job

_GIT_TIMEOUT = 5.0  # seconds


def read(source: Source, overrides: Iterable[str] = ()) -> tuple[Job, Path]:
    """A job with absolute paths, and the folder that it was written in; raises InputError."""
    folder = Path.cwd()
    if isinstance(source, Job):
        job = spec.validate(source.dump(), overrides)
    elif isinstance(source, Mapping):
        job = spec.validate(dict(source), overrides)
    else:
        folder = Path(source).absolute().parent
        job = spec.read(Path(source), overrides)
    return absolute(job, folder), folder


def absolute(job: Job, folder: Path) -> Job:
    """The job with its paths made absolute: relative to `folder` if they exist there, else to the current one."""
    data = job.data.model_copy(
        update={
            "train": _source(job.data.train, folder),
            "eval": _source(job.data.eval, folder) if job.data.eval else None,
        }
    )
    found = _existing(job.base.model, folder)
    base = job.base.model_copy(update={"model": str(found)}) if found and found.is_dir() else job.base
    return job.model_copy(update={"data": data, "base": base})


def record(job: Job, model: Model, cluster: str, folder: Path) -> dict[str, Any]:
    """What RUN_DIR/job.yaml says beside the run id; nothing in it is secret."""
    return {
        "cluster": cluster,
        "submitted": time.time(),
        "versions": versions(),
        "digests": digests(job, model.folder),
        "git": git_state(folder),
        "job": without_secrets(job).at_width(model.config.get("hidden_size")).dump(),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter, as far as they are installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder and whether anything is uncommitted there; None outside of git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _source(source: str, folder: Path) -> str:
    """A data source as an absolute path, unless it is none of this machine."""
    found = _existing(source, folder)
    if found is None and not isinstance(parse(source), Here):
        return source
    return str(found or _absolute(source, folder))


def _existing(path: str, folder: Path) -> Path | None:
    for parent in (folder, Path.cwd()):
        found = _absolute(path, parent)
        if found.exists():
            return found
    return None


def _absolute(path: str, folder: Path) -> Path:
    # Not resolved: a link may have no suffix at its other end, and the suffix says how a file is read.
    return Path(os.path.abspath(folder / Path(path).expanduser()))  # noqa: PTH100


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_TIMEOUT, check=True
    )
    return done.stdout.strip()
