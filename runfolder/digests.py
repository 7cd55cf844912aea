"""Digests of what a job reads: frozen with its submission, and compared before every attempt."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from runfolder.evaluation_job import EvaluationJob
from runfolder.files import sha256
from runfolder.generation_job import GenerationJob
from runfolder.job import Job
from runfolder.sources import ClusterFile, SubmitterFile, file_of, parse_source
from runfolder.staged_job import StagedJob

_LOADED = re.compile(r"\.(json|safetensors|model|jinja)$|^(vocab|merges)\.txt$")
_WHOLE_BYTES = 64 << 20  # bytes up to which a file of the base is hashed whole
_PART_BYTES = 1 << 18  # of each part of a larger file that is hashed
_PARTS = 128  # into as many equal distances the parts divide a file
_SHOWN = 12  # characters of a digest in a message
Digests = dict[str, str | None]  # by the field of the job that names what was read


class InputChanged(ValueError):
    """Data or base are not those of the submission; nothing but their owner can fix that."""


def digests(job: Job, base: Path | None, digest_there: Callable[[Path], str | None] = sha256) -> Digests:
    """sha256 of the data files, and of the base in folder `base`; None for what is on the hub.

    `digest_there` gives that of a file that the cluster has.
    """
    found: Digests = {"data.train": None, "data.eval": None, "base": None}
    for field, source in job.data.sources.items():
        found[f"data.{field}"] = file_digest(source, digest_there)
    if base:
        scratch = job.base.init == "scratch"
        found["base"] = folder_digest(base, scratch)
    if job.objective.reward_file:
        found["objective.reward"] = file_digest(job.objective.reward_file, digest_there)
    if job.objective.reward_folder:
        reward_model = Path(job.objective.reward_folder)
        found["objective.reward_model"] = folder_digest(reward_model, scratch=False)
    return found


def file_digest(source: str, digest_there: Callable[[Path], str | None] = sha256) -> str | None:
    """sha256 of a file; None for a data set on the hub. Raises ValueError for a file that the cluster has not got."""
    match parse_source(source):
        case SubmitterFile(path):
            return sha256(path)
        case ClusterFile(path):
            digest = digest_there(path)
            if digest is None:
                raise ValueError(f"{source}: the cluster has no such file, or it cannot be read there")
            return digest
    return None


def is_same_base(one: str, other: str) -> bool:
    """Whether two names stand for one base: they are the same, or those of folders with the same content."""
    if one == other:
        return True
    digests = set()
    for name in (one, other):
        folder = Path(name)
        if not folder.is_dir():
            return False
        digest = folder_digest(folder, scratch=False)
        digests.add(digest)
    return len(digests) == 1


def folder_digest(folder: Path, scratch: bool) -> str:
    """sha256 over names, sizes and contents of what is loaded; `scratch`: without weights.

    Of files above 64 MiB, which may have many gigabytes, parts are read: both ends, and places spread evenly. Other
    weights of the same shapes differ everywhere.
    """
    total = hashlib.sha256()
    for path in loaded_files(folder):
        if scratch and path.suffix == ".safetensors":
            continue
        size = path.stat().st_size
        header = f"{path.name} {size} "
        total.update(header.encode())
        if size <= _WHOLE_BYTES:
            digest = sha256(path)
            total.update(digest.encode())
        else:
            total.update(_sample(path))
    return total.hexdigest()


def loaded_files(folder: Path) -> list[Path]:
    """The files of a base's folder that are loaded, in the order of their names."""
    loaded = []
    for path in folder.iterdir():
        if _LOADED.search(path.name) and path.is_file():
            loaded.append(path)
    return sorted(loaded)


def _sample(path: Path) -> bytes:
    """Parts of a large file: its ends, and what lies in equal distances between them."""
    last = path.stat().st_size - _PART_BYTES
    with path.open("rb") as stream:
        parts = []
        for number in range(_PARTS + 1):
            offset = last * number // _PARTS
            stream.seek(offset)
            part = stream.read(_PART_BYTES)
            parts.append(part)
    return b"".join(parts)


def generation_digests(
    job: GenerationJob, base: Path | None, digest_there: Callable[[Path], str | None] = sha256
) -> Digests:
    """sha256 of the files that a stage reads which writes, and of the base in folder `base`."""
    found: Digests = {"base": folder_digest(base, scratch=False) if base else None}
    for field, source in job.sources.items():
        found[field] = file_digest(source, digest_there)
    return found


def frozen_digests(run_dir: Path) -> Digests:
    """The digests of a run's submission, by field; {} in a folder that was not submitted."""
    path = run_dir / "job.yaml"
    record: dict[str, Any] = yaml.safe_load(path.read_text())
    by_field = record.get("digests")
    return by_field or {}


def changes(job: Job | EvaluationJob | StagedJob | GenerationJob, known: Mapping[str, str | None]) -> list[str]:
    """What is not as in the known digests, one line each: field, file, both digests, what to do."""
    if isinstance(job, StagedJob):
        return _changes_of_stages(job, known)
    sources = {field: file_of(source) for field, source in job.sources.items()}
    sources["base"] = Path(job.base.model)
    from_scratch = job.base.init == "scratch"
    lines = []
    for field, source in sources.items():
        scratch = from_scratch and field == "base"
        then = known.get(field)
        if not source or not source.is_absolute() or not then:
            continue
        change = _change(source, then, scratch)
        if change:
            remedy = "put the old one back and resume the run, or submit the job anew"
            lines.append(f"{field}: {source} {change}; {remedy}")
    return lines


def of_stage(known: Mapping[str, str | None], stage: str) -> Digests:
    """Those of some digests that are of one stage, by the field of its job."""
    prefix = f"stages.{stage}."
    found = {}
    for field, digest in known.items():
        if field.startswith(prefix):
            found[field.removeprefix(prefix)] = digest
    return found


def _changes_of_stages(job: StagedJob, known: Mapping[str, str | None]) -> list[str]:
    """What is not as in the known digests, of all stages."""
    lines = []
    for stage, its_job in job.stages.items():
        for line in changes(its_job, of_stage(known, stage)):
            lines.append(f"stages.{stage}.{line}")
    return lines


def _change(source: Path, then: str, scratch: bool) -> str | None:
    """What became of a file or of the folder of a base; None when it is as it was."""
    try:
        now = folder_digest(source, scratch) if source.is_dir() else sha256(source)
    except OSError as error:
        return f"cannot be read now ({error.strerror})"
    if now == then:
        return None
    shown_then = then[:_SHOWN]
    shown_now = now[:_SHOWN]
    return f"has changed since the submission: sha256 {shown_then} then, {shown_now} now"
