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
from runfolder.site import Ask, Refused
from runfolder.snapshot import Snapshot


@dataclass(frozen=True)
class Far:
    """The run folders that a command answers for: `command` starts `python -m runfolder ROOT` where they are."""

    name: str  # of the cluster, for what is said to people
    command: Sequence[str]
    timeout_s: float = 60.0

    def ids(self) -> list[str]:
        """The names of all run folders, damaged ones too."""
        found: list[str] = self._ask(verb="ids")
        return found

    def create(self, run_id: str, record: Mapping[str, Any]) -> Record | None:
        """Make a run folder whole or not at all; gives the record of the one that was there already, else None."""
        found: Record | None = self._ask(verb="create", run_id=run_id, record=record)
        return found

    def record(self, run_id: str) -> Record:
        """What was submitted; raises Damaged."""
        found: Record = self._ask(verb="record", run_id=run_id)
        return found

    def snapshots(self, run_ids: Iterable[str]) -> dict[str, Snapshot]:
        """How runs stand: one trip for all of them; a run that is not there is left out."""
        found = self._ask(verb="snapshots", run_ids=list(run_ids))
        return {run_id: Snapshot.load(plain) for run_id, plain in found.items()}

    def read(self, run_id: str, since: Mapping[str, Position]) -> dict[str, list[Chunk]]:
        """What was appended to files of a run's attempts since these positions."""
        positions = {file: astuple(position) for file, position in since.items()}
        found = self._ask(verb="read", run_id=run_id, since=positions)
        return {file: [_chunk(plain) for plain in chunks] for file, chunks in found.items()}

    def files(self, run_id: str) -> list[str]:
        """The files that a run's attempts append to, like `metrics.jsonl` and `logs/rank-0.log`."""
        found: list[str] = self._ask(verb="files", run_id=run_id)
        return found

    def entrust(self, run_id: str, secrets: Mapping[str, str]) -> None:
        """Keep secrets of a run by name, in place of older ones, for its owner alone."""
        self._ask(verb="entrust", run_id=run_id, secrets=dict(secrets))

    def ask(self, run_id: str, what: Ask, step: int | None = None) -> Record | None:
        """Ask for the end of a run, or let one go on; gives the result that it had before. Raises Refused."""
        found: Record | None = self._ask(verb="ask", run_id=run_id, what=what, step=step)
        return found

    def fetch(self, run_id: str, to: Path) -> Path:
        """Bring the output, the result and the job of a run into a new folder `to`."""
        to.mkdir(parents=True)
        request = json.dumps({"verb": "fetch", "run_id": run_id}).encode()
        with subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin and process.stdout
            process.stdin.write(request)
            process.stdin.close()
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    archive.extractall(to, filter="data")
            except tarfile.TarError as error:
                raise Unreachable(f"cluster {self.name}: {run_id} did not come whole: {error}") from None
        return to

    def _ask(self, **request: Any) -> Any:
        """The answer to a request; raises Refused, Damaged, and Unreachable where none came."""
        try:
            done = subprocess.run(
                self.command, input=json.dumps(request), capture_output=True, text=True, timeout=self.timeout_s
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unreachable(f"cluster {self.name}: {error}") from None
        try:
            said: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode} without an answer"])[-1]
            raise Unreachable(f"cluster {self.name}: {last}") from None
        if "refused" in said:
            raise Refused(said["refused"])
        if "damaged" in said:
            raise Damaged(said["damaged"])
        return said["answer"]


def _chunk(plain: Mapping[str, Any]) -> Chunk:
    return Chunk(b64decode(plain["data"]), Position(*plain["after"]), plain["sealed"])
