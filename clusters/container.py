"""The container of a SLURM site: an image that has the packages of runs.

Ray, controllers and workers run in it. What asks SLURM (a warning's step, `scontrol requeue`, the start of the other
nodes) runs outside, as images have neither SLURM's commands nor its keys; that needs Fleetune's plain packages alone.
"""

import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from clusters.base import SubmissionRefused
from runfolder.evaluation_job import AnyJob
from runfolder.resources import Section
from runfolder.service import ServiceSpec
from runfolder.sources import ClusterFile, file_of, parse_source
from runfolder.staged_job import StagedJob

_PATH_PART = r"[\w.@+=-]{1,255}"  # a runtime takes , and : of an option for the end of a path
_PLAIN_PATH = rf"(/{_PATH_PART}){{1,32}}"
_IMAGE = re.compile(rf"~?{_PLAIN_PATH}")
_MOUNT = re.compile(rf"{_PLAIN_PATH}(:{_PLAIN_PATH}(:(ro|rw))?)?")
_PYTHON_IN_IMAGE = re.compile(rf"/?(?!-){_PATH_PART}({_PLAIN_PATH})?")
_SHARED = "/tmp"  # Ray's own files: its sockets are found by the same path outside


def _must_match(pattern: re.Pattern[str], allowed: str) -> AfterValidator:
    """Have a text be of a pattern, `allowed` in words."""

    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(allowed)
        return text

    return AfterValidator(check)


_ALPHABET = "letters, digits and _ . @ + = - in its names"
Image = Annotated[str, _must_match(_IMAGE, f"must be an absolute path there, or ~/ and one in the home; {_ALPHABET}")]
Mount = Annotated[str, _must_match(_MOUNT, f"must be like /data, /data:/there or /data:/there:ro; {_ALPHABET}")]
PythonInImage = Annotated[
    str, _must_match(_PYTHON_IN_IMAGE, f"must be a command or a path in the image; {_ALPHABET}")
]


class Container(Section):
    """An image of Apptainer or Singularity. A bare text stands for `image` alone."""

    image: Image = Field(description="a .sif file, or the folder of an unpacked image, that all nodes have")
    python: PythonInImage = Field("python3", description="the Python in the image that has Fleetune's packages")
    runtime: Literal["apptainer", "singularity"] = Field("apptainer", description="the command that starts it")
    mounts: tuple[Mount, ...] = Field(
        (), description="folders that runs use beside the run root, their data and /tmp: /data, or /data:/in/it:ro"
    )


def python_in(container: Container, home: Path, job: AnyJob) -> list[str]:
    """The command of Python in a container, for a job whose run folder is below `home`; raises SubmissionRefused."""
    command = [container.runtime, "exec", "--env", "PYTHONNOUSERSITE=1"]
    if job.resources.gpus_per_node:
        command.append("--nv")
    folders = [_SHARED, _mountable("root", home)]
    for field, folder in _folders_of(job, home):
        folders.append(_mountable(field, folder))
    for mount in dict.fromkeys([*folders, *container.mounts]):
        command += ["--bind", mount]
    image = Path(container.image).expanduser()
    return [*command, str(image), container.python]


def _folders_of(job: AnyJob, home: Path) -> Iterator[tuple[str, Path]]:
    """The folders of files that a job reads, but those below `home`, by the field that names them."""
    if isinstance(job, ServiceSpec):
        yield from _folders_of_service(job, home)
        return
    for field, source in job.sources.items():
        path = file_of(source)
        is_there = isinstance(parse_source(source), ClusterFile)
        if path and (is_there or _is_here(path)) and home not in path.parents:
            yield field, path if path.is_dir() else path.parent
    if isinstance(job, StagedJob):  # whose bases are among what it reads
        return
    base = Path(job.base.model)
    if _is_here(base) and home not in base.parents:
        yield "base.model", base


def _folders_of_service(service: ServiceSpec, home: Path) -> Iterator[tuple[str, Path]]:
    """The folders of files that a service reads, but those below `home`, by the field that names them."""
    tenants = Path(service.tenants)
    folders = {"base": Path(service.base), "tenants": tenants.parent}
    for name, folder in service.adapters.items():
        field = f"adapters.{name}"
        folders[field] = Path(folder)
    for field, path in folders.items():
        is_below_home = home in (path, *path.parents)
        if _is_here(path) and not is_below_home:
            yield field, path


def _is_here(path: Path) -> bool:
    """Whether a path is one of this machine; one of a laptop is sent before the job starts."""
    try:
        return path.is_absolute() and path.exists()
    except (OSError, ValueError):  # no path at all
        return False


def _mountable(field: str, folder: Path) -> str:
    """A folder as an option has it; raises SubmissionRefused where it cannot stand there."""
    path = str(folder)
    if not re.fullmatch(_PLAIN_PATH, path):
        found = reprlib.repr(path)
        raise SubmissionRefused(f"{field}: found {found}; allowed in a container: {_ALPHABET}")
    return path
