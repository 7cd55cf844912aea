"""Run folders of another machine: requests go over a link, and `python -m runfolder` answers them there."""

import json
import subprocess
import tarfile
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from clusters.base import Unreachable
from runfolder.appended import Chunk, Position
from runfolder.files import Damaged, Record
from runfolder.site import Appended, Ask, Ended, PlainData, Positions, Refused
from runfolder.snapshot import Snapshot


@dataclass(frozen=True)
class RemoteSite:
    """The run folders that a command answers for: `command` starts `python -m runfolder ROOT` where they are."""

    name: str  # of the cluster, for what is said to people
    command: Sequence[str]
    timeout_s: float = 60.0

    def ids(self) -> list[str]:
        """The names of all run folders, damaged ones too."""
        ids: list[str] = self._request({"verb": "ids"})
        return ids

    def create(self, run_id: str, record: PlainData) -> Record | None:
        """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
        request = {"verb": "create", "run_id": run_id, "record": record}
        existing: Record | None = self._request(request)
        return existing

    def record(self, run_id: str) -> Record:
        """The record of what was submitted; raises Damaged."""
        record: Record = self._request({"verb": "record", "run_id": run_id})
        return record

    def snapshots(self, run_ids: Iterable[str]) -> dict[str, Snapshot]:
        """How runs stand: one trip for all of them; a run that is not there is left out."""
        answer = self._request({"verb": "snapshots", "run_ids": list(run_ids)})
        snapshots = {}
        for run_id, plain in answer.items():
            snapshots[run_id] = Snapshot.load(plain)
        return snapshots

    def read(self, run_id: str, since: Positions) -> Appended:
        """What was appended to files of a run's attempts since these positions."""
        positions = {file: astuple(position) for file, position in since.items()}
        answer = self._request({"verb": "read", "run_id": run_id, "since": positions})
        appended = {}
        for file, chunks in answer.items():
            appended[file] = [_chunk_of(plain) for plain in chunks]
        return appended

    def files(self, run_id: str) -> list[str]:
        """The files that a run's attempts append to, like `metrics.jsonl` and `logs/rank-0.log`."""
        files: list[str] = self._request({"verb": "files", "run_id": run_id})
        return files

    def write_secrets(self, run_id: str, secrets: Mapping[str, str]) -> None:
        """Keep secrets of a run by name, in place of older ones, for its owner alone."""
        plain = dict(secrets)
        request = {"verb": "entrust", "run_id": run_id, "secrets": plain}
        self._request(request)

    def ask(self, run_id: str, what: Ask, step: int | None = None) -> Ended:
        """Ask for the end of a run, or let one go on; gives the result that it had before. Raises Refused."""
        request = {"verb": "ask", "run_id": run_id, "what": what, "step": step}
        ended: Ended = self._request(request)
        return ended

    def fetch(self, run_id: str, to: Path) -> Path:
        """Bring the output, the result and the job of a run into a new folder `to`."""
        to.mkdir(parents=True)
        request = json.dumps({"verb": "fetch", "run_id": run_id})
        with subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin and process.stdout
            process.stdin.write(request.encode())
            process.stdin.close()
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    archive.extractall(to, filter="data")
            except tarfile.TarError as error:
                raise Unreachable(f"cluster {self.name}: {run_id} did not come whole: {error}") from None
        return to

    def _request(self, request: PlainData) -> Any:
        """The answer to a request; raises Refused, Damaged, and Unreachable where none came."""
        try:
            completed = subprocess.run(
                self.command, input=json.dumps(request), capture_output=True, text=True, timeout=self.timeout_s
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unreachable(f"cluster {self.name}: {error}") from None
        try:
            reply: dict[str, Any] = json.loads(completed.stdout)
        except ValueError:
            lines = completed.stderr.strip().splitlines()
            reason = f"exit code {completed.returncode} without an answer"
            if lines:
                reason = lines[-1]
            raise Unreachable(f"cluster {self.name}: {reason}") from None
        if "refused" in reply:
            raise Refused(reply["refused"])
        if "damaged" in reply:
            raise Damaged(reply["damaged"])
        return reply["answer"]


def _chunk_of(plain: Record) -> Chunk:
    data = b64decode(plain["data"])
    after = Position(*plain["after"])
    return Chunk(data, after, plain["sealed"])
