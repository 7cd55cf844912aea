"""Files that a job brought along, where its cluster is: each by the digest of what it holds, and there only once.

`files/<sha256>/<name>`; a file that is still arriving is `files/.<sha256>`, and goes on from where it was cut.
"""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clusters.file_locks import lock_file
from runfolder.files import list_names, sha256
from runfolder.site import Refused


@dataclass(frozen=True)
class Shelf:
    """A folder of files by digest."""

    root: Path

    def state(self, digest: str, name: str) -> dict[str, object]:
        """{path, offset}: where the file is or will be, and how many bytes are there; offset None: all of them."""
        path = self._path(digest, name)
        if path.exists():
            return {"path": str(path), "offset": None}
        arriving = self._arriving(digest)
        offset = arriving.stat().st_size if arriving.exists() else 0
        return {"path": str(path), "offset": offset}

    def add(self, digest: str, offset: int, data: str) -> int:
        """Write bytes (base64) from an offset on; gives how many are there then. What is there already is kept."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = b64decode(data)
        arriving = self._arriving(digest)
        with _held(arriving), arriving.open("ab", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < offset:
                return size
            try:
                stream.write(content[size - offset :])
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(arriving)) from None
            return os.fstat(stream.fileno()).st_size

    def accept(self, digest: str, name: str) -> str:
        """Give the file its name, once all of it is there; raises Refused where it is not what was announced."""
        path = self._path(digest, name)
        if path.exists():
            return str(path)
        arriving = self._arriving(digest)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _held(arriving):
            if path.exists():  # another client brought it meanwhile, and this one an end that nobody needs
                arriving.unlink(missing_ok=True)
                return str(path)
            arriving.touch()  # nothing came of an empty file
            found = sha256(arriving)
            if found != digest:
                arriving.unlink()
                raise Refused(
                    f"{name}: it did not come whole (sha256 {found[:12]}, announced {digest[:12]}); send it again"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            arriving.rename(path)
        return str(path)

    def folder(self, files: Mapping[str, str]) -> str:
        """A folder that holds files of the shelf by name -> path; made once for the same files."""
        listing = json.dumps(files, sort_keys=True)
        hashed = hashlib.sha256(listing.encode())
        together = hashed.hexdigest()
        whole = self.root / together / "folder"
        whole.mkdir(parents=True, exist_ok=True)
        present = set(list_names(whole))
        for name in files.keys() - present:  # all of a new one, and what was purged since
            path = Path(files[name])
            file = self._path(path.parent.name, name)
            self._put(file, whole / name)
        return str(whole)

    def _put(self, file: Path, name: Path) -> None:
        """Give a file of the shelf another name as well: a hard link, or a copy where there are none."""
        new = self.root / f".{uuid.uuid4().hex}"
        try:
            os.link(file, new)
        except OSError:
            shutil.copyfile(file, new)
        new.replace(name)

    def _path(self, digest: str, name: str) -> Path:
        _check(digest, name)
        return self.root / digest / name

    def _arriving(self, digest: str) -> Path:
        _check(digest)
        return self.root / f".{digest}"


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Hold the lock of a file that is arriving, as two clients may bring the same one."""
    with lock_file(file).open("ab") as stream:  # NFS gives this lock to writers alone
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _check(digest: str, name: str = "file") -> None:
    """Raise Refused for names that would lie elsewhere."""
    is_digest = len(digest) == 64 and digest.isalnum()
    if not is_digest:
        raise Refused(f"digest: found {digest!r}; allowed: 64 hexadecimal characters")
    is_plain = Path(name).name == name
    if not is_plain or name in ("", ".", ".."):
        raise Refused(f"name: found {name!r}; allowed: the name of a file, without a folder")
