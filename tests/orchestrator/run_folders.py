"""Run folders as the trainer would leave them, written through the protocol's own functions."""

from pathlib import Path
from typing import Any

from runfolder import chain
from runfolder.chain import Attempt, Start
from runfolder.digests import digests
from runfolder.job import Job
from runfolder.record import create_run_folder

T0 = 1_700_000_000.0


def make_run(root: Path, run_id: str, uri: str | None, **job: Any) -> Path:
    """A run folder with its frozen job."""
    spec = {
        "name": "fake",
        "base": "tiny",
        "method": {"kind": "lora", "rank": 4},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "train": {"steps": 100, "precision": "fp32"},
        "tracking": {"uri": uri, "experiment": "fakes"},
        **job,
    }
    root.mkdir(parents=True, exist_ok=True)
    made = Job.model_validate(spec)
    there = Path(made.data.train).is_absolute()  # a run that is really trained
    invented = {"data.train": "1" * 64, "data.eval": None, "base": "2" * 64}
    record = {
        "job": made.dump(),
        "run_id": run_id,
        "cluster": "local",
        "submitted": T0,
        "versions": {"fleetune": "0.1.0", "python": "3.11.7"},
        "git": {"commit": "c0ffee", "dirty": True},
        "digests": digests(made, Path(made.base.model)) if there else invented,
    }
    assert create_run_folder(root / run_id, record) is None
    return root / run_id


def claim(run_dir: Path, start: int | None = None) -> Attempt:
    """The next attempt, from a checkpoint of its predecessor at step `start`."""
    begin = Start(chain.last_attempt(run_dir).number, start) if start is not None else None
    attempt = chain.claim_next(run_dir, begin)
    assert attempt
    return attempt


def loss_at(step: int) -> float:
    return 4.0 / (1.0 + 0.1 * step)


def step_row(attempt: Attempt, step: int, **changed: float) -> None:
    """The row of one optimizer step, with a time that no other attempt would write."""
    row = {"step": step, "time": T0 + 1000 * attempt.number + step, "loss": loss_at(step), "lr": 1e-4}
    attempt.append("metrics.jsonl", {**row, "mfu": None, "peak_memory_bytes": 1 << 30, **changed})


def steps(attempt: Attempt, first: int, final: int) -> None:
    """The rows of several steps."""
    for step in range(first, final + 1):
        step_row(attempt, step)


def eval_row(attempt: Attempt, step: int, **figures: float) -> None:
    """The row of one evaluation."""
    attempt.append("metrics.jsonl", {"step": step, "time": T0 + 1000 * attempt.number + step + 0.5, **figures})


def plan(attempt: Attempt, trained: int = 1234) -> None:
    """What the trainer announces."""
    attempt.event("plan", steps=100, parameters=99999, trained=trained)


def expected(*parts: tuple[int, int, int]) -> list[tuple[int, float, int]]:
    """The loss series (step, value, milliseconds) where each part (attempt, first, final) reported its steps."""
    return [
        (step, loss_at(step), int((T0 + 1000 * number + step) * 1000))
        for number, first, final in parts
        for step in range(first, final + 1)
    ]
