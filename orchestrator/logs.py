"""The log of one worker, joined over the attempts of a run, as it grows."""

import re

from orchestrator.errors import InputError
from orchestrator.runs import Handle, find
from runfolder.appended import Chunk, Follower, Position

_RANK = re.compile(r"logs/rank-(\d+)\.log")


class LogReader:
    """Reads what rank `rank` wrote, attempt after attempt, with a header line for each."""

    def __init__(self, run: Handle, rank: int = 0) -> None:
        self._site, self._run_id, self._rank = run.site, run.run_id, rank
        self._file = f"logs/rank-{rank}.log"
        self._follower = Follower(self._since)
        self._attempt = 0

    def read(self, final: bool = False) -> str:
        """What is new since the last call, in whole lines; `final` takes a last line without its end too."""
        return "".join(self._shown(attempt, data) for attempt, data in self._follower.read(torn=final))

    def _since(self, position: Position) -> list[Chunk]:
        return self._site.read(self._run_id, {self._file: position})[self._file]

    def _shown(self, attempt: int, data: bytes) -> str:
        header = f"=== attempt {attempt}, rank {self._rank} ===\n" if attempt != self._attempt else ""
        self._attempt = attempt
        end = "\n" if data and not data.endswith(b"\n") else ""
        return header + data.decode(errors="replace") + end


def logs(reference: str, rank: int = 0) -> str:
    """The whole log of a rank of a run, or what its controllers said before an attempt began.

    Raises InputError for a run or a rank that is not there.
    """
    run = find(reference)
    if text := LogReader(run, rank).read(final=True):
        return text
    ranks = sorted(int(match[1]) for file in run.site.files(run.run_id) if (match := _RANK.fullmatch(file)))
    if ranks and rank not in ranks:
        raise InputError(f"--rank: found {rank}; allowed: {', '.join(map(str, ranks))}")
    return run.cluster.logs(run.run_id).text
