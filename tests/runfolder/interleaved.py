"""One of several processes that do what they like to one run: `python interleaved.py RUNS SINK SEED`.

For each line on standard input, the name of a run, it does some operations in an order that chance chooses, and
answers with a line of JSON: each with what came of it, and when it began and ended. What it delivers goes to SINK,
which stands for MLflow.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from runfolder import chain
from runfolder.appended import read_lines
from runfolder.requests import cancel_requested, request_cancel

ANYBODY = ("claim", "claim", "close", "cancel", "reopen", "look", "look")
ATTEMPT = ("report", "report", "deliver")  # of those who hold one, more often than not


class Actor:
    """Holds the attempt that it has claimed, if any; never knows whether it is a ghost."""

    def __init__(self, run_dir: Path, sink: Path, rng: random.Random) -> None:
        self._run_dir, self._sink, self._rng = run_dir, sink, rng
        self._mine: chain.Attempt | None = None
        self._step = 0
        self.done: list[tuple[str, Any, float, float]] = []

    def act(self) -> None:
        """Do one operation."""
        works = self._mine is not None and self._rng.random() < 0.7
        operation = self._rng.choice(ATTEMPT if works else ANYBODY)
        began = time.time()
        try:
            came = getattr(self, f"_{operation}")()
        except chain.Fenced:
            came, self._mine = "fenced", None
        self.done.append((operation, came, began, time.time()))
        time.sleep(self._rng.random() * 0.005)

    def _claim(self) -> int | None:
        attempts = chain.attempts(self._run_dir)
        start = chain.Start(attempts[-1].number, 10) if attempts else None
        self._mine = chain.claim_next(self._run_dir, start) or self._mine
        return self._mine.number if self._mine else None

    def _look(self) -> None:
        """See all that is there, as whoever asks for the status: a client of NFS keeps that."""
        cancel_requested(self._run_dir)
        for slot in chain.slots(self._run_dir):
            read_lines(slot, "metrics.jsonl")
            slot.appended()

    def _report(self) -> tuple[int, int]:
        assert self._mine
        self._step += 1
        self._mine.append("metrics.jsonl", {"step": self._step, "time": time.time()})
        return self._mine.number, self._step

    def _deliver(self) -> list[int]:
        """Read, then look at the fence, then send: as delivery to MLflow does."""
        assert self._mine
        rows = [row["step"] for row in read_lines(self._mine, "metrics.jsonl")]
        time.sleep(self._rng.random() * 0.005)
        self._mine.check()
        with self._sink.open("a") as sink:
            sink.write("".join(f"{self._mine.number} {step}\n" for step in rows))
        return rows

    def _close(self) -> bool:
        ended = {"state": "cancelled" if cancel_requested(self._run_dir) else "failed", "by": self._rng.random()}
        if self._mine and self._rng.random() < 0.7:
            if "output" not in {path.name for path in self._mine.folder.iterdir()}:
                (self._mine.folder / "output").mkdir()
            return self._mine.close(ended)
        return chain.close(self._run_dir, ended)

    def _cancel(self) -> None:
        request_cancel(self._run_dir)

    def _reopen(self) -> bool:
        return chain.reopen(self._run_dir)


def main(runs: Path, sink: Path, rng: random.Random) -> None:
    """Act on each run that is named."""
    for line in sys.stdin:
        actor = Actor(runs / line.strip(), sink / line.strip(), rng)
        for _ in range(rng.randrange(4, 12)):
            actor.act()
        print(json.dumps(actor.done), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3])))
