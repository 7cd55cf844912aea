"""Rollouts that are killed: the run goes on bit for bit, and the reward's function judges no answer twice.

The function itself kills the worker that asks it, at calls that the test chooses, at once or a while later; so kills
fall between a call and the record of its value, and with a delay anywhere else.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from finished_runs import curve, rows

from runfolder.chain import attempts, result

SEED = int(os.environ.get("CHAOS_SEED", "0"))
STEPS, SAMPLES = 6, 3
REWARD = '''
import json, os, subprocess
from pathlib import Path

HERE = Path(__file__).parent

def spread(prompt, completion, row):
    """What few answers of a random model have alike; at some calls, the end of the worker that asks."""
    calls = HERE / "calls.txt"
    number = str(len(calls.read_text().splitlines())) if calls.exists() else "0"
    if completion != row["completion"].strip():  # else it is the check before the first step
        with calls.open("a") as stream:
            print(repr((prompt, completion)), file=stream)
        kills = json.loads((HERE / "kills.json").read_text())
        if number in kills:
            worker = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
            kill = f"sleep {kills[number]}; kill -9 {worker}"
            shell = subprocess.Popen(["sh", "-c", kill], start_new_session=True)
            if kills[number] == 0:
                shell.wait()
    return sum(map(ord, completion)) % 11 / 11
'''


@pytest.fixture
def ends(new_run: Any, launch: Any, ending_base: Path, held_out: Path, tmp_path: Path) -> Any:
    """Train a run whose worker is killed at some calls, as often as it takes; gives it and its reward's calls."""

    def train(name: str, kills: dict[int, float], steps: int = STEPS, **options: Any) -> tuple[Path, list[str]]:
        folder = tmp_path / f"{name}-reward"
        folder.mkdir()
        (folder / "rewards.py").write_text(REWARD)
        (folder / "kills.json").write_text(json.dumps(kills))
        objective = {"kind": "grpo", "updates": 4, "samples": SAMPLES, "new_tokens": 7, "temperature": 1.5}
        run: Path = new_run(
            name,
            base=str(ending_base),
            objective={**objective, "reward": f"{folder}/rewards.py:spread", **options},
            data={"eval": str(held_out)},
            train={"steps": steps, "batch_tokens": 60, "lr": 1e-2},
            checkpoint={"every": 3, "keep": 9},
            evaluation={"before": False, "rows": 6, "max_new_tokens": 0},
        )
        deaths = 0
        while result(run) is None:
            try:
                launch(1, run)
            except AssertionError as died:
                deaths += 1
                assert deaths <= len(kills), died
        assert deaths >= len(kills) / 2  # some may come when it has ended
        if kills:
            time.sleep(max(kills.values()) + 1)  # for one that comes when it has ended: not to the next run
        return run, (folder / "calls.txt").read_text().splitlines()

    return train


def assert_same(whole: tuple[Path, list[str]], killed: tuple[Path, list[str]]) -> None:
    """The same adapter bit for bit, the same losses in all attempts, and each answer judged as often."""
    file = Path("output", "adapter_model.safetensors")
    assert (killed[0] / file).read_bytes() == (whole[0] / file).read_bytes()
    losses = {step: (row["loss"], row["grad_norm"]) for step, row in rows(whole[0], 1).items()}
    for attempt in attempts(killed[0]):
        if (attempt.folder / "metrics.jsonl").exists():
            for step, row in rows(killed[0], attempt.number).items():
                assert (row["loss"], row["grad_norm"]) == losses[step], f"step {step} of attempt {attempt.number}"
    assert Counter(killed[1]) == Counter(whole[1])


@pytest.fixture
def whole(ends: Any) -> tuple[Path, list[str]]:
    """A run that nobody kills."""
    found: tuple[Path, list[str]] = ends("whole", {})
    assert min(norm for _, norm in curve(found[0])) > 1e-3
    return found


def test_a_worker_that_is_killed_while_answers_are_judged_asks_for_none_twice(ends: Any, whole: Any) -> None:
    """In the first rollout of all, and in one that follows a window in which the newest checkpoint lies."""
    in_each = len(set(whole[1][:SAMPLES]))  # a step has some prompts
    assert in_each > 1
    assert_same(whole, ends("killed", {4: 0, 10: 0}))


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(5))
def test_kills_at_any_time_change_nothing(number: int, ends: Any) -> None:
    """In rollouts, between reward and record, within windows of several updates, in saves and evaluations."""
    rng = random.Random(SEED + number)
    options = {"updates": rng.choice([1, 2, 4]), "redraws": rng.choice([0, 2])}
    whole = ends("whole", {}, steps=24, **options)
    calls = rng.sample(range(len(whole[1])), 6)
    kills = {call: rng.choice([0, rng.uniform(0, 0.5), rng.uniform(0, 2)]) for call in calls}
    print(f"{options}, killed at {kills}", flush=True)
    assert_same(whole, ends("killed", kills, steps=24, **options))
