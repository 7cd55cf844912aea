"""Fleetune's own code as it travels: an archive of what is installed here, uncommitted edits included."""

import hashlib
import io
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fleetune_start

_SUFFIXES = (".py", ".html", ".json", ".txt")
_MODULES = ("fleetune.py", "fleetune_start.py")
_DIGEST_DIGITS = 24  # of the digest in the name of a folder


@dataclass(frozen=True)
class Code:
    """The files of the modules and packages by path, and a digest of them."""

    files: Mapping[str, bytes]
    digest: str

    @property
    def modules(self) -> int:
        """How many of the files are Python's."""
        of_python = [path for path in self.files if path.endswith(".py")]
        return len(of_python)

    def archive(self) -> bytes:
        """All files as a tar archive (gzip)."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for path, data in self.files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(data)
                entry.mode = 0o644
                archive.addfile(entry, io.BytesIO(data))
        return stream.getvalue()

    def unpack(self, folder: Path) -> None:
        """Have all files in a folder of this machine, whole; nothing is done where it is there."""
        if folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        for path, data in self.files.items():
            file = new / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        try:
            new.rename(folder)
        except OSError:  # another client was first
            shutil.rmtree(new)
            if not folder.exists():
                raise


@cache
def installed_code() -> Code:
    """What is installed here; the same files have the same digest."""
    root = Path(fleetune_start.__file__).resolve().parent
    files = {}
    digest = hashlib.sha256()
    for path in _code_files(root):
        relative = str(path.relative_to(root))
        data = path.read_bytes()
        files[relative] = data
        digest.update(f"{relative} {len(data)} ".encode())
        digest.update(data)
    hexadecimal = digest.hexdigest()
    return Code(files, hexadecimal[:_DIGEST_DIGITS])


def _code_files(root: Path) -> list[Path]:
    """The files that Fleetune consists of, in a fixed order."""
    files = [root / name for name in _MODULES]
    for package in fleetune_start.NAMES:
        for path in (root / package).rglob("*"):
            if path.suffix in _SUFFIXES and path.is_file():
                files.append(path)
    return sorted(files)
