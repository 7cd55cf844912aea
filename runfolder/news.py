"""What a mirror of run folders lacks: of what a delivery to MLflow reads, all that is new, for many runs in one trip.

The machine that has the folders says it (`news_of_runs`), the one that keeps the mirror takes it (mirror.py). Files
that attempts append to come from where the mirror has got to, up to their seals; others come whole. What is given of
an attempt without a successor is on disk, and was there while it had none: so it lies below every later seal.
"""

import hashlib
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from runfolder.appended import sealed_size
from runfolder.chain import Attempt, last_slot, result, settle, slots
from runfolder.delivered import tracked_run
from runfolder.files import list_names, read_json, refresh, sha256
from runfolder.record import load_job
from runfolder.row_results import last_row_results

UNREADABLE = (OSError, ValueError, LookupError, TypeError)  # what reading a damaged run raises
TRIP_BYTES = 4 << 20  # of files in one answer, and at most one file that comes whole beyond that
_LARGEST_WHOLE = 1 << 20  # the largest file of an output that comes: weights stay where they are
_LARGEST_RESULTS = 4 << 20  # the largest file of an evaluation's rows that comes, of a run that has ended
_APPENDED = re.compile(r"attempts/([1-9]\d{0,8})/((?:events|metrics|system)\.jsonl)")
_WHOLE = re.compile(
    r"(?:job\.yaml|run\.json|result\.json|mlflow/run\.json|attempts/[1-9]\d{0,8}/(?:claim|seals|verdict)\.json"
    r"|attempts/[1-9]\d{0,8}/evaluations/step-\d{1,15}\.jsonl"
    r"|output(?:/(?!\.{1,2}(?:/|\Z))[^/\0]{1,255}){1,9})"
)

# What a mirror has of a run: of each file its size, or its digest where it comes whole. A number is the slot that
# closed the run, where nothing of it waits to be delivered.
Known = int | Mapping[str, int | str]


def _is_mirrored(path: str) -> str:
    """The path, if a mirror has files of that name; raises ValueError for any other, wherever it leads."""
    if not _APPENDED.fullmatch(path) and not _WHOLE.fullmatch(path):
        raise ValueError(f"{path!r} is nothing that a mirror has")
    return path


MirroredPath = Annotated[str, AfterValidator(_is_mirrored)]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NewsPart(_Plain):
    """Bytes (base64) of a file from an offset on; an offset of None: the whole file."""

    path: MirroredPath
    offset: NonNegativeInt | None
    data: str

    @property
    def content(self) -> bytes:
        """The bytes; raises ValueError where they are none."""
        return b64decode(self.data, validate=True)


class RunNews(_Plain):
    """What is new of one run: parts, files that are gone, its folder there; or why it cannot be read."""

    run_dir: str
    parts: list[NewsPart] = []
    gone: list[MirroredPath] = []
    damaged: str | None = None


class News(_Plain):
    """What is new of runs, by run id, and the runs of which there is more; others need nothing."""

    runs: dict[str, RunNews]
    more: list[str]


@dataclass
class _Trip:
    """How many bytes may still go into an answer."""

    left: int

    def take(self, size: int) -> int:
        """As many of these bytes as there is room for."""
        taken = min(size, max(0, self.left))
        self.left -= taken
        return taken


def news_of_runs(root: Path, known: Mapping[str, Known], limit: int = TRIP_BYTES) -> News:
    """What is new of runs below a folder, in this order; what has no room in the answer comes with the next one."""
    existing = set(list_names(root))
    runs = {}
    more = []
    trip = _Trip(limit)
    for run_id, have in known.items():
        if run_id not in existing:
            continue
        if trip.left <= 0:
            more.append(run_id)
            continue
        run_dir = root / run_id
        reader = _Reader(run_dir, trip)
        try:
            if _needs_nothing(run_dir, have):
                continue
            if not reader.read(have):
                more.append(run_id)
        except UNREADABLE as error:
            damaged = f"{run_dir}: {type(error).__name__}: {error}"
            runs[run_id] = RunNews(run_dir=str(run_dir), damaged=damaged)
            continue
        runs[run_id] = RunNews(run_dir=str(run_dir), parts=reader.parts, gone=reader.gone)
    return News(runs=runs, more=more)


def mirrored_files(run_dir: Path) -> list[str]:
    """The files of a run folder, or of its mirror, that a mirror has."""
    files = list_names(run_dir)
    for slot in slots(run_dir):
        for name in list_names(slot.folder):
            files.append(f"attempts/{slot.number}/{name}")
    if _has_shared_run(run_dir):
        files.append("mlflow/run.json")
    with suppress(*UNREADABLE):  # half a mirror: the file comes last
        files += _last_evaluation(run_dir)
    for path in (run_dir / "output").rglob("*"):
        if path.is_file() and path.stat().st_size <= _LARGEST_WHOLE:
            file = path.relative_to(run_dir)
            files.append(file.as_posix())
    return [file for file in files if _APPENDED.fullmatch(file) or _WHOLE.fullmatch(file)]


def _last_evaluation(run_dir: Path) -> list[str]:
    """The file of the last evaluation of a run that has ended, unless it is too large."""
    if result(run_dir) is None:
        return []
    path = last_row_results(run_dir)
    if path is None or path.stat().st_size > _LARGEST_RESULTS:
        return []
    file = path.relative_to(run_dir)
    return [file.as_posix()]


def state_of(path: Path, file: str) -> int | str:
    """What tells whether a file has changed: its size, or its digest where it comes whole."""
    if _APPENDED.fullmatch(file):
        return path.stat().st_size
    return sha256(path)


def _has_shared_run(run_dir: Path) -> bool:
    """Whether a run has an MLflow run on a server: that counts for all; one in a database of a machine, for that."""
    if "mlflow" not in list_names(run_dir):
        return False
    uri: str = read_json(run_dir / "mlflow" / "run.json")["uri"]
    return not uri.startswith("sqlite")


def _needs_nothing(run_dir: Path, known: Known) -> bool:
    """Whether all of a closed run was delivered: by the one who asks, or from here to a server."""
    if isinstance(known, int):
        return known == last_slot(run_dir)
    if tracked_run(run_dir) is None:
        return False
    job = load_job(run_dir)
    return job.tracking.uri is not None


class _Reader:
    """Reads what is new of one run, as far as there is room for it."""

    def __init__(self, run_dir: Path, trip: _Trip) -> None:
        self.run_dir = run_dir
        self.parts: list[NewsPart] = []
        self.gone: list[str] = []
        self._trip = trip

    def read(self, have: Known) -> bool:
        """Read what is new; whether that is all of it."""
        if isinstance(have, int):
            return False  # it goes on since it was delivered: the one who asks has to say what is there
        with suppress(PermissionError):
            settle(self.run_dir)  # whoever closed it may have died before its output was in place
        newest = last_slot(self.run_dir)
        files = mirrored_files(self.run_dir)
        self.gone = [file for file in have if file not in files]
        is_all = True
        for file in files:
            is_all = self._read_file(file, have.get(file)) and is_all
        if newest:
            refresh(self.run_dir / "attempts")
        if last_slot(self.run_dir) != newest:
            self.parts = []  # some may lie behind the seal that is being written
            return False
        return is_all

    def _read_file(self, file: str, have: int | str | None) -> bool:
        """Read what is new of a file; whether that is all of it."""
        appended = _APPENDED.fullmatch(file)
        if appended:
            number, name = appended.groups()
            attempt = Attempt(self.run_dir, int(number))
            return self._read_appended(attempt, name, int(have or 0))
        path = self.run_dir / file
        data = path.read_bytes()
        digest = hashlib.sha256(data)
        if digest.hexdigest() == have:
            return True
        if self._trip.left <= 0:
            return False
        self._trip.take(len(data))
        self._add(file, None, data)
        return True

    def _read_appended(self, attempt: Attempt, name: str, offset: int) -> bool:
        """Read what was appended from an offset on, up to the seal; whether that is all of it."""
        path = attempt.folder / name
        stop = sealed_size(attempt, name)
        if stop is None:
            if not attempt.is_live() and result(self.run_dir) is None:
                return False  # its successor is about to say how much of it counts
            attempt.sync(name)  # what a crash of the machine takes back must not be reported
            stop = path.stat().st_size
        wanted = max(0, stop - offset)
        size = self._trip.take(wanted)
        if size:
            with path.open("rb") as stream:
                stream.seek(offset)
                data = stream.read(size)
            self._add(f"attempts/{attempt.number}/{name}", offset, data)
        return size == wanted

    def _add(self, file: str, offset: int | None, data: bytes) -> None:
        encoded = b64encode(data)
        part = NewsPart(path=file, offset=offset, data=encoded.decode())
        self.parts.append(part)
