"""The same losses and gradient norms as TRL's, where it is installed (it is no dependency: pip install trl==1.16.0).

All pairs are in each step, so that the order of the data does not matter; the reference of TRL's DPO is precomputed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import Curve, curve
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl_recipe import plain_steps, trained_curve

from runfolder.record import load_job
from trainer.data.encode import Reading
from trainer.data.tokens import tokenise

pytestmark = pytest.mark.matrix
ROWS = [
    {"prompt": "13 + 8 =", "chosen": " 21", "rejected": " 12345"},
    {"prompt": "50 + 60 + 2 =", "chosen": " 112", "rejected": " 2"},
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
    {"prompt": "7 + 7 + 7 + 7 =", "chosen": " 28", "rejected": " 77777777"},
]
RATE, STEPS = 1e-3, 3
OBJECTIVES = {
    "sigmoid": {"kind": "dpo"},
    "ipo": {"kind": "dpo", "loss": "ipo"},
    "hinge": {"kind": "dpo", "loss": "hinge"},
    "simpo": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
    "reward": {"kind": "reward", "centring": 0.05},
}


def trained_by_trl(name: str, base: Path, folder: Path) -> Curve:
    """Losses and gradient norms of TRL's trainer."""
    from datasets import Dataset

    options = plain_steps(folder, RATE, STEPS, len(ROWS))
    kind: Any
    if name == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        args = CPOConfig(**options, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0)
        kind = CPOTrainer
    elif name == "reward":
        from trl import RewardConfig, RewardTrainer

        args = RewardConfig(**options, center_rewards_coefficient=0.05)
        kind = RewardTrainer
    else:
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(**options, loss_type=name, beta=0.1, precompute_ref_log_probs=True)
        kind = DPOTrainer
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if name == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1)
        torch.nn.init.zeros_(model.score.weight)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = kind(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    return trained_curve(trainer)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_norms_are_those_of_trl(
    name: str, new_run: Any, launch: Any, tiny_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train = {"steps": STEPS, "lr": RATE, "schedule": "constant", "warmup": 0, "clip": None}
    parts = {"objective": OBJECTIVES[name], "method": {"kind": "full"}, "data": {"train": str(data)}}
    reading = Reading.of(load_job(new_run("probe", **parts, train=train)))
    tokens = tokenise(str(data), AutoTokenizer.from_pretrained(tiny_base), reading, tmp_path / "cache")
    run = new_run("run", **parts, train=train | {"batch_tokens": int(tokens.lengths.sum())})
    launch(1, run)
    for ours, theirs in zip(curve(run), trained_by_trl(name, tiny_base, tmp_path / "trl"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
