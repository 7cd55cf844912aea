"""The same losses and gradient norms of groups as TRL's, where it is installed (no dependency: trl==1.16.0).

TRL learns from what our run has written. All prompts are in each step, so that the order of the data does not matter.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_hand import base
from finished_runs import Curve, curve, rows
from transformers import AutoTokenizer
from trl_recipe import plain_steps, trained_curve

from methods.base import Setup
from methods.registry import create
from runfolder.chain import Attempt
from runfolder.record import load_job
from trainer.data.encode import Reading
from trainer.data.tokens import tokenise
from trainer.objectives.base import Arrays
from trainer.rollouts import recorded_rollout

pytestmark = pytest.mark.matrix
ROWS = [
    {"prompt": "13 + 8 =", "completion": " 21"},
    {"prompt": "50 + 60 + 2 =", "completion": " 112"},
    {"prompt": "1 + 1 =", "completion": " 2"},
]
RATE, STEPS, SAMPLES, NEW = 1e-3, 4, 4, 6
REWARD = """
def digits(prompt, completion, row):
    found = sum(character.isdigit() for character in completion)
    return found / (1 + len(completion))
"""
SHARED = {"samples": SAMPLES, "new_tokens": NEW, "temperature": 1.5, "importance_cap": None}
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"kind": "grpo"}, {"loss_type": "grpo"}),
    "penalty": ({"kind": "grpo", "beta": 0.5, "average": "tokens"}, {"loss_type": "dapo", "beta": 0.5}),
    "dapo": ({"kind": "grpo", "average": "tokens", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": (
        {"kind": "grpo", "average": "length", "scale": False},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "grpo_twice": (
        {"kind": "grpo", "updates": 2, "clip_low": 1e-3, "clip_high": 2e-3},
        {"loss_type": "grpo", "num_iterations": 2, "epsilon": 1e-3, "epsilon_high": 2e-3},
    ),
    "gspo_twice": (
        {"kind": "grpo", "ratio": "answer", "updates": 2, "clip_low": 2e-3, "clip_high": 2e-3},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "num_iterations": 2,
            "epsilon": 2e-3,
            "epsilon_high": 2e-3,
        },
    ),
    "rloo": ({"kind": "rloo"}, {}),
    "rloo_twice": (
        {"kind": "rloo", "updates": 2, "clip_low": 0.02, "clip_high": 0.02},
        {"num_iterations": 2, "epsilon": 0.02, "epsilon_high": 0.02},
    ),
}


class Replayed:
    """What our run wrote, in the place of TRL's own generation and of its reward."""

    def __init__(self, rollouts: list[Arrays]) -> None:
        self._rollouts = iter(rollouts)
        self._current: Arrays = {}

    def next(self) -> list[list[int]]:
        """Token ids of the answers of the next rollout."""
        self._current = next(self._rollouts)
        return [ids[prompt:].tolist() for ids, prompt in self._documents()]

    def prompts(self) -> list[list[int]]:
        """Token ids of its prompts."""
        return [ids[:prompt].tolist() for ids, prompt in self._documents()]

    def rewards(self, **_: Any) -> list[float]:
        """What its answers are worth."""
        return self._current["rewards"].tolist()

    def _documents(self) -> Iterator[tuple[Any, int]]:
        whole = np.split(self._current["ids"], self._current["ends"][:-1])
        return zip(whole, self._current["prompts"].tolist(), strict=True)


def trained_by_trl(name: str, run: Path, folder: Path, rollouts: list[Arrays]) -> Curve:
    """Losses and gradient norms of TRL's trainer, on the same answers."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    replayed = Replayed(rollouts)
    config, trainer_kind = (RLOOConfig, RLOOTrainer) if name.startswith("rloo") else (GRPOConfig, GRPOTrainer)
    args = config(
        **plain_steps(folder, RATE, STEPS, len(ROWS) * SAMPLES),
        num_generations=SAMPLES,
        max_completion_length=NEW,
        temperature=1.5,
        shuffle_dataset=False,
        **{"beta": 0.0} | OBJECTIVES[name][1],
    )

    class OnOurs(trainer_kind):  # type: ignore[misc, valid-type]
        def _generate(self, prompts: Any) -> Any:
            found = super()._generate(prompts)
            return (replayed.prompts(), *found[1:])

        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            completions = replayed.next()
            return completions if name.startswith("rloo") else (completions, None)

    job = load_job(run)
    tokenizer = AutoTokenizer.from_pretrained(job.base.model)
    trainer = OnOurs(
        model=create(job.method, Setup(STEPS)).attach(base(run)),
        args=args,
        reward_funcs=replayed.rewards,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
    )
    return trained_curve(trainer)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_norms_of_groups_are_those_of_trl(
    name: str, new_run: Any, launch: Any, ending_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    reward = tmp_path / "rewards.py"
    reward.write_text(REWARD)
    options, _ = OBJECTIVES[name]
    train = {"steps": STEPS, "lr": RATE, "schedule": "constant", "warmup": 0, "clip": None}
    parts: dict[str, Any] = {
        "base": str(ending_base),
        "objective": SHARED | {"reward": f"{reward}:digits"} | options,
        "data": {"train": str(data)},
    }
    job = load_job(new_run("probe", **parts, train=train))
    tokens = tokenise(str(data), AutoTokenizer.from_pretrained(job.base.model), Reading.of(job), tmp_path / "cache")
    run = new_run("run", **parts, train=train | {"batch_tokens": int(tokens.lengths.sum())})
    launch(1, run)
    recorded = [recorded_rollout(Attempt(run, 1), step) for step in range(1, STEPS + 1)]
    rollouts = [rollout for rollout in recorded if rollout is not None]
    assert all(len(rollout["rewards"]) == len(ROWS) * SAMPLES for rollout in rollouts)
    lengths = [np.diff(rollout["ends"], prepend=0) - rollout["prompts"] for rollout in rollouts]
    assert all(len(set(of_answers.tolist())) > 2 for of_answers in lengths)
    theirs = trained_by_trl(name, run, tmp_path / "trl", rollouts)
    assert min(norm for _, norm in theirs) > 1e-3  # a loss alone says nothing: it is about zero whatever is learned
    for ours, trl in zip(curve(run), theirs, strict=True):
        assert ours[0] == pytest.approx(trl[0], abs=1e-5)
        assert ours[1] == pytest.approx(trl[1], rel=1e-5)
    if "twice" in name:
        clipped = [row["tokens_clipped"] for row in rows(run, 1).values()]
        assert max(clipped) > 0.05, clipped
