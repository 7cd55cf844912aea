"""Mirrors of run folders that other machines have: what a delivery to MLflow reads of them, and nothing else.

A mirror is itself a run folder, with what this machine delivered of it (`mlflow/`, `tracked.json`), and `mirror.json`
says where the real one is. It is a cache: it may be removed at any time, and comes again. One process at a time
brings it up to date.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runfolder.chain import last_slot
from runfolder.delivered import is_delivered
from runfolder.files import Damaged, Record, list_names, read_json
from runfolder.folders import home
from runfolder.news import UNREADABLE, Known, NewsPart, RunNews, mirrored_files, state_of
from runfolder.site import Site

_MARK = "mirror.json"


def mirrored_from(run_dir: Path) -> str | None:
    """The run folder that this one is a mirror of; None where it is none."""
    if _MARK not in list_names(run_dir):
        return None
    origin: str = read_json(run_dir / _MARK)["run_dir"]
    return origin


@dataclass(frozen=True)
class Mirror:
    """The mirrors of the runs of one cluster, below a folder."""

    folder: Path

    @staticmethod
    def of_cluster(name: str) -> "Mirror":
        """The mirrors of a cluster's runs on this machine."""
        mirrors = home() / "mirrors"
        return Mirror(mirrors / name)

    def run_dir(self, run_id: str) -> Path:
        """The mirror of a run, whether there is one yet or not."""
        return self.folder / run_id

    def mlflow_run(self, run_id: str) -> Record | None:
        """The MLflow run that this machine has delivered to; None where there is none, or no mirror."""
        with suppress(*UNREADABLE):
            return read_json(self.run_dir(run_id) / "mlflow.json")
        return None

    def update(self, site: Site, run_ids: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """Bring what is new; gives each run of which something may wait to be delivered, once all of it is here.

        With it comes why it cannot be read, None where it can. Raises what the site raises.
        """
        known = {run_id: self._known(run_id) for run_id in run_ids}
        while known:
            news = site.news(known)
            left: dict[str, Known] = {}
            for run_id, have in known.items():
                run_news = news.runs.get(run_id)
                flaw = self._take(run_id, run_news) if run_news else None
                if flaw or (run_news and run_id not in news.more):
                    yield run_id, flaw
                elif run_id in news.more:
                    left[run_id] = self._files(run_id) if run_news else have
            if left == known:
                break
            known = left
        for run_id in known:
            yield run_id, "its folder changes just now; repeat it"

    def _known(self, run_id: str) -> Known:
        """What is here of a run: the slot that closed it, where nothing of it waits to be delivered."""
        run_dir = self.run_dir(run_id)
        with suppress(*UNREADABLE):
            if is_delivered(run_dir):
                return last_slot(run_dir)
        return self._files(run_id)

    def _files(self, run_id: str) -> dict[str, int | str]:
        """What is here of a run, file by file; a mirror that cannot be read is removed."""
        run_dir = self.run_dir(run_id)
        files = {}
        try:
            for file in mirrored_files(run_dir):
                files[file] = state_of(run_dir / file, file)
        except UNREADABLE:
            shutil.rmtree(run_dir)
            return {}
        return files

    def _take(self, run_id: str, news: RunNews) -> str | None:
        """Take over what is new of a run; gives why that cannot be, None where all is well."""
        if news.damaged:
            return news.damaged
        run_dir = self.run_dir(run_id)
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            for file in news.gone:
                _remove(run_dir / file)
            for part in news.parts:
                self._write(run_dir / part.path, part)
            mark = json.dumps({"run_dir": news.run_dir})
            self._place(run_dir / _MARK, mark.encode())
        except (OSError, ValueError) as error:
            return f"{run_dir}: {error}"
        return None

    def _write(self, path: Path, part: NewsPart) -> None:
        """Write a part of a file; raises ValueError where it does not belong there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.offset is None:
            self._place(path, part.content)
            return
        with path.open("ab") as stream:
            if stream.tell() != part.offset:
                raise Damaged(f"{part.path}: found {stream.tell()} bytes, and a part from {part.offset} on")
            stream.write(part.content)

    def _place(self, path: Path, data: bytes) -> None:
        """Write a file whole or not at all; what a crash of the machine takes of it comes again."""
        arriving = self.folder / ".arriving"
        arriving.write_bytes(data)
        arriving.replace(path)


def _remove(path: Path) -> None:
    """Remove a file, and its folder with the last one."""
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()
