"""What a reward's function has given in a step, kept as it comes: attempts/N/rewards/step-S.rank-R.jsonl.

The function's own process writes a line when a call ends (reward_child.py), so that one under way when its worker is
killed counts too. A later attempt reads them all, and asks the function nothing that it has answered. Once the step's
rollout is recorded, nobody needs them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from runfolder.chain import Attempt, attempts

HELD_OUT = 0  # the step that answers to held-out rows are written for
_FOLDER = "rewards"


class RewardJournal:
    """What is known of the answers of a step, and the file in which a rank keeps what comes."""

    def __init__(self, attempt: Attempt, step: int, rank: int) -> None:
        folder = attempt.folder / _FOLDER
        folder.mkdir(exist_ok=True)
        self.path = folder / f"step-{step}.rank-{rank}.jsonl"
        self._known: dict[str, float] = {}
        for path in _journals(attempt, step):
            for key, value in _values(path):
                self._known[key] = value

    def value(self, key: str) -> float | None:
        """What the function has given the answer of a key; None where it was not asked."""
        return self._known.get(key)


def answer_key(place: int, number: int, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """What tells an answer of a step from all others: the place of its prompt, its number, and the ids of both."""
    facts = (place, number, list(prompt), list(answer))
    digest = hashlib.sha256(repr(facts).encode())
    return digest.hexdigest()[:32]


def forget_rewards(attempt: Attempt, step: int) -> None:
    """Remove what was kept of a step whose rollout is recorded."""
    for path in _journals(attempt, step):
        path.unlink(missing_ok=True)


def _journals(attempt: Attempt, step: int) -> Iterator[Path]:
    """The files of a step, of all ranks, in this attempt and those before it."""
    for other in attempts(attempt.run_dir):
        if other.number <= attempt.number:
            folder = other.folder / _FOLDER
            yield from sorted(folder.glob(f"step-{step}.rank-*.jsonl"))


def _values(path: Path) -> Iterator[tuple[str, float]]:
    """The keys and values in the whole lines of a file; a process that was killed leaves a torn one."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for line in whole.splitlines():
        kept = json.loads(line)
        yield kept["key"], float(kept["value"])
