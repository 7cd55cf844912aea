"""The log of one worker, joined over the attempts of a run, as it grows."""

from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.backends import open_cluster
from orchestrator.errors import InputError
from orchestrator.runs import find, read_record
from runfolder.appended import sealed_size
from runfolder.chain import Attempt, attempts


@dataclass
class LogReader:
    """Reads what rank `rank` wrote, attempt after attempt, with a header line for each."""

    run_dir: Path
    rank: int = 0
    _offsets: dict[int, int] = field(default_factory=dict)

    def read(self, final: bool = False) -> str:
        """What is new since the last call, in whole lines; `final` takes a last line without its end too."""
        claimed = attempts(self.run_dir)
        return "".join(self._tail(attempt, final or attempt is not claimed[-1]) for attempt in claimed)

    def _tail(self, attempt: Attempt, final: bool) -> str:
        name = f"logs/rank-{self.rank}.log"
        path = attempt.folder / name
        if not path.exists():
            return ""
        header = "" if attempt.number in self._offsets else f"=== attempt {attempt.number}, rank {self.rank} ===\n"
        offset = self._offsets.setdefault(attempt.number, 0)
        seal = sealed_size(self.run_dir, attempt, name)
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(-1 if seal is None else max(seal - offset, 0))
        taken = data if final else data[: data.rfind(b"\n") + 1]
        self._offsets[attempt.number] = offset + len(taken)
        end = "\n" if final and taken and not taken.endswith(b"\n") else ""
        return header + taken.decode(errors="replace") + end


def logs(reference: str, rank: int = 0) -> str:
    """The whole log of a rank of a run, or what its controllers said before an attempt began.

    Raises InputError for a run or a rank that is not there.
    """
    run_dir = find(reference)
    if text := LogReader(run_dir, rank).read(final=True):
        return text
    found = {path.stem.removeprefix("rank-") for a in attempts(run_dir) for path in a.folder.glob("logs/rank-*.log")}
    if found and str(rank) not in found:
        raise InputError(f"--rank: found {rank}; allowed: {', '.join(sorted(found, key=int))}")
    return open_cluster(read_record(run_dir)["cluster"]).logs(run_dir.name).text
