"""GRPO learns: on the tiny base a task that it has not seen, from a reward alone, in a run of seconds."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finished_runs import rows

ROOT = Path(__file__).parent.parent.parent
STEPS, LAST = 18, 4
REWARD = """
def listed(prompt, completion, row):
    \"\"\"1 where all that is written is words of the list that the prompt has behind its colon.\"\"\"
    listed = prompt.partition(":")[2].replace("->", " ").split()
    words = completion.split()
    return float(bool(words) and all(word in listed for word in words))
"""


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose prompts are lists of words."""
    folder = tmp_path_factory.mktemp("lists")
    generate = [sys.executable, str(ROOT / "examples" / "tiny" / "generate.py"), "rows", "only", str(folder)]
    subprocess.run([*generate, "--train", "400", "--eval", "10"], check=True, stdout=subprocess.DEVNULL)
    return folder / "only-train.jsonl"


@pytest.fixture
def rewards(new_run: Any, launch: Any, lists: Path, tmp_path: Path) -> Any:
    """The mean reward of each step of a run with a seed."""
    reward = tmp_path / "rewards.py"
    reward.write_text(REWARD)

    def learn(seed: int) -> list[float]:
        run = new_run(
            f"seed-{seed}",
            base=str(ROOT / "examples" / "tiny"),
            method={"kind": "lora", "rank": 8},
            objective={"kind": "grpo", "reward": f"{reward}:listed", "samples": 8, "new_tokens": 10},
            data={"train": str(lists), "packing": True},
            train={"steps": STEPS, "batch_tokens": 240, "lr": 2e-3, "schedule": "constant", "seed": seed},
        )
        launch(1, run)
        return [row["reward"] for row in rows(run, 1).values()]

    return learn


def has_learned(rewards: list[float]) -> bool:
    """Whether answers were right in less than a fifth at first, and in more than four fifths at the end."""
    return max(rewards[:2]) < 0.2 and sum(rewards[-LAST:]) / LAST > 0.8


def test_a_policy_learns_from_its_reward_alone(rewards: Any) -> None:
    found = rewards(0)
    assert has_learned(found), found


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_with_every_seed(rewards: Any, seed: int) -> None:
    found = rewards(seed)
    assert has_learned(found), found
