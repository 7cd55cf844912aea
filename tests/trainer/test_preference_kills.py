"""Runs on preferences that are killed, before their first step and after it, go on as if nothing had been."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from finished_runs import curve, events, rows
from first_steps import FIRST, PISSA
from sampling import SEED, each_sampled

from runfolder.chain import attempts

STEPS, WORLD = 12, 2
OBJECTIVES = {name: FIRST[name][0] for name in ("sigmoid", "ipo", "hinge", "kto", "reward")}
OBJECTIVES |= {"simpo": {"kind": "simpo"}, "orpo": {"kind": "orpo", "weight": 0.3}}
TOLD = "attempts/{}/metrics.jsonl"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", each_sampled(list(OBJECTIVES)))
def test_kills_change_no_figure(
    name: str, preference_run: Any, launch: Any, workers: dict[int, Any], tmp_path: Path
) -> None:
    parts = {
        "method": PISSA,
        "train": {"steps": STEPS, "seed": 1000 + list(OBJECTIVES).index(name)},
        "sharding": {"zero": 2},
        "checkpoint": {"every": 3, "keep": 2},
    }
    whole = preference_run("whole", OBJECTIVES[name], **parts)
    launch(WORLD, whole)
    killed = preference_run("killed", OBJECTIVES[name], **parts)
    kind = type(workers[WORLD])
    rng = random.Random(f"{SEED} {name}")
    for number, lines in enumerate((0, rng.randrange(3, 7), 2), 1):  # before the first step, and behind two of them
        group = kind(WORLD, tmp_path / "cache", tmp_path / "killed.log")  # whose cache knows no reference
        kill_behind(group, killed, number, lines)
    launch(WORLD, killed)
    expected = dict(enumerate(curve(whole), 1))
    assert len(attempts(killed)) == 4 and not (killed / TOLD.format(1)).exists()
    last = 0
    for number in (2, 3, 4):
        told = {step: (row["loss"], row["grad_norm"]) for step, row in rows(killed, number).items()}
        assert told == {step: expected[step] for step in told}, number
        assert min(told) <= last + 1
        last = max(told)
    assert last == STEPS and min(rows(killed, 4)) > 1  # a checkpoint was gone on with
    if OBJECTIVES[name]["kind"] in ("dpo", "kto"):
        computed = [
            event["computed_examples"]
            for number in (2, 3, 4)
            for event in events(killed, number)
            if event["event"] == "reference"
        ]
        assert computed[0] > 0 and computed[1:] == [0, 0]


def kill_behind(group: Any, run: Path, number: int, lines: int) -> None:
    """Train, and kill the workers once their attempt has told of so many steps; of none: as soon as it is claimed."""
    training = threading.Thread(target=group.train, args=(run, 240))
    training.start()
    try:
        path = run / TOLD.format(number)
        while training.is_alive():
            if lines and path.exists() and path.read_text().count('"loss"') >= lines:
                break
            if not lines and path.parent.exists():
                break
            time.sleep(0.002)
    finally:
        group.stop()
        training.join()
    assert not (run / "result.json").exists()
