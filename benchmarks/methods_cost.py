"""What each method costs beside LoRA for as many tokens of real rows: seconds, memory, and what it trains.

    python benchmarks/methods_cost.py --data gsm8k_train.jsonl --gpus 2 --out benchmarks/results/methods-cost
    python benchmarks/methods_cost.py --data rows.jsonl --layers 2 --steps 4 --methods lora ia3 --out /tmp/costs

The base is random, of Llama-3.2-1B's shape, with the tokenizer of the tiny base, so a loss says nothing: this is
about cost alone. Every run is a process of its own, on one GPU (or on the CPU, with a small base). Runs that are
whole lie in a folder of this commit below build/ and are not run again; where MLflow is not installed nothing else is
done, and the same command, where that folder is and MLflow too, writes costs.html, costs.json and README.md into OUT.
"""

import argparse
import json
import os
import shutil
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layouts import ROOT, commit, device, launch, make_inputs, on_gpus, write_run

COMMIT = commit()
BUILD = ROOT / "build" / "methods-cost" / COMMIT
os.environ["FLEETUNE_HOME"] = str(BUILD / "home")  # before anything asks for it
sys.path.append(str(ROOT))

from methods.options import KINDS  # noqa: E402
from orchestrator.comparison.compare import arrange  # noqa: E402
from orchestrator.comparison.measure import format_bytes, format_count  # noqa: E402
from orchestrator.comparison.report import write_report  # noqa: E402
from orchestrator.comparison.run import load_runs  # noqa: E402
from orchestrator.tracking.delivery import replay  # noqa: E402
from orchestrator.tracking.store import client, resolve  # noqa: E402
from runfolder.chain import result  # noqa: E402

MEASURED_ON = BUILD / "measured-on.json"  # the machine of the runs, which need not be that of the page
EXPERIMENT = "methods-cost"
REFERENCE = "lora"


def main() -> None:
    """Train with each method, and compare what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows of questions and answers, or any other")
    parser.add_argument("--methods", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    train_missing(arguments)
    if find_spec("mlflow") is None:
        print(f"MLflow is not installed here: the runs are in {BUILD}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    compare(arguments.methods, arguments.out)


def train_missing(arguments: argparse.Namespace) -> None:
    """Train with each method whose run is not whole; several at once where there are several GPUs."""
    missing = [kind for kind in arguments.methods if result(BUILD / kind) is None]
    if not missing:
        return
    if not (BUILD / "base").exists():
        make_inputs(BUILD, arguments.layers)
    MEASURED_ON.write_text(json.dumps({"commit": COMMIT, "device": device()}))
    list(on_gpus(arguments.gpus, partial(train, arguments), missing))


def train(arguments: argparse.Namespace, kind: str, gpu: int) -> None:
    """Run a method to its end, of which only the records stay; what made it fail is printed."""
    shutil.rmtree(BUILD / kind, ignore_errors=True)
    job = {
        "name": kind,
        "base": str(BUILD / "base"),
        "method": {"kind": kind},
        "data": {"train": str(arguments.data.absolute()), "seq_len": 2048},
        "train": {"steps": arguments.steps, "batch_tokens": arguments.batch_tokens, "micro_batch": 4},
        "checkpoint": {"every": 10**6},
        "tracking": {"experiment": EXPERIMENT},
    }
    run = write_run(BUILD, job)
    try:
        launch(BUILD, 1, run, gpu)
    except SystemExit as failure:
        print(failure, flush=True)
    for weights in (run / "output", *run.glob("attempts/*/checkpoints")):
        shutil.rmtree(weights, ignore_errors=True)


def compare(methods: list[str], out: Path) -> None:
    """Write the page, the figures, and a table of them."""
    for kind in methods:
        replay(BUILD / kind)
    uri = resolve(None)
    runs = [run for run in load_runs(client(uri), EXPERIMENT, uri) if run.name in methods]
    comparison = arrange(runs, "What each method costs on a random base", uri)
    write_report(comparison, out / "costs.html")
    measured_on = json.loads(MEASURED_ON.read_text())
    figures = measured_on | comparison.to_json()
    (out / "costs.json").write_text(json.dumps(figures, indent=1))
    of_methods = {run.name: run.metrics for run in runs}
    lines = [
        f"# What each method costs on a random base\n\n`{' '.join(['python', *sys.argv])}`\n",
        f"Commit {measured_on['commit']}, {measured_on['device']}.\n",
        "| method | tokens/s | time for as many tokens, LoRA's as 1 | peak memory | trained |",
        "|---|---|---|---|---|",
    ]
    reference = of_methods.get(REFERENCE, {}).get("tokens_per_second")
    lines += [line(kind, of_methods[kind], reference) for kind in methods if kind in of_methods]
    (out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def line(kind: str, metrics: dict[str, Any], reference: float | None) -> str:
    """A method as a line of the table."""
    if "tokens_per_second" not in metrics:
        return f"| {kind} | failed | | | |"
    speed = metrics["tokens_per_second"]
    relative = f"{reference / speed:.2f}" if reference else ""
    memory = format_bytes(metrics["peak_memory_bytes"])
    return f"| {kind} | {format_count(speed)} | {relative} | {memory} | {format_count(metrics['trained'])} |"


if __name__ == "__main__":
    main()
