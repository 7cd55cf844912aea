"""How long a row may be, and how fast it trains: LoRA with full attention, and LongLoRA, alone or in two parts.

    python benchmarks/long_context.py --out benchmarks/results/long-context.json
    python benchmarks/long_context.py --workers 2 --lengths 65536 131072 --out benchmarks/results/long-context-2.json
    python benchmarks/long_context.py --layers 2 --lengths 512 --out /tmp/long.json       (without a GPU)

Each cell trains a random model of Llama-3.2-1B's shape on whole rows of so many tokens, one at a time, and
computes activations again in the backward pass. Several workers share each row (`sharding.sequence`). Figures are
those of the steps after the first, which compiles; a cell that does not fit says so.
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import layouts

STEPS = 3
WORDS = ["red", "blue", "cat", "dog", "is", "in", "the"]


def main() -> None:
    """Train each cell, and write and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="that share a row")
    parser.add_argument("--methods", nargs="+", default=["lora", "longlora"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 65536, 131072])
    parser.add_argument("--layers", type=int, default=layouts.SHAPE["num_hidden_layers"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        layouts.make_inputs(place, arguments.layers)
        allow_positions(place / "base", max(arguments.lengths))
        for length, method in itertools.product(arguments.lengths, arguments.methods):
            row = measured(place, method, length, arguments.workers)
            rows.append(row)
            print(json.dumps(row), flush=True)
            layouts.write(arguments.out, rows)


def allow_positions(base: Path, length: int) -> None:
    """Have a base's config.json say that it knows so many positions."""
    config = base / "config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps(described | {"max_position_embeddings": length}))


def measured(place: Path, method: str, length: int, workers: int) -> dict[str, Any]:
    """What a cell takes, or why it does not fit."""
    cell = {"method": method, "length": length, "workers": workers}
    run = make_run(place, method, length, workers)
    try:
        layouts.launch(place, workers, run)
    except SystemExit as failure:
        text = str(failure)
        return cell | {"error": "out of memory" if "memory" in text else text[-500:]}
    found = layouts.metrics(run, 1)
    later = found[1:]
    shutil.rmtree(run)
    return cell | {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in later),
        "peak_gib": max(row["peak_memory_bytes"] for row in found) / 2**30,
    }


def make_run(place: Path, method: str, length: int, workers: int) -> Path:
    """A run folder whose rows all have so many tokens."""
    rng = random.Random(0)
    data = place / f"{length}.jsonl"
    if not data.exists():
        texts = [" ".join(rng.choices(WORDS, k=length)) for _ in range(STEPS + 1)]
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = {
        "name": f"{method}-{length}-{workers}",
        "base": str(place / "base"),
        "method": {"kind": method},
        "data": {"train": str(data), "seq_len": length, "too_long": "cut"},
        "train": {
            "steps": STEPS,
            "batch_tokens": length,
            "micro_batch": 1,
            "lr": 1e-5,
            "gradient_checkpointing": True,
        },
        "sharding": {"sequence": workers},
        "resources": {"gpus_per_node": workers},
        "checkpoint": {"every": 10**6},
    }
    return layouts.write_run(place, job)


if __name__ == "__main__":
    main()
