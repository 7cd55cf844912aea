"""Invariant 1: the gradient of step k is a pure function of (job, k), whatever the layout (fp32)."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import Curve, curve, difference

from methods.options import Full
from trainer.attempt import load_job
from trainer.base import load_tokenizer
from trainer.loop import plan_batches
from trainer.schedule import learning_rate
from trainer.tokens import tokenise

TOLERANCE = 1e-6
METHODS = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 4}}
RATES = {"full": 1e-3, "lora": 1e-2}
LAYOUTS = list(itertools.product(METHODS, (0, 1, 2, 3), (1, 3), (False, True)))  # method, ZeRO, micro-batch, packed


def reference(run_dir: Path, cache: Path) -> Curve:
    """The same job without DeepSpeed: PEFT, AdamW, one example at a time, mean over target tokens."""
    import peft
    from transformers import AutoModelForCausalLM

    job = load_job(run_dir)
    tokens = tokenise(job.data.train, load_tokenizer(job.base), job.data.seq_len, cache)
    batches = plan_batches(job, tokens)
    model = AutoModelForCausalLM.from_pretrained(job.base.model, dtype=torch.float32)
    torch.manual_seed(job.train.seed)
    if not isinstance(job.method, Full):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    points: Curve = []
    for k in range(batches.steps):
        total = 0.0
        for i in batches.examples(k):
            example = tokens.example(int(i))
            ids = torch.tensor(example.ids, dtype=torch.long)
            labels = ids.masked_fill(~torch.tensor(example.target), -100)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / batches.target_tokens(k)
            loss.backward()
            total += loss.item()
        # clip_grad_norm_ sums squares in fp32, which alone is off by 1e-6; so the norm is taken in fp64.
        norm = torch.cat([p.grad.flatten() for p in trained]).double().norm()  # type: ignore[union-attr]
        torch.nn.utils.clip_grads_with_norm_(trained, job.train.clip, norm)  # type: ignore[arg-type]
        optimizer.param_groups[0]["lr"] = learning_rate(job, k, batches.steps)
        optimizer.step()
        optimizer.zero_grad()
        points.append((total, norm.item()))
    return points


def sample() -> list[Any]:
    """Layouts for `make test`: each method, ZeRO stage, micro-batch and packing at least once."""
    rng = random.Random(0)
    chosen = [(m, z, rng.choice((1, 3)), rng.random() < 0.5) for m in METHODS for z in range(4)]
    return [
        pytest.param([2], chosen, id="sample"),
        pytest.param([1, 2, 4], LAYOUTS, id="all", marks=pytest.mark.matrix),
    ]


@pytest.mark.parametrize(("worlds", "layouts"), sample())
@pytest.mark.timeout(3600)
def test_curves_agree_over_layouts(worlds: list[int], layouts: Any, new_run: Any, launch: Any, cache: Path) -> None:
    expected = {
        name: reference(new_run(f"reference-{name}", method=METHODS[name], train={"lr": RATES[name]}), cache)
        for name in METHODS
    }
    worst: dict[str, float] = {}
    for world in worlds:
        runs = {
            (name, zero, micro, packed): new_run(
                f"{name}-w{world}-z{zero}-m{micro}-p{int(packed)}",
                method=METHODS[name],
                sharding={"zero": zero},
                train={"micro_batch": micro, "lr": RATES[name]},
                data={"packing": packed},
            )
            for name, zero, micro, packed in layouts
        }
        launch(world, *runs.values())
        worst |= {run.name: difference(curve(run), expected[key[0]]) for key, run in runs.items()}
    print(json.dumps(worst, indent=1))
    assert max(worst.values()) < TOLERANCE, {name: d for name, d in worst.items() if d >= TOLERANCE}


def test_gradient_checkpointing_changes_nothing(new_run: Any, launch: Any) -> None:
    def run(name: str, zero: int, checkpointing: bool) -> Path:
        train = {"gradient_checkpointing": checkpointing, "lr": RATES[name]}
        made: Path = new_run(f"{name}-{checkpointing}", method=METHODS[name], sharding={"zero": zero}, train=train)
        return made

    pairs = [(run(name, zero, True), run(name, zero, False)) for name, zero in (("full", 3), ("lora", 2))]
    launch(2, *(run for pair in pairs for run in pair))
    assert all(difference(curve(one), curve(other)) < TOLERANCE for one, other in pairs)
