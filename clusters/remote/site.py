"""Run folders of another machine: the verbs of a site as requests to its far side."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clusters.base import Unreachable
from clusters.remote.far_side import FarSide
from runfolder.appended import Chunk, Position
from runfolder.digests import loaded_files
from runfolder.fetched import is_fetched
from runfolder.files import Damaged, Record, sha256
from runfolder.news import Known, News
from runfolder.site import Appended, Ask, Ended, PlainData, Positions, Progress
from runfolder.snapshot import Snapshot

_MESSAGE_BYTES = 4 << 20


@dataclass(frozen=True)
class RemoteSite:
    """The run folders that a far side answers for."""

    far_side: FarSide
    is_here = False

    def expect(self) -> None:
        """Start the far side, beside what the caller does first; the first request tells what fails."""
        self.far_side.expect()

    def ids(self) -> list[str]:
        """The names of all run folders, damaged ones too."""
        ids: list[str] = self._ask("ids")
        return ids

    def create(self, run_id: str, record: PlainData) -> Record | None:
        """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
        existing: Record | None = self._ask("create", run_id=run_id, record=record)
        return existing

    def record(self, run_id: str) -> Record:
        """What was submitted; raises Damaged."""
        record: Record = self._ask("record", run_id=run_id)
        return record

    def snapshots(self, run_ids: Iterable[str], in_full: bool = False) -> dict[str, Snapshot]:
        """How runs stand: one trip for all of them; a run that is not there is left out. Full views read all rows."""
        answer = self._ask("snapshots", run_ids=list(run_ids), in_full=in_full)
        snapshots = {}
        for run_id, plain in answer.items():
            snapshots[run_id] = Snapshot.load(plain)
        return snapshots

    def read(self, run_id: str, since: Positions) -> Appended:
        """What was appended to files of a run's attempts since these positions."""
        positions = {file: astuple(position) for file, position in since.items()}
        answer = self._ask("read", run_id=run_id, since=positions)
        appended = {}
        for file, chunks in answer.items():
            appended[file] = [_chunk(plain) for plain in chunks]
        return appended

    def files(self, run_id: str) -> list[str]:
        """The files that a run's attempts append to, like `metrics.jsonl` and `logs/rank-0.log`."""
        files: list[str] = self._ask("files", run_id=run_id)
        return files

    def write_secrets(self, run_id: str, secrets: Mapping[str, str]) -> None:
        """Keep secrets of a run that goes on by name, in place of older ones, for its owner alone."""
        if secrets:
            self._ask("write_secrets", run_id=run_id, secrets=dict(secrets))

    def kept_secrets(self, run_id: str) -> list[str]:
        """The names of the secrets that a run has."""
        names: list[str] = self._ask("kept_secrets", run_id=run_id)
        return names

    def ask(self, run_id: str, what: Ask, step: int | None = None, why: str | None = None) -> Ended:
        """Ask for the end of a run, or let one go on; gives the result that it had before. Raises Refused."""
        ended: Ended = self._ask("ask", run_id=run_id, what=what, step=step, why=why)
        return ended

    def news(self, known: Mapping[str, Known]) -> News:
        """What a mirror of runs lacks, beside what is known of each; raises Damaged where it may not have that."""
        answer = self._ask("news", known=known)
        try:
            return News.model_validate(answer)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise Damaged(f"cluster {self.far_side.name}: what it sent is refused: {first['msg']}") from None

    def fetch(self, run_id: str, to: Path) -> Path:
        """Bring the output, the result and the job of a run into a folder `to`; repeated, it goes on with what lacks.

        Each file is verified by its digest, and has its name only when it is whole.
        """
        for file in self._ask("listing", run_id=run_id):
            self._fetch_file(run_id, file, to)
        return to

    def bring(self, path: Path, progress: Progress) -> Path:
        """Have a file, or those of a base's folder that are loaded, there; each is sent once, by its digest.

        What was cut goes on from where it was. `progress` is called with the bytes that are there, and their number.
        """
        if not path.is_dir():
            (there,) = self._bring_files([path], progress).values()
            return Path(there)
        files = self._bring_files(loaded_files(path), progress)
        return Path(self._ask("shelf_folder", files=files))

    def digest(self, path: Path) -> str | None:
        """sha256 of a file that is there; None where it cannot be read."""
        digest: str | None = self._ask("digest", path=str(path))
        return digest

    def _bring_files(self, paths: list[Path], progress: Progress) -> dict[str, str]:
        """Have files there: the name of each -> its path there."""
        total = sum(path.stat().st_size for path in paths)
        before = 0
        there = {}
        for path in paths:
            there[path.name] = self._bring_file(path, partial(_report, progress, before, total))
            before += path.stat().st_size
        return there

    def _bring_file(self, path: Path, progress: Callable[[int], None]) -> str:
        """Have a file there; gives its path there."""
        digest = sha256(path)
        state = self._ask("shelf_state", digest=digest, name=path.name)
        offset = state["offset"]
        if offset is not None:
            with path.open("rb") as stream:
                stream.seek(offset)
                while data := stream.read(_MESSAGE_BYTES):
                    offset = self._ask("shelf_add", digest=digest, offset=offset, data=b64encode(data).decode())
                    stream.seek(offset)
                    progress(offset)
            self._ask("shelf_accept", digest=digest, name=path.name)
        progress(path.stat().st_size)
        return str(state["path"])

    def _fetch_file(self, run_id: str, file: Record, to: Path) -> None:
        """Bring one file {path, size, sha256}, unless it is here already; raises Damaged for one that is no part."""
        if not is_fetched(file["path"]):
            raise Damaged(f"cluster {self.far_side.name}: what it sent is refused: the path {file['path']!r}")
        path = to / file["path"]
        if path.exists() and sha256(path) == file["sha256"]:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.part")
        with unfinished.open("ab") as stream:
            while stream.tell() < file["size"]:
                data = self._part(run_id, file["path"], stream.tell())
                if not data:
                    break
                stream.write(data)
        if sha256(unfinished) != file["sha256"]:
            unfinished.unlink()
            raise Unreachable(f"cluster {self.far_side.name}: {file['path']} did not come whole; fetch it again")
        unfinished.replace(path)

    def _part(self, run_id: str, path: str, offset: int) -> bytes:
        """Bytes of a file of a run from an offset on."""
        place = {"run_id": run_id, "path": path, "offset": offset}
        encoded = self._ask("part", **place, length=_MESSAGE_BYTES)
        return b64decode(encoded)

    def _ask(self, verb: str, **arguments: Any) -> Any:
        question = {"verb": verb, **arguments}
        return self.far_side.ask(question)


def _report(progress: Progress, before: int, total: int, sent: int) -> None:
    """Tell how many bytes of several files are there, after those `before` this file."""
    progress(before + sent, total)


def _chunk(plain: Record) -> Chunk:
    data = b64decode(plain["data"])
    after = Position(*plain["after"])
    return Chunk(data, after, plain["sealed"])
