"""Fleetune's own code as it travels: an archive of what is installed here, uncommitted edits included."""

import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fleetune_start

_SUFFIXES = (".py", ".html", ".json", ".txt")
_MODULES = ("fleetune.py", "fleetune_start.py")
_DIGEST_DIGITS = 24  # of the digest in the name of a folder


@dataclass(frozen=True)
class Code:
    """An archive (tar, gzip) of the modules and packages, and its digest."""

    archive: bytes
    digest: str


@cache
def installed_code() -> Code:
    """What is installed here; the same files give the same bytes."""
    root = Path(fleetune_start.__file__).resolve().parent
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path in _code_files(root):
            data = path.read_bytes()
            entry = tarfile.TarInfo(str(path.relative_to(root)))
            entry.size = len(data)
            entry.mode = 0o644
            tar.addfile(entry, io.BytesIO(data))
    archive = stream.getvalue()
    digest = hashlib.sha256(archive).hexdigest()
    return Code(archive, digest[:_DIGEST_DIGITS])


def _code_files(root: Path) -> list[Path]:
    """The files that Fleetune consists of, in a fixed order."""
    files = [root / name for name in _MODULES]
    for package in fleetune_start.NAMES:
        for path in (root / package).rglob("*"):
            if path.suffix in _SUFFIXES and path.is_file():
                files.append(path)
    return sorted(files)
