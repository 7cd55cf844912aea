"""Digests of what a job reads: frozen with its submission, and compared before every attempt."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from runfolder.files import sha256
from runfolder.job import Job
from runfolder.sources import file_of

_LOADED = re.compile(r"\.(json|safetensors|model|jinja)$|^(vocab|merges)\.txt$")
_WHOLE = 64 << 20  # bytes up to which a file of the base is hashed whole
_PART, _PARTS = 1 << 18, 128  # bytes of a part of a larger file, and how many there are
_SHOWN = 12  # characters of a digest in a message


class InputChanged(ValueError):
    """Data or base are not those of the submission; nothing but their owner can mend that."""


def digests(job: Job, base: Path | None) -> dict[str, str | None]:
    """sha256 of the data files, and of the base in folder `base`; None for what is on the hub."""
    return {
        "data.train": file_digest(job.data.train),
        "data.eval": file_digest(job.data.eval) if job.data.eval else None,
        "base": folder_digest(base, job.base.init == "scratch") if base else None,
    }


def file_digest(source: str) -> str | None:
    """sha256 of a file; None for a data set on the hub."""
    file = file_of(source)
    return sha256(file) if file else None


def folder_digest(folder: Path, scratch: bool) -> str:
    """sha256 over names, sizes and contents of what is loaded; `scratch`: without weights.

    Of files above 64 MiB, which may have many gigabytes, parts are read: both ends, and places spread evenly. Other
    weights of the same shapes differ everywhere.
    """
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if _LOADED.search(path.name)):
        if scratch and path.suffix == ".safetensors":
            continue
        total.update(f"{path.name} {path.stat().st_size} ".encode())
        total.update(sha256(path).encode() if path.stat().st_size <= _WHOLE else _sample(path))
    return total.hexdigest()


def _sample(path: Path) -> bytes:
    """Parts of a large file: its ends, and what lies in equal distances between them."""
    last = path.stat().st_size - _PART
    places = [last * number // _PARTS for number in range(_PARTS + 1)]
    with path.open("rb") as stream:
        parts = []
        for place in places:
            stream.seek(place)
            parts.append(stream.read(_PART))
    return b"".join(parts)


def frozen(run_dir: Path) -> dict[str, str | None]:
    """The digests of a run's submission, by field; {} in a folder that was not submitted."""
    record: dict[str, Any] = yaml.safe_load((run_dir / "job.yaml").read_text())
    return record.get("digests") or {}


def changes(job: Job, known: Mapping[str, str | None]) -> list[str]:
    """What is not as in the known digests, one line each: field, file, both digests, what to do."""
    sources = {
        "data.train": file_of(job.data.train),
        "data.eval": file_of(job.data.eval) if job.data.eval else None,
        "base": Path(job.base.model),
    }
    lines = []
    for field, source in sources.items():
        then = known.get(field)
        if source and source.is_absolute() and then:
            state = _change(source, then, job.base.init == "scratch")
            if state:
                mend = "put the old one back and resume the run, or submit the job anew"
                lines.append(f"{field}: {source} {state}; {mend}")
    return lines


def _change(source: Path, then: str, scratch: bool) -> str | None:
    """What became of a file or of the folder of a base; None when it is as it was."""
    try:
        found = folder_digest(source, scratch) if source.is_dir() else sha256(source)
    except OSError as error:
        return f"cannot be read now ({error.strerror})"
    if found == then:
        return None
    return f"has changed since the submission: sha256 {then[:_SHOWN]} then, {str(found)[:_SHOWN]} now"
