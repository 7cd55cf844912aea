"""What a reward's function has given in a step, kept as it comes: attempts/N/rewards/step-S.rank-R.jsonl.

The function's own process writes a line when a call ends (reward_child.py), so that one under way when its worker is
killed counts too. A later attempt reads them all, waits for what is under way, and asks the function nothing that it
has answered. Once the step's rollout is recorded, nobody needs them.
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from runfolder.chain import Attempt, attempts

HELD_OUT = 0  # the step that answers to held-out rows are written for
_FOLDER = "rewards"
_LOCK_LOOK_S = 0.1  # seconds between two looks at a call that is under way


class RewardJournal:
    """What is known of the answers of a step, and the file in which a rank keeps what comes."""

    def __init__(
        self,
        attempt: Attempt,
        step: int,
        rank: int,
    ) -> None:
        folder = attempt.folder / _FOLDER
        folder.mkdir(exist_ok=True)
        self.path = folder / f"step-{step}.rank-{rank}.jsonl"
        self._attempt = attempt
        self._step = step
        self._is_settled = False
        self._known: dict[str, float] = {}
        self._read()

    def value(self, key: str) -> float | None:
        """What the function has given the answer of a key; None where it was not asked."""
        return self._known.get(key)

    def settle(self, seconds: float) -> None:
        """Wait for calls of earlier attempts that are under way, at most so long, and know what they have given."""
        if self._is_settled:
            return
        self._is_settled = True
        earlier = []
        for path in _journals(self._attempt, self._step):
            if not path.is_relative_to(self._attempt.folder):
                earlier.append(path)
        deadline = time.monotonic() + seconds
        for path in earlier:
            while _is_locked(path) and time.monotonic() < deadline:
                time.sleep(_LOCK_LOOK_S)
        if earlier:
            self._read()

    def _read(self) -> None:
        """Know all that is kept of the step."""
        for path in _journals(self._attempt, self._step):
            for key, value in _kept_values(path):
                self._known[key] = value


def answer_key(
    place: int,
    number: int,
    prompt: Sequence[int],
    answer: Sequence[int],
) -> str:
    """What tells an answer of a step from all others: the place of its prompt, its number, and the ids of both."""
    prompt_ids = list(prompt)
    answer_ids = list(answer)
    facts = (place, number, prompt_ids, answer_ids)
    text = repr(facts)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()


def forget_rewards(attempt: Attempt, step: int) -> None:
    """Remove what was kept of a step whose rollout is recorded."""
    for path in _journals(attempt, step):
        path.unlink(missing_ok=True)


def _journals(attempt: Attempt, step: int) -> Iterator[Path]:
    """The files of a step, of all ranks, in this attempt and those before it."""
    of_any_rank = f"step-{step}.rank-*.jsonl"
    for other in attempts(attempt.run_dir):
        if other.number > attempt.number:
            continue
        folder = other.folder / _FOLDER
        found = folder.glob(of_any_rank)
        yield from sorted(found)


def _is_locked(path: Path) -> bool:
    """Whether a call is under way that keeps its value in a file."""
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def _kept_values(path: Path) -> Iterator[tuple[str, float]]:
    """The keys and values in the whole lines of a file; a process that was killed leaves a torn one."""
    content = path.read_bytes()
    whole, _, _ = content.rpartition(b"\n")
    for line in whole.splitlines():
        kept = json.loads(line)
        key: str = kept["key"]
        value: float = kept["value"]
        yield key, value
