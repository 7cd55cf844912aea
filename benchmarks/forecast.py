"""What a dry run foretells of a worker's memory beside what a GPU had, for many methods, stages and objectives.

    python benchmarks/forecast.py --out benchmarks/results/forecast-h200.json    # on a GPU: all cells of one worker
    python benchmarks/forecast.py --at-once 4 --out ...                          # four cells at the same time on it
    python benchmarks/forecast.py --only checkpointed qlora --out ...            # those whose names have these words
    python benchmarks/forecast.py --workers 2 --out ...                          # on two: stages 0 to 3
    python benchmarks/forecast.py --only lora-plain-z0 --micro-batch 96 --out ... # fails, and names what would fit

Each cell trains a random model of Llama-3.2-1B's shape for a few steps on rows of about 1,700 tokens, four at once.
`foretold` and `tried` are events of the run: the dry run of its longest micro-batch, and what the calibration took
for that micro-batch before the first step. `steps` is the most that its steps took. A cell that fails is told and
left out. Prints a line for each, and last the errors: those of `tried`, which plans go by, and those of `steps`.
Memory is what a cell's own process has allocated, so cells that run beside others measure the same.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from layouts import commit, device, launch, make_inputs, metrics, write

STEPS = 4
GIB = 2**30
ADAPTERS = ("lora", "rslora", "dora", "adalora", "ia3", "vera", "fourierft", "bottleneck")
VIRTUAL = ("prefix", "prompt", "ptuning")
MODELS = ("longlora", "galore", "relora", "full")


class Cell(NamedTuple):
    """One run."""

    method: str
    kernels: str = "plain"
    checkpointed: bool = False
    zero: int = 0
    objective: str = "sft"

    @property
    def name(self) -> str:
        """What it is called."""
        words = [self.method, self.kernels, f"z{self.zero}"]
        if self.checkpointed:
            words.append("checkpointed")
        if self.objective != "sft":
            words.append(self.objective)
        return "-".join(words)


def cells(workers: int) -> list[Cell]:
    """The cells of so many workers: of one, each method with and without checkpointing, and what else differs."""
    if workers > 1:
        return [Cell(method, zero=zero) for method in ("lora", "qlora", "full") for zero in (0, 1, 2, 3)]
    found = []
    for method in (*ADAPTERS, *VIRTUAL, "qlora", *MODELS):
        found += [Cell(method), Cell(method, checkpointed=True)]
    for method in ("lora", "dora", "qlora", "ia3", "full"):
        found += [Cell(method, "fast"), Cell(method, "fast", checkpointed=True)]
    for zero in (1, 2, 3):
        found += [Cell(method, zero=zero) for method in ("lora", "qlora", "full")]
    for objective in ("dpo", "orpo", "kto"):
        found += [Cell("lora", objective=objective), Cell("lora", "fast", objective=objective)]
    return found


def main() -> None:
    """Run the cells and write what they had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=[], help="words that names of cells must have")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows at once; 96 are too many for a GPU")
    parser.add_argument("--at-once", type=int, default=1, help="cells that run at the same time")
    parser.add_argument("--seconds", type=float, default=10**9, help="after which no cell is begun any more")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    chosen = [cell for cell in cells(arguments.workers) if all(word in cell.name for word in arguments.only)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_inputs(place, arguments.layers)
        make_preferences(place)
        for row in all_measured(place, chosen, arguments):
            rows.append(row)
            print(line(row), flush=True)
            write(arguments.out, rows)
    print(f"\n{device()}, commit {commit()}, {len(rows)} of {len(chosen)} cells")
    print(errors(rows))


def all_measured(place: Path, chosen: list[Cell], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the cells had, each as soon as it is known; some at the same time, and none begun when time is up."""
    last_start = time.monotonic() + arguments.seconds

    def in_time(cell: Cell) -> dict[str, Any] | None:
        if time.monotonic() > last_start:
            return None
        return measured(place, cell, arguments.workers, arguments.micro_batch)

    with ThreadPoolExecutor(arguments.at_once) as pool:
        for done in as_completed([pool.submit(in_time, cell) for cell in chosen]):
            row = done.result()
            if row:
                yield row


def make_preferences(place: Path) -> None:
    """Pairs of answers, and judged ones, made of the rows of text."""
    source = place / "text.jsonl"
    pairs = []
    judged = []
    for number, line_of_text in enumerate(source.read_text().splitlines()):
        text = json.loads(line_of_text)["text"]
        prompt = text[:80]
        pairs.append({"prompt": prompt, "chosen": text[80:], "rejected": text[90:]})
        judged.append({"prompt": prompt, "completion": text[80:], "label": number % 2 == 0})
    for name, rows in (("pairs", pairs), ("judged", judged)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (place / f"{name}.jsonl").write_text("".join(lines))


def measured(place: Path, cell: Cell, workers: int, rows: int) -> dict[str, Any] | None:
    """What a cell had; None where it failed."""
    data = {"dpo": "pairs", "orpo": "pairs", "kto": "judged"}.get(cell.objective, "text")
    tokens = max(32768, 2 * rows * 2048)
    train = {"steps": STEPS, "batch_tokens": tokens, "micro_batch": rows, "precision": "bf16", "lr": 1e-4}
    train |= {"kernels": cell.kernels, "gradient_checkpointing": cell.checkpointed, "calibrate": True}
    job = {
        "name": "cell",
        "base": str(place / "base"),
        "objective": cell.objective,
        "method": {"kind": cell.method},
        "data": {"train": str(place / f"{data}.jsonl"), "seq_len": 2048},
        "train": train,
        "sharding": {"zero": cell.zero},
        "resources": {"gpus_per_node": workers},
        "checkpoint": {"every": 10**6},
    }
    run = place / cell.name
    run.mkdir()
    (run / "job.yaml").write_text(yaml.safe_dump({"run_id": cell.name, "job": job}))
    began = time.monotonic()
    try:
        launch(place, workers, run)
    except SystemExit as failed:
        print(f"{cell.name} failed after {time.monotonic() - began:.0f} s: {str(failed)[-500:]}", flush=True)
        return None
    events = [json.loads(text) for text in (run / "attempts" / "1" / "events.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"cell": cell.name, "workers": workers}
    for event in events:
        if event["event"] == "foretold":
            found |= {"foretold": event["bytes"] / GIB, "parts": event["parts"]}
        elif event["event"] == "not_foretold":
            found["why"] = event["why"]
        elif event["event"] == "calibrated" and event["what"] == "training" and event["bytes"]:
            found |= {"tried": event["bytes"] / GIB, "seconds": event["seconds"], "size": event["size"]}
    found["steps"] = max(row.get("peak_memory_bytes", 0) for row in metrics(run, 1)) / GIB
    shutil.rmtree(run)
    return found


def line(row: dict[str, Any]) -> str:
    """A cell as a line of the table."""
    foretold = row.get("foretold")
    if foretold is None:
        return f"| {row['cell']} | not foretold: {row.get('why', 'no GPU, or it took too long')} |"
    tried = row.get("tried", float("nan"))
    of_tried, of_steps = foretold / tried - 1, foretold / row["steps"] - 1
    return (
        f"| {row['cell']} | foretold {foretold:.2f} | tried {tried:.2f} ({of_tried:+.1%}) | "
        f"steps {row['steps']:.2f} ({of_steps:+.1%}) | {row.get('seconds', 0):.1f} s |"
    )


def errors(rows: list[dict[str, Any]]) -> str:
    """The median and the largest error of what was foretold, and how often it was too low by more than 5 %."""
    lines = []
    for name in ("tried", "steps"):
        both = [row for row in rows if "foretold" in row and name in row]
        found = [row["foretold"] / row[name] - 1 for row in both]
        if not found:
            continue
        sizes = [abs(error) for error in found]
        low = sum(error < -0.05 for error in found)
        lines.append(
            f"{name}: {len(found)} cells, median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}, "
            f"{low} too low by more than 5 %"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
