"""The shelf of files that jobs brought along, on file systems that lack this or that."""

import errno
import fcntl
import hashlib
import os
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from clusters import file_locks
from clusters.remote import setup
from clusters.remote.shelf import Shelf


def put(shelf: Shelf, name: str, content: bytes) -> str:
    """Bring a file as a client does; gives its path."""
    digest = hashlib.sha256(content).hexdigest()
    shelf.add(digest, 0, b64encode(content).decode())
    return shelf.accept(digest, name)


def test_a_folder_whose_files_were_purged_gets_them_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "files")
    contents = {"config.json": b"{}", "weights": b"w" * 1000}
    folder = Path(shelf.folder({name: put(shelf, name, content) for name, content in contents.items()}))
    for path in (tmp_path / "files").rglob("*"):
        if path.is_file():
            path.unlink()  # as a scratch file system removes what is old, and leaves folders
    again = shelf.folder({name: put(shelf, name, content) for name, content in contents.items()})
    assert again == str(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


def test_a_file_system_without_hard_links_has_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    shelf = Shelf(tmp_path / "files")
    folder = Path(shelf.folder({"config.json": put(shelf, "config.json", b"{}")}))
    assert (folder / "config.json").read_bytes() == b"{}"
    assert not [path for path in (tmp_path / "files").iterdir() if path.name.startswith(".")]


@pytest.fixture
def without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files cannot be locked, on a host where others can."""
    folder = tmp_path / "shared"
    folder.mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(file_locks.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    flock = fcntl.flock

    def lustre(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(folder):
            raise OSError(errno.ENOSYS, "Function not implemented")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lustre)
    return folder


def test_files_come_where_there_are_no_locks(without_locks: Path) -> None:
    path = Path(put(Shelf(without_locks / "files"), "rows.jsonl", b"{}\n"))
    assert path.read_bytes() == b"{}\n"


def test_one_environment_is_made_at_a_time_where_there_are_no_locks(without_locks: Path) -> None:
    lock = file_locks.lock_file(without_locks / "lock")
    assert lock == file_locks.lock_file(without_locks / "lock") != file_locks.lock_file(without_locks / "other")
    with lock.open("a") as first, file_locks.lock_file(without_locks / "lock").open("a") as second:
        assert not setup._is_held(first.fileno(), fcntl.LOCK_EX)
        assert setup._is_held(second.fileno(), fcntl.LOCK_EX)


def test_a_file_that_can_be_locked_carries_its_own_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert file_locks.lock_file(path) == path
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert file_locks.lock_file(path) == path


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    shelf = Shelf(tmp_path)
    digest = hashlib.sha256(b"x").hexdigest()
    (tmp_path / f".{digest}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        shelf.add(digest, 0, b64encode(b"x").decode())
    assert raised.value.filename == str(tmp_path / f".{digest}")
