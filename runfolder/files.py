"""Files of a run folder: JSON that is written whole or not at all, and listings that show what other hosts have done.

A client of NFS keeps for up to a minute that a name is not there. So nobody asks for a name that may be missing: what
is there is told by listing its folder (`list_names`). Where even a listing from this client's cache will not do,
`refresh` comes first.
"""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runfolder.shapes import FileShape

Record = dict[str, Any]
FORMAT = 1  # of all that is written here; what says none is of before there were formats, and read as this one


class Damaged(ValueError):
    """A file of a run folder that is not what it should be: the file and what was found, in one line."""


def list_names(folder: Path) -> list[str]:
    """The names of what a folder holds; none where there is no such folder. Raises Damaged for a file."""
    try:
        return os.listdir(folder)  # noqa: PTH208 (ten times faster than iterdir)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise Damaged(f"{folder}: found a file; allowed: a folder") from None


def refresh(folder: Path) -> None:
    """See to it that the next listing of a folder is the server's, not one that this client has kept.

    A creation goes to the server, whose answer tells the client whether others have changed the folder meanwhile
    (RFC 1813, section 2.6, weak cache consistency; RFC 7530, section 5.8.1.4, change attribute).
    """
    token = uuid.uuid4().hex
    probe = folder / f".probe-{token}"
    probe.mkdir()
    probe.rmdir()


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal; raises OSError."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return digest.hexdigest()


def read_json(path: Path, shape: "FileShape | None" = None) -> Record:
    """Read a JSON file that holds an object, of this shape where one is given; raises Damaged."""
    try:
        text = path.read_bytes().decode()
        record = json.loads(text)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not JSON: {error}") from None
    return checked_record(record, path, shape)


def checked_record(record: Any, path: Path, shape: "FileShape | None") -> Record:
    """What a file holds, if that is an object of this shape, and of a format that is known; raises Damaged."""
    if not isinstance(record, dict):
        raise Damaged(f"{path}: found {type(record).__name__}; allowed: an object")
    version = record.get("format", FORMAT)
    if version != FORMAT:
        raise Damaged(f"{path}: found format {version}; allowed: {FORMAT}: use the Fleetune that has written it")
    if shape is None:
        return record
    from runfolder.shapes import flaw_of  # with pydantic, which those go without who read rows alone

    flaw = flaw_of(record, shape)
    if flaw:
        raise Damaged(f"{path}: {flaw}")
    return record


def write_json(path: Path, record: Record, mode: int = 0o666) -> None:
    """Write a JSON file whole or not at all; `mode` is what it has at most, as for any new file."""
    temporary = _write_beside(path, record, mode)
    try:
        temporary.replace(path)
    except FileNotFoundError:
        if not _was_renamed(temporary) or path.name not in list_names(path.parent):
            raise
    sync_folder(path.parent)


def write_once(path: Path, text: str) -> bool:
    """Write a text into a new file of this machine's own, whole or not at all; False where there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    prepared = path.with_name(f".{token}")
    prepared.write_text(text)
    try:
        os.link(prepared, path)
    except FileExistsError:
        return False
    finally:
        prepared.unlink()
    return True


def take_name(prepared: Path, target: Path) -> bool:
    """Rename a prepared folder onto a name; False where another one has it, and this one is removed."""
    try:
        prepared.rename(target)
    except OSError:
        if not _was_renamed(prepared):
            shutil.rmtree(prepared, ignore_errors=True)
            if target.name not in list_names(target.parent):
                raise
            return False
    sync_folder(target.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and creations in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _was_renamed(path: Path) -> bool:
    """Whether what only this process renames is gone: the answer to a rename can be lost, and repeating it fails."""
    refresh(path.parent)
    return path.name not in list_names(path.parent)


def _write_beside(path: Path, record: Record, mode: int) -> Path:
    token = uuid.uuid4().hex
    temporary = path.with_name(f".{path.name}.{token}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(record, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary
