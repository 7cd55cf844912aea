"""The log of one worker, joined over the attempts of a run, as it grows."""

import re

from orchestrator.errors import InputError
from orchestrator.runs import Handle, find
from runfolder.appended import Chunk, Follower, Position

_RANK = re.compile(r"logs/rank-(\d+)\.log")


class LogReader:
    """Reads what rank `rank` wrote, attempt after attempt, with a header line for each."""

    def __init__(self, run: Handle, rank: int = 0) -> None:
        self._site = run.site
        self._run_id = run.run_id
        self._rank = rank
        self._file = f"logs/rank-{rank}.log"
        self._follower = Follower(self._appended_since)
        self._attempt = 0

    def read(self, final: bool = False) -> str:
        """What is new since the last call, in whole lines; `final` takes a last line without its end too."""
        texts = []
        for attempt, data in self._follower.read(torn=final):
            texts.append(self._with_header(attempt, data))
        return "".join(texts)

    def _appended_since(self, position: Position) -> list[Chunk]:
        file = self._file
        by_file = self._site.read(self._run_id, {file: position})
        return by_file[file]

    def _with_header(self, attempt: int, data: bytes) -> str:
        """What was read as text that ends with a line; a header comes before the first text of an attempt."""
        text = data.decode(errors="replace")
        if data and not data.endswith(b"\n"):
            text += "\n"
        if attempt != self._attempt:
            text = f"=== attempt {attempt}, rank {self._rank} ===\n{text}"
            self._attempt = attempt
        return text


def logs(reference: str, rank: int = 0, cluster: str | None = None) -> str:
    """The whole log of a rank of a run, or what its controllers said before an attempt began.

    Raises InputError for a run or a rank that is not there.
    """
    run = find(reference, cluster)
    text = LogReader(run, rank).read(final=True)
    if text:
        return text
    ranks = _ranks(run)
    if ranks and rank not in ranks:
        allowed = ", ".join(map(str, ranks))
        raise InputError(f"--rank: found {rank}; allowed: {allowed}")
    return run.cluster.logs(run.run_id).text


def _ranks(run: Handle) -> list[int]:
    """The ranks of a run that have a log, in order."""
    ranks = []
    for file in run.site.files(run.run_id):
        match = _RANK.fullmatch(file)
        if match:
            ranks.append(int(match[1]))
    return sorted(ranks)
