"""A job as it is read, and its frozen record: absolute paths, versions, digests of data and base, git."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.planning import spec
from orchestrator.planning.model import Model
from orchestrator.planning.reward_file import architecture_of, check_defined
from orchestrator.planning.survey import with_date, writes_date
from orchestrator.tracking.environment import PACKAGES
from orchestrator.tracking.password import secrets_of, without_secrets
from runfolder.digests import Digests, digests
from runfolder.evaluation_job import AnyJob
from runfolder.group_objectives import GroupOptions
from runfolder.job import Base, Job
from runfolder.objective import ObjectiveOptions
from runfolder.site import Site
from runfolder.sources import SubmitterFile, parse_source
from runfolder.staged_job import references

JobSource = str | Path | Mapping[str, Any] | Job
Sent = Callable[[str, int, int], None]  # a file, the bytes of it that are there, and their number

_GIT_TIMEOUT_S = 5.0


def read_job(source: JobSource, overrides: Iterable[str] = ()) -> tuple[Job, Path]:
    """A job with absolute paths, and the folder that it was written in; raises InputError."""
    folder = Path.cwd()
    if isinstance(source, Job):
        job = spec.validate(source.dump(), overrides)
    elif isinstance(source, Mapping):
        job = spec.validate(dict(source), overrides)
    else:
        folder = Path(source).absolute().parent
        job = spec.read_job_file(Path(source), overrides)
    for field, reference in references(job).items():
        raise InputError(f"{field}: found stage:{reference.stage}; allowed in a job of `stages:` alone")
    return absolute(job, folder), folder


def absolute(job: Job, folder: Path) -> Job:
    """The job with its paths made absolute: relative to `folder` if they exist there, else to the current one."""
    sources = {}
    for field, source in job.data.sources.items():
        sources[field] = absolute_source(source, folder)
    data = job.data.model_copy(update=sources)
    base = absolute_base(job.base, folder)
    objective = with_rewards_moved(
        job, lambda file: _reward_path(file, folder), lambda model: _reward_model_path(model, folder)
    )
    if isinstance(objective, GroupOptions) and objective.reward_file is not None:
        check_defined(Path(objective.reward_file), objective.reward_function)
    return job.model_copy(update={"data": data, "base": base, "objective": objective})


def absolute_base(base: Base, folder: Path) -> Base:
    """A base with the path of its folder made absolute, where it is one."""
    found = _existing(base.model, folder)
    if found is None or not found.is_dir():
        return base
    return base.model_copy(update={"model": str(found)})


def with_rewards_moved(job: Job, of_file: Callable[[str], str], of_model: Callable[[str], str]) -> ObjectiveOptions:
    """A job's objective with the file of its reward and the folder of its reward model, if any, in other places."""
    objective = job.objective
    if not isinstance(objective, GroupOptions):
        return objective
    file = objective.reward_file
    if file is not None:
        objective = objective.with_reward_file(of_file(file))
    model = objective.reward_model
    if model is not None:
        objective = objective.with_reward_model(of_model(model))
    return objective


def input_digests(job: Job, base_folder: Path | None, site: Site) -> Digests:
    """The digests of a job's data and base; `site` knows those of the cluster's own files. Raises InputError."""
    try:
        return digests(job, base_folder, site.digest)
    except ValueError as error:
        raise InputError(f"data: {error}") from None


def brought(job: Job, model: Model, site: Site, sent: Sent) -> Job:
    """The job with its files where the runs are, as paths there; `sent` is told how far each has come."""
    bring = bringer(site, sent)
    sources = job.data.sources
    for field, source in sources.items():
        parsed = parse_source(source)
        if isinstance(parsed, SubmitterFile):
            sources[field] = bring(source)
    data = job.data.model_copy(update=sources)
    base = job.base
    if model.folder is not None and Path(base.model).is_dir():
        moved = bring(model.folder)
        base = base.model_copy(update={"model": moved})
    objective = with_rewards_moved(job, bring, bring)
    return job.model_copy(update={"data": data, "base": base, "objective": objective})


def bringer(site: Site, sent: Sent) -> Callable[[str | Path], str]:
    """What has a file or folder where the runs are, and gives its path there; `sent` is told how far it has come."""

    def bring(file: str | Path) -> str:
        path = Path(file)
        progress = partial(sent, path.name)
        there = site.bring(path.absolute(), progress)
        return str(there)

    return bring


def places_before(job: Job, there: Job) -> dict[str, str]:
    """Where what was sent lay before, by its field in the job; `there` is the job with paths of the cluster."""
    paths = {
        "base.model": (job.base.model, there.base.model),
        "data.train": (job.data.train, there.data.train),
        "data.eval": (job.data.eval, there.data.eval),
        "data.retain": (job.data.retain, there.data.retain),
        "objective.reward": (job.objective.reward_file, there.objective.reward_file),
        "objective.reward_model": (job.objective.reward_folder, there.objective.reward_folder),
    }
    before = {}
    for field, (path, path_there) in paths.items():
        if path and path != path_there:
            before[field] = path
    return before


def frozen_training(
    job: Job, model: Model, folder: Path, cluster: str, site: Site, sent: Sent
) -> tuple[Job, dict[str, Any]]:
    """The job with its files where it runs, and what RUN_DIR/job.yaml says beside the run id: nothing secret."""
    is_dated = job.data.date is None and writes_date(model)
    if is_dated:
        job = with_date(job)
    of_inputs = input_digests(job, model.folder, site)
    there = brought(job, model, site, sent)
    git = git_state(folder)
    at_width = there.at_width(model.hidden_size)
    record = frozen_of(at_width, cluster, of_inputs, git)
    before = places_before(job, there)
    return there, record | {"dated": is_dated, "sent": before}


def frozen_of(
    job: AnyJob, cluster: str, of_inputs: Mapping[str, str | None], git: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What RUN_DIR/job.yaml says of a run of any kind beside its id, as it is submitted now."""
    submitted = time.time()
    return {
        "cluster": cluster,
        "submitted": submitted,
        "versions": versions(),
        "digests": of_inputs,
        "git": git,
        "secrets": sorted(secrets_of(job)),  # names of those that the job itself has
        "job": without_secrets(job).dump(),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter, as far as they are installed here."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder and whether anything is uncommitted there; None outside of git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def absolute_source(source: str, folder: Path) -> str:
    """A data source as an absolute path, unless it is none of this machine."""
    path = _existing(source, folder)
    if path is not None:
        return str(path)
    if isinstance(parse_source(source), SubmitterFile):
        return str(_absolute_path(source, folder))
    return source


def _reward_path(file: str, folder: Path) -> str:
    """The file of a reward as an absolute path; raises InputError where there is none."""
    path = _existing(file, folder)
    if path is None or not path.is_file():
        raise InputError(f"objective.reward: found no file {file}; allowed: the path of one, from the job's folder")
    return str(path)


def _reward_model_path(model: str, folder: Path) -> str:
    """The folder of a reward model as an absolute path; raises InputError where it is none."""
    path = _existing(model, folder)
    if path is None or not (path / "config.json").is_file():
        raise InputError(
            f"objective.reward_model: found no reward model in {model}; allowed: the output of a run of objective "
            "reward"
        )
    kind = architecture_of(path / "config.json")
    if not kind.endswith("ForSequenceClassification"):
        raise InputError(
            f"objective.reward_model: {model}: found {kind}, which does not score; allowed: the output of a run "
            "of objective reward"
        )
    return str(path)


def _existing(path: str, folder: Path) -> Path | None:
    """The path in a folder or in the current one; None when it is in neither."""
    for parent in (folder, Path.cwd()):
        candidate = _absolute_path(path, parent)
        if candidate.exists():
            return candidate
    return None


def _absolute_path(path: str, folder: Path) -> Path:
    """The path from a folder. A link keeps its own name: the reader of a file is chosen by its suffix."""
    expanded = Path(path).expanduser()
    absolute_path = os.path.abspath(folder / expanded)  # noqa: PTH100
    try:
        absolute_path.encode()
    except UnicodeEncodeError:  # no file of the run could hold it
        shown = os.fsencode(absolute_path).decode(errors="replace")
        raise InputError(f"{shown}: found a name that is not UTF-8; allowed: UTF-8") from None
    return Path(absolute_path)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder)]
    command += arguments
    done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True)
    return done.stdout.strip()
