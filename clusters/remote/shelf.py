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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runfolder.files import sha256
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
        with self._arriving(digest).open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # two clients may bring the same file
            size = os.fstat(stream.fileno()).st_size
            if size < offset:
                return size
            stream.write(content[size - offset :])
            stream.flush()
            return os.fstat(stream.fileno()).st_size

    def accept(self, digest: str, name: str) -> str:
        """Give the file its name, once all of it is there; raises Refused where it is not what was announced."""
        path = self._path(digest, name)
        if path.exists():
            return str(path)
        arriving = self._arriving(digest)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        arriving.touch()  # nothing came of an empty file
        found = sha256(arriving)
        if found != digest:
            arriving.unlink()
            raise Refused(
                f"{name}: it did not come whole (sha256 {found[:12]}, announced {digest[:12]}); send it again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(arriving, path)
        arriving.unlink()
        return str(path)

    def folder(self, files: Mapping[str, str]) -> str:
        """A folder that holds files of the shelf by name -> path; made once for the same files."""
        together = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        whole = self.root / together / "folder"
        if whole.exists():
            return str(whole)
        new = self.root / f".{together}-{uuid.uuid4().hex}"
        new.mkdir()
        for name, path in files.items():
            digest = Path(path).parent.name
            os.link(self._path(digest, name), new / name)
        whole.parent.mkdir(exist_ok=True)
        try:
            new.rename(whole)
        except OSError:  # another client was first
            shutil.rmtree(new)
        return str(whole)

    def _path(self, digest: str, name: str) -> Path:
        _check(digest, name)
        return self.root / digest / name

    def _arriving(self, digest: str) -> Path:
        _check(digest)
        return self.root / f".{digest}"


def _check(digest: str, name: str = "file") -> None:
    """Raise Refused for names that would lie elsewhere."""
    if len(digest) != 64 or not digest.isalnum():
        raise Refused(f"digest: found {digest!r}; allowed: 64 hexadecimal characters")
    if Path(name).name != name or name in ("", ".", ".."):
        raise Refused(f"name: found {name!r}; allowed: the name of a file, without a folder")
