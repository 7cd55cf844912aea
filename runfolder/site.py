"""Where run folders are: the run-folder half of every verb, in process for this machine.

For another machine the same code runs there: `requested.py` does what a request asks, for many runs in one trip
(`clusters/answer.py`), and `clusters/remote/site.py` is the end that asks.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from runfolder.appended import Chunk, Position, appended_files, read_from
from runfolder.chain import reopen, result, see_slots
from runfolder.digests import changes
from runfolder.fetched import paths_to_fetch
from runfolder.files import Damaged, Record, list_names, sha256
from runfolder.news import Known, News, news_of_runs
from runfolder.record import create_run_folder, job_in, read_brief, read_record
from runfolder.requests import cancel_requested, pause_step, request_cancel, request_pause
from runfolder.secrets import read_secrets, write_secrets
from runfolder.service import ServiceSpec
from runfolder.snapshot import Snapshot, snapshot
from runfolder.staged_job import StagedJob
from runfolder.stages import reopen_stages

Ask = Literal["cancel", "cancel_saved", "pause", "reopen"]
Positions = Mapping[str, Position]  # of each file, how far it was read
Appended = dict[str, list[Chunk]]  # what was appended to each file since
Ended = Record | None  # the result of a run; None while it goes on
PlainData = Mapping[str, Any]  # what JSON can hold
Progress = Callable[[int, int], None]  # bytes that are there, and how many there will be


class Refused(ValueError):
    """What a run cannot do any more, or as things are; the message has one line for each reason."""


class Site(Protocol):
    """The run folders of one place. Every method may raise Unreachable, and is safe to repeat."""

    @property
    def is_here(self) -> bool:
        """Whether files of this machine are at the same paths where the runs are."""
        ...

    def expect(self) -> None:
        """Get ready for what will be asked, beside what the caller does first; tells of no failure."""
        ...

    def ids(self) -> list[str]:
        """The names of all run folders, damaged ones too."""
        ...

    def create(self, run_id: str, record: PlainData) -> Record | None:
        """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
        ...

    def record(self, run_id: str) -> Record:
        """The record of what was submitted; raises Damaged."""
        ...

    def snapshots(self, run_ids: Iterable[str], in_full: bool = False) -> dict[str, Snapshot]:
        """How runs stand: one trip for all of them; a run that is not there is left out. Full views read all rows."""
        ...

    def read(self, run_id: str, since: Positions) -> Appended:
        """What was appended to files of a run's attempts since these positions."""
        ...

    def files(self, run_id: str) -> list[str]:
        """The files that a run's attempts append to, like `metrics.jsonl` and `logs/rank-0.log`."""
        ...

    def write_secrets(self, run_id: str, secrets: Mapping[str, str]) -> None:
        """Keep secrets of a run that goes on by name, in place of older ones, for its owner alone."""
        ...

    def kept_secrets(self, run_id: str) -> list[str]:
        """The names of the secrets that a run has."""
        ...

    def ask(self, run_id: str, what: Ask, step: int | None = None, why: str | None = None) -> Ended:
        """Ask for the end of a run that goes on, or let one go on that has ended otherwise than well.

        With `cancel_saved` and `pause` it saves first; it pauses after `step`, or after the one that it is at. `why`:
        where nobody wants a `cancel`, but it cannot go on. Gives the result that the run had before, None where it
        had none. Raises Refused.
        """
        ...

    def news(self, known: Mapping[str, Known]) -> News:
        """What a mirror of runs lacks, beside what is known of each: one trip for all of them (see news.py)."""
        ...

    def fetch(self, run_id: str, to: Path) -> Path:
        """Bring the output, the result and the job of a run into a folder `to`."""
        ...

    def bring(self, path: Path, progress: Progress) -> Path:
        """Have a file of this machine, or the files of a folder, where the runs are; gives the path there.

        `progress` is called with the bytes that are there, and how many there will be.
        """
        ...

    def digest(self, path: Path) -> str | None:
        """sha256 of a file that is where the runs are; None where it cannot be read."""
        ...


class LocalSite:
    """The run folders below `root` on this machine."""

    is_here = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def expect(self) -> None:
        """There is nothing to get ready."""

    def ids(self) -> list[str]:
        """The names of all run folders, damaged ones too."""
        ids = []
        for name in list_names(self.root):
            if not name.startswith("."):
                ids.append(name)
        return ids

    def create(self, run_id: str, record: PlainData) -> Record | None:
        """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
        run_dir = self.root / run_id
        whole_record = {"run_id": run_id, **record}
        return create_run_folder(run_dir, whole_record)

    def record(self, run_id: str) -> Record:
        """The record of what was submitted; raises Damaged."""
        run_dir = self.root / run_id
        return read_record(run_dir)

    def snapshots(self, run_ids: Iterable[str], in_full: bool = False) -> dict[str, Snapshot]:
        """How runs stand; a run that is not there is left out. Full views read all rows."""
        existing = set(list_names(self.root))
        snapshots = {}
        for run_id in run_ids:
            if run_id in existing:
                snapshots[run_id] = snapshot(self.root / run_id, in_full)
        return snapshots

    def read(self, run_id: str, since: Positions) -> Appended:
        """What was appended to files of a run's attempts since these positions."""
        run_dir = self.root / run_id
        appended = {}
        for file, position in since.items():
            chunks = read_from(run_dir, file, position)
            appended[file] = list(chunks)
        return appended

    def files(self, run_id: str) -> list[str]:
        """The files that a run's attempts append to, like `metrics.jsonl` and `logs/rank-0.log`."""
        run_dir = self.root / run_id
        return appended_files(run_dir)

    def write_secrets(self, run_id: str, secrets: Mapping[str, str]) -> None:
        """Keep secrets of a run that goes on by name, in place of older ones, for its owner alone."""
        run_dir = self._existing(run_id)
        if result(run_dir) is None:
            write_secrets(run_dir, secrets)

    def kept_secrets(self, run_id: str) -> list[str]:
        """The names of the secrets that a run has."""
        secrets = read_secrets(self._existing(run_id))
        return list(secrets)

    def ask(self, run_id: str, what: Ask, step: int | None = None, why: str | None = None) -> Ended:
        """Ask for the end of a run, or let one go on; gives the result that it had before. Raises Refused."""
        run_dir = self._existing(run_id)
        see_slots(run_dir)
        ended = result(run_dir)
        brief = _brief_of(run_dir)
        whole = brief.get("stage_of")
        if whole:
            raise Refused(f"run {run_id}: it is a stage of {whole}; allowed: the same of {whole}")
        if what == "pause" and brief.get("stages"):
            allowed = f"fleetune cancel --save {run_id}, and later fleetune resume {run_id}"
            raise Refused(f"run {run_id}: a job of stages does not pause after a step; allowed: {allowed}")
        if what == "reopen":
            _reopen(run_dir, ended)
        elif ended is None:
            _request_end(run_dir, what, step, why)
        elif ended["state"] != "cancelled":
            raise Refused(f"run {run_id}: it has {ended['state']} already")
        return ended

    def news(self, known: Mapping[str, Known]) -> News:
        """What a mirror of runs lacks, beside what is known of each."""
        return news_of_runs(self.root, known)

    def fetch(self, run_id: str, to: Path) -> Path:
        """Copy the output, the result and the job of a run into a folder `to`."""
        run_dir = self._existing(run_id)
        to.mkdir(parents=True, exist_ok=True)
        for path in paths_to_fetch(run_dir):
            copy = to / path.name
            if path.is_dir():
                shutil.copytree(path, copy, dirs_exist_ok=True)
            else:
                shutil.copy2(path, copy)
        return to

    def listing(self, run_id: str) -> list[Record]:
        """The files that `fetch` brings: {path, size, sha256} each."""
        run_dir = self._existing(run_id)
        files = []
        for top in paths_to_fetch(run_dir):
            inner = sorted(top.rglob("*")) if top.is_dir() else [top]
            for path in inner:
                if path.is_file():
                    relative = path.relative_to(run_dir)
                    files.append({"path": str(relative), "size": path.stat().st_size, "sha256": sha256(path)})
        return files

    def bring(self, path: Path, progress: Progress) -> Path:  # noqa: ARG002
        """The file as it is: it is here already."""
        return path

    def digest(self, path: Path) -> str | None:
        """sha256 of a file; None where it cannot be read."""
        try:
            return sha256(path)
        except OSError:
            return None

    def _existing(self, run_id: str) -> Path:
        """The folder of a run; raises Refused where there is none."""
        if run_id not in list_names(self.root):
            raise Refused(f"run {run_id}: its folder is not there any more")
        return self.root / run_id


def _brief_of(run_dir: Path) -> Record:
    """The brief of a run; nothing of one that cannot be read, whose end can be asked for all the same."""
    try:
        return read_brief(run_dir, list_names(run_dir))
    except Damaged:
        return {}


def _request_end(run_dir: Path, what: Ask, step: int | None, why: str | None) -> None:
    """Ask for the end of a run that goes on."""
    if what == "pause":
        if not step:
            step = snapshot(run_dir).step + 1
        request_pause(run_dir, step)
    else:
        save = what == "cancel_saved"
        request_cancel(run_dir, save, why)


def _reopen(run_dir: Path, ended: Ended) -> None:
    """Let a run go on whose inputs are those of its submission; one that goes on is left alone."""
    if ended is not None and ended["state"] == "succeeded":
        raise Refused(f"run {run_dir.name}: it has succeeded, there is nothing to go on with")
    if ended is None and is_ending(run_dir):
        way_out = f"where nothing runs it any more, end it with: fleetune cancel {run_dir.name}"
        raise Refused(f"run {run_dir.name}: it was asked to end and has not yet; resume it when it has; {way_out}")
    record = read_record(run_dir)
    path = run_dir / "job.yaml"
    work = job_in(record, str(path))
    known = record.get("digests") or {}
    changed = [] if isinstance(work, ServiceSpec) else changes(work, known)
    if changed:
        raise Refused("\n".join(changed))
    if ended is not None:
        if isinstance(work, StagedJob):
            reopen_stages(run_dir, work.stages)  # before it: who dies between them leaves what can be repeated
        reopen(run_dir)


def is_ending(run_dir: Path) -> bool:
    """Whether a run that goes on was asked to end, now or after the step that it is at."""
    pause = pause_step(run_dir)
    if cancel_requested(run_dir):
        return True
    if pause is None:
        return False
    next_step = snapshot(run_dir).step + 1
    return pause <= next_step
