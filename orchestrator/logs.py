"""The logs of the workers of a run, joined over its attempts, as they grow."""

import re
from collections import defaultdict
from collections.abc import Iterator

from orchestrator.errors import InputError
from orchestrator.runs import Handle, at_stage, find
from runfolder.appended import Follower

_RANK = re.compile(r"logs/rank-(\d+)\.log")


class LogReader:
    """Reads what rank `rank` wrote, attempt after attempt; without a rank what all of them wrote.

    Each read goes on at the byte up to which it has read each file. A line comes before the text of each attempt.
    Where all ranks are read, each line says whose it is. They write down no times: what one read finds of an attempt
    is in the order of the ranks.
    """

    def __init__(self, run: Handle, rank: int | None = 0) -> None:
        self._run = run
        self._rank = rank
        self._followers: dict[int, Follower] = defaultdict(Follower)  # by rank
        self._attempt = 0

    def read(self, final: bool = False) -> str:
        """What is new since the last call, in whole lines; `final` takes a last line without its end too."""
        return "".join(self.parts(final))

    def parts(self, final: bool = False) -> Iterator[str]:
        """What is new since the last call as it comes: a long log takes many requests."""
        is_behind = True
        while is_behind:
            text, is_behind = self._ask(torn=False)
            yield text
        if final:
            text, _ = self._ask(torn=True)
            yield text

    def _ask(self, torn: bool) -> tuple[str, bool]:
        """What is new, as far as one request gives it, and whether there may be more."""
        files = {}
        since = {}
        for rank in self._ranks_to_read():
            file = f"logs/rank-{rank}.log"
            files[rank] = file
            since[file] = self._followers[rank].since
        run = self._run
        appended = run.site.read(run.run_id, since)
        parts = []
        is_behind = False
        for rank, file in files.items():
            chunks = appended[file]
            is_behind |= any(chunk.is_full for chunk in chunks)
            follower = self._followers[rank]
            for attempt, data in follower.take(chunks, torn):
                if data:
                    part = (attempt, rank, data)
                    parts.append(part)
        texts = []
        for part in sorted(parts):
            text = self._with_header(*part)
            texts.append(text)
        return "".join(texts), is_behind

    def _ranks_to_read(self) -> list[int]:
        if self._rank is None:
            return _ranks(self._run)
        return [self._rank]

    def _with_header(self, attempt: int, rank: int, data: bytes) -> str:
        """What was read as text that ends with a line; a header comes before the text of another attempt."""
        text = data.decode(errors="replace")
        if not text.endswith("\n"):
            text += "\n"
        header = f"=== attempt {attempt}, rank {rank} ===\n"
        if self._rank is None:
            header = f"=== attempt {attempt} ===\n"
            text = _marked(text, f"rank {rank} | ")
        if attempt != self._attempt:
            self._attempt = attempt
            return header + text
        return text


def _marked(text: str, mark: str) -> str:
    """A text with a mark in front of each line."""
    lines = text.split("\n")
    last = lines.pop()  # empty
    marked = []
    for line in lines:
        marked.append(f"{mark}{line}\n")
    return "".join(marked) + last


def logs(reference: str, rank: int | None = 0, cluster: str | None = None) -> str:
    """The whole log of a rank of a run, or of all ranks (None); before an attempt what its controllers said.

    Of a job of stages that of the newest one. Raises InputError for a run or a rank that is not there.
    """
    submitted = find(reference, cluster)
    run = at_stage(submitted)
    text = LogReader(run, rank).read(final=True)
    if text:
        return text
    ranks = _ranks(run)
    if ranks and rank not in (None, *ranks):
        allowed = ", ".join(map(str, ranks))
        raise InputError(f"--rank: found {rank}; allowed: {allowed}")
    return _printed_before(submitted)


def _printed_before(run: Handle) -> str:
    """What its cluster has of a run that made no attempt, part by part."""
    parts = []
    printed = run.cluster.logs(run.run_id)
    while printed.text:
        parts.append(printed.text)
        printed = run.cluster.logs(run.run_id, printed.offset)
    return "".join(parts)


def _ranks(run: Handle) -> list[int]:
    """The ranks of a run that have a log, in order."""
    ranks = []
    for file in run.site.files(run.run_id):
        match = _RANK.fullmatch(file)
        if match:
            ranks.append(int(match[1]))
    return sorted(ranks)
