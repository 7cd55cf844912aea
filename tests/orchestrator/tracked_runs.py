"""Runs as `compare` reads them from MLflow, made up."""

import math
from dataclasses import replace

from orchestrator.comparison.compare import TrackedRun

PARAMS = {
    "base.model": "examples/tiny",
    "method.kind": "lora",
    "method.rank": "16",
    "train.lr": "0.0001",
    "train.steps": "200",
    "train.seed": "0",
    "data.train": "data/train.jsonl",
    "data.train_digest": "5e" * 32,
    "sharding.zero": "1",
}


def tracked(name: str, quality: float, state: str = "succeeded", evals: bool = True, **changed: str) -> TrackedRun:
    """A run with curves that end the better the higher its quality (0 to 1)."""
    params = {**PARAMS, "name": name, **{key.replace("__", "."): value for key, value in changed.items()}}
    seed = int(params["train.seed"])
    wobble = [0.06 * math.sin(step * (1.7 + seed) + 9 * quality) for step in range(1, 201)]
    loss = tuple((step, 4.2 * math.exp(-step * quality / 60) + 0.4 + w) for step, w in enumerate(wobble, 1))
    curves = {"loss": loss}
    figures = {"loss": loss[-1][1], "best_loss": min(value for _, value in loss), "trained": 1e6 * (1 + quality)}
    if evals:
        curves["eval_loss"] = tuple((step, value + 0.15) for step, value in loss[::20])
        curves["eval_exact_match"] = tuple((step, quality * step / 200) for step, _ in loss[::20])
        figures |= {"eval_loss": curves["eval_loss"][-1][1], "eval_exact_match": quality - 0.01 * seed}
    figures |= {
        "peak_memory_bytes": (1 + 3 * quality**2) * 2**30,
        "train_s": 90 / quality,
        "tokens_per_second": 8123.0,
    }
    tags = {"mlflow.user": "ada", "mlflow.source.git.commit": "c0ffee", "fleetune.env.python": "3.11.7"}
    return TrackedRun(f"{name}-{seed:010d}", f"{abs(hash((name, seed))):032x}", state, params, tags, curves, figures)


def preferring(name: str, accuracy: float, kl: bool = False, **changed: str) -> TrackedRun:
    """A run on preferences that comes to an accuracy; where it has a KL, that ends as no number."""
    run = tracked(name, accuracy, evals=False, **changed)
    shares = [step / 200 for step in range(1, 201)]
    gain = accuracy - 0.5
    curves = {
        "accuracy": [0.5 + gain * share + 0.05 * math.sin(97 * share) for share in shares],
        "reward_margin": [4 * gain * share for share in shares],
        "reward_chosen": [gain * share for share in shares],
        "reward_rejected": [-3 * gain * share for share in shares],
        "labels_chosen": [40 + 9 * math.sin(60 * share) for share in shares],
    }
    if kl:
        curves["kl"] = [2 * share for share in shares[:-1]] + [math.nan]
    points = {key: tuple(enumerate(values, 1)) for key, values in curves.items()}
    points["eval_accuracy"] = tuple((60 * part, 0.5 + gain * part / 3) for part in range(4))
    return replace(run, curves=run.curves | points, metrics=run.metrics | {"eval_accuracy": accuracy})
