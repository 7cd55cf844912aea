"""A sweep whose driver and runs are killed again and again ends as if nobody had touched it.

CHAOS_SEED=n chooses other kills. The undisturbed one is driven in a home of its own, and trained by plain processes.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import only_queued
from mlflow_runs import runs_of, series
from sweep_killer import SweepKiller, SweepProcess
from training_runs import train_job

from clusters.local import Local
from orchestrator.sweeps.driver import SweepDriver
from orchestrator.sweeps.result import conclude
from orchestrator.tracking.history import history
from orchestrator.tracking.store import PARENT_TAG
from runfolder.appended import read_lines
from runfolder.chain import Attempt, attempts, last_attempt, result

SEED = int(os.environ.get("CHAOS_SEED", "0"))
REST_S = 7200.0  # for what is left after the last kill, on a busy machine too
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 8e-3, 1e-2, 1.5e-2, 2e-2, 3e-2, 4e-2, 5e-2]
METHODS = [{"kind": "lora", "rank": 2}, {"kind": "ia3"}, {"kind": "dora", "rank": 2}]
STEPS, RUNG = 30, 10
REPORTED = ("loss", "grad_norm", "eval_loss", "eval_cooled_loss", "eval_test_loss")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """Another home, whose local cluster starts nothing."""
    folder = tmp_path / "elsewhere"
    with only_queued(folder):
        yield folder


def write_sweep(folder: Path, methods: int, rates: int, **changes: Any) -> Path:
    """A sweep over the highest rates of some methods, which are judged at one rung."""
    sweep = {
        "job": "job.yaml",
        "methods": METHODS[:methods],
        "axes": {"train.lr": RATES[-rates:]},
        "rungs": [RUNG / STEPS],
        "budget": 100_000,
        "widen": False,
        "parallel": 3,
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def undisturbed(path: Path, home: Path, launch: Callable[..., None]) -> dict[str, Any]:
    """Drive a sweep to its end in a home where nobody is killed; gives its table."""
    driver = SweepDriver.of(path, None)
    while True:
        decision, found = driver.tick()
        if decision.done:
            break
        for move in decision.moves:
            run_dir = home / "runs" / driver.run_id(move.trial)
            launch(1, run_dir)
            if result(run_dir) is None:  # as a controller does it
                last_attempt(run_dir).close({"state": "cancelled", "reason": "paused"})
    return conclude(driver, found, lambda _cluster, _runs: None).comparison.to_json()


# Of two trials one is promoted; of 48 six are run in full, with three seeds each.
FEW = {"name": "few", "methods": 1, "rates": 2, "rule": "asha", "keep": 0.5}
MANY = {"name": "many", "methods": 3, "rates": 16, "rule": "race", "seeds": [0, 1, 2]}


@pytest.mark.parametrize(
    ("settings", "trials", "kills"),
    [
        pytest.param(FEW, 2, 3, id="few", marks=pytest.mark.timeout(900)),
        pytest.param(MANY, 60, 200, id="many", marks=pytest.mark.chaos),
    ],
)
def test_kills_change_nothing_in_a_sweep(
    settings: dict[str, Any],
    trials: int,
    kills: int,
    cluster: Local,
    elsewhere: Path,
    tmp_path: Path,
    tiny_base: Path,
    sums: Path,
    held_out: Path,
    launch: Callable[..., None],
) -> None:
    job: dict[str, Any] = {
        "data": {"train": str(sums), "eval": str(held_out), "seq_len": 64},
        "train": {"steps": STEPS, "batch_tokens": 1024, "micro_batch": 2},
        "evaluation": {"max_new_tokens": 0, "before": False},
        "checkpoint": {"every": 2},
    }
    train_job(tmp_path, tiny_base, sums, **job)
    path = write_sweep(tmp_path, **settings)
    sweep = SweepProcess(path, tmp_path / "sweep.log")
    try:
        killer = SweepKiller(cluster, sweep, random.Random(SEED))
        for number in range(1, kills + 1):
            print(f"kill {number}/{kills}: {killer.strike()}", flush=True)
        table = sweep.table(REST_S)
    finally:
        sweep.end()
    runs = runs_of_sweep(cluster.home, settings["name"])
    assert_tracked_once(runs)
    cluster.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(elsewhere))
        expected = undisturbed(path, elsewhere, launch)
    assert len(runs) == trials
    assert_same_runs(runs, runs_of_sweep(elsewhere, settings["name"]))
    for name, run_dir in runs.items():
        assert_computed_once(run_dir, killer.strikes[name])
    assert without_times(table) == without_times(expected)


def runs_of_sweep(home: Path, name: str) -> dict[str, Path]:
    """The folders of the trials of a sweep, by run id."""
    return {run_dir.name: run_dir for run_dir in sorted((home / "runs").glob(f"{name}-*"))}


def assert_same_runs(runs: dict[str, Path], others: dict[str, Path]) -> None:
    """No run is missing, and none too many; and each has reported the same, bit for bit."""
    assert list(runs) == list(others)
    for name, run_dir in runs.items():
        other = others[name]
        assert reported(run_dir) == reported(other), name
        ended, other_end = result(run_dir), result(other)
        assert ended and other_end and ended["state"] == other_end["state"]
        if ended["state"] == "succeeded":
            file = Path("output", "adapter_model.safetensors")
            assert (run_dir / file).read_bytes() == (other / file).read_bytes()


def reported(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """What a run reported, as its readers see it."""
    rows = []
    for row in history(run_dir):
        figures = {key: row[key] for key in REPORTED if key in row}
        rows.append((row["step"], figures))
    return rows


def assert_computed_once(run_dir: Path, strikes: int) -> None:
    """A run was begun again only where it was struck or had paused, and then where it had paused or saved."""
    made = attempts(run_dir)
    paused = [attempt for attempt in made if (attempt.verdict or {}).get("kind") == "paused"]
    assert len(paused) <= 1 and len(made) <= 2 + strikes, [attempt.verdict for attempt in made]
    for attempt in paused:
        steps = {row["step"] for later in made if later.number > attempt.number for row in rows_of(later)}
        assert not steps & set(range(RUNG + 1)), "steps below a rung were computed twice"
    losses = {step: figures["loss"] for step, figures in reported(run_dir) if "loss" in figures}
    for attempt in made:
        for row in rows_of(attempt):
            assert row["loss"] == losses[row["step"]], f"step {row['step']} of attempt {attempt.number}"


def rows_of(attempt: Attempt) -> list[dict[str, Any]]:
    """The steps that an attempt reported."""
    return [row for row in read_lines(attempt, "metrics.jsonl") if "loss" in row]


def assert_tracked_once(runs: dict[str, Path]) -> None:
    """MLflow has one run for each, with each step once, and all below one parent."""
    parents = set()
    for run_dir in runs.values():
        (tracked,) = runs_of(None, run_dir)
        parents.add(tracked.data.tags[PARENT_TAG])
        steps = [step for step, _, _ in series(None, run_dir)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) in (RUNG, STEPS)
    assert len(parents) == 1


def without_times(table: dict[str, Any]) -> dict[str, Any]:
    """The final table without what was measured in seconds or bytes (which the verdict may name, too)."""
    rows = []
    for row in table["rows"]:
        figures = {key: value for key, value in row["figures"].items() if key.endswith("loss") or key == "trained"}
        kept = {key: row[key] for key in ("label", "state", "n", "seeds", "differences")}
        rows.append({**kept, "run_ids": sorted(row["run_ids"]), "figures": figures})
    ranked = {key: table[key] for key in ("columns", "barrier", "rankings", "undelivered")}
    return {**ranked, "constant": table["constant"], "rows": sorted(rows, key=lambda row: str(row["label"]))}
