"""What tests read from finished runs, and how they interrupt one afterwards."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from runfolder.record import load_job
from trainer.checkpoint.reading import CheckpointReader
from trainer.data.encode import Reading
from trainer.data.tokenizer import load_tokenizer
from trainer.data.tokens import tokenise
from trainer.export import results

Curve = list[tuple[float, float]]  # loss, and gradient norm before clipping


def rows(run_dir: Path, attempt: int) -> dict[int, dict[str, float]]:
    """What an attempt reported of each step."""
    lines = (run_dir / "attempts" / str(attempt) / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}


def events(run_dir: Path, attempt: int = 1) -> list[dict[str, Any]]:
    """What happened in an attempt."""
    return [
        json.loads(line) for line in (run_dir / "attempts" / str(attempt) / "events.jsonl").read_text().splitlines()
    ]


def curve(run_dir: Path, attempt: int = 1) -> Curve:
    """Loss and gradient norm of each step of an attempt."""
    return [(row["loss"], row["grad_norm"]) for row in rows(run_dir, attempt).values()]


def difference(a: Curve, b: Curve) -> float:
    """The largest relative difference between two curves."""
    assert len(a) == len(b) > 0
    found = [abs(x - y) / abs(y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    assert all(map(math.isfinite, found))  # `max` may pass over what is not a number
    return max(found)


def saved(run_dir: Path, step: int) -> CheckpointReader:
    """A run's checkpoint of a step, of the last attempt that has one."""
    folders = sorted(run_dir.glob(f"attempts/*/checkpoints/step-{step}"))
    return CheckpointReader(folders[-1])


def interrupted(whole: Path, name: str, step: int, **parts: Any) -> Path:
    """A copy of a run that looks as if it had died after the checkpoint of a step, with other parts of the job."""
    copy = whole.with_name(name)
    shutil.copytree(whole, copy)
    for gone in ("output", "attempts/2"):
        shutil.rmtree(copy / gone)
    (copy / "result.json").unlink()
    for folder in (copy / "attempts" / "1" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    record = yaml.safe_load((copy / "job.yaml").read_text())
    record["job"] |= parts
    (copy / "job.yaml").write_text(yaml.safe_dump(record))
    return copy


def saved_loss(model: nn.Module, run_dir: Path, cache: Path) -> float:
    """The loss per target token of a loaded output over the job's evaluation rows, one example at a time."""
    job = load_job(run_dir)
    assert job.data.eval
    tokens = tokenise(job.data.eval, load_tokenizer(job.base), replace(Reading.of(job), virtual=0), cache)
    total = 0.0
    for i in range(len(tokens)):
        example = tokens.document(i)
        ids = torch.tensor(example.ids, dtype=torch.long)
        labels = ids.masked_fill(~torch.tensor(example.target), -100)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, -len(ids) : -1]  # virtual tokens may stand in front
        total += nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
    return total / float(tokens.targets.sum())


def loss_gap(model: nn.Module, run_dir: Path, cache: Path) -> float:
    """The relative difference between a loaded output's loss and the one that the trainer reported at the end."""
    return abs(saved_loss(model, run_dir, cache) / results(run_dir)["eval_loss"] - 1)
