"""Every method on one task of the tiny base: an equal budget of learning rates, then five seeds at the best of them.

    python examples/all_methods.py --out benchmarks/results/methods.json [--task record] [--methods lora ia3]

Each method gets the same three rates around its default, at seed 0, and is judged on rows of their own; the best (by
loss) goes through seeds 0 to 4 and is judged on other rows. Runs are plain trainer processes of one thread each;
those that this commit has finished are not repeated. Writes the figures, and a table of them beside.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from methods.options import KINDS as OPTIONS
from runfolder.appended import read_lines
from runfolder.chain import attempts, result
from runfolder.job import Job

HERE = Path(__file__).parent
COMMAND = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
COMMIT = subprocess.run(COMMAND, capture_output=True, text=True).stdout.strip() or "unknown"
BUILD = HERE.parent / "build" / "all-methods" / COMMIT
KINDS = list(OPTIONS)
FACTORS, SEEDS = (0.25, 1.0, 4.0), range(5)
Row = dict[str, Any]


def main() -> None:
    """Sweep, repeat, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="record", choices=["record", "swap", "only"])
    parser.add_argument("--methods", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = make_rows(arguments.task)
    sweep = {
        (kind, factor): make_run(f"{arguments.task}-{kind}-lr{factor:g}", kind, factor, 0, rows, "tune")
        for kind in arguments.methods
        for factor in FACTORS
    }
    train(sweep.values(), arguments.at_once)
    best = {kind: min(FACTORS, key=lambda f: last(sweep[kind, f], "eval_loss")) for kind in arguments.methods}
    repeated = {
        (kind, seed): make_run(f"{arguments.task}-{kind}-seed{seed}", kind, best[kind], seed, rows, "test")
        for kind in arguments.methods
        for seed in SEEDS
    }
    train(repeated.values(), arguments.at_once)
    found = [figures(kind, sweep, best[kind], [repeated[kind, seed] for seed in SEEDS]) for kind in arguments.methods]
    arguments.out.write_text(json.dumps({"commit": COMMIT, "task": arguments.task, "methods": found}, indent=1))
    arguments.out.with_suffix(".md").write_text(table(found))
    print(table(found))


def make_rows(task: str) -> Path:
    """Rows to train on, and two disjoint sets of held-out ones: to choose the rate by, and to judge by."""
    subprocess.run([sys.executable, HERE / "tiny" / "generate.py", "rows", task, BUILD], check=True)
    lines = (BUILD / f"{task}-train.jsonl").read_text().splitlines()
    random.Random(0).shuffle(lines)
    (BUILD / f"{task}-tune.jsonl").write_text("\n".join(lines[:100]))
    (BUILD / f"{task}-fit.jsonl").write_text("\n".join(lines[100:]))
    (BUILD / f"{task}-test.jsonl").write_text((BUILD / f"{task}-eval.jsonl").read_text())
    return BUILD / task


def make_run(name: str, kind: str, factor: float, seed: int, rows: Path, judged: str) -> Path:
    """A run folder; one that exists is taken as it is."""
    job: Row = yaml.safe_load((HERE / "demo" / "lora.yaml").read_text())
    job |= {"base": str((HERE / "tiny").resolve()), "method": {"kind": kind}, "sharding": {"zero": 0}}
    job["name"], job["resources"] = kind, {"workers_per_node": 1}
    job["data"] |= {"train": f"{rows}-fit.jsonl", "eval": f"{rows}-{judged}.jsonl"}
    default = Job.model_validate(job | {"train": job["train"] | {"lr": None}}).at_width(hidden()).lr
    job["train"] |= {"seed": seed, "lr": default * factor}
    run_dir = BUILD / name
    if not (run_dir / "job.yaml").exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "job.yaml").write_text(yaml.safe_dump({"run_id": name, "job": Job.model_validate(job).dump()}))
    return run_dir


def hidden() -> int:
    """The width of the tiny base."""
    return int(json.loads((HERE / "tiny" / "config.json").read_text())["hidden_size"])


def train(runs: Iterable[Path], at_once: int) -> None:
    """Train the runs that are not finished, so many at a time."""
    waiting = [run for run in runs if result(run) is None]
    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        for number, run in enumerate(pool.map(train_one, waiting), 1):
            said = f"loss {last(run, 'eval_loss'):.4f}  exact match {last(run, 'eval_exact_match'):.0%}"
            print(f"{number}/{len(waiting)}  {run.name}  {said}  {time.monotonic() - began:.0f} s", flush=True)


def train_one(run: Path) -> Path:
    """Train one run in a process of its own; raises what it said last when it fails."""
    paths = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with (run / "log").open("w") as log:
        ended = subprocess.run([sys.executable, "-m", "trainer", run], env=environment, stdout=log, stderr=log)
    if ended.returncode:
        raise SystemExit(f"{run.name} failed:\n{(run / 'log').read_text()[-2000:]}")
    return run


def rows_of(run: Path, file: str) -> list[Row]:
    """What all attempts of a run wrote into a file."""
    return [row for attempt in attempts(run) for row in read_lines(attempt, file)]


def values(run: Path, key: str) -> list[float]:
    """A metric, from first to last."""
    return [row[key] for row in rows_of(run, "metrics.jsonl") if key in row]


def last(run: Path, key: str) -> float:
    """The last value of a metric."""
    return values(run, key)[-1]


def figures(kind: str, sweep: dict[tuple[str, float], Path], factor: float, runs: list[Path]) -> Row:
    """What one method came to."""
    matches = [last(run, "eval_exact_match") for run in runs]
    plan = next(row for row in rows_of(runs[0], "events.jsonl") if row["event"] == "plan")
    return {
        "method": kind,
        "lr": max(values(runs[0], "lr")),
        "lr_factor": factor,
        "exact_match_untuned": values(runs[0], "eval_exact_match")[0],
        "loss_untuned": values(runs[0], "eval_loss")[0],
        "exact_match_at_default_lr": last(sweep[kind, 1.0], "eval_exact_match"),
        "loss_at_default_lr": last(sweep[kind, 1.0], "eval_loss"),
        "exact_match": matches,
        "loss": [last(run, "eval_loss") for run in runs],
        "trained": plan["trained"],
        "peak_memory_bytes": max(last(run, "peak_memory_bytes") for run in runs),
        "seconds": statistics.median(seconds(run) for run in runs),
    }


def seconds(run: Path) -> float:
    """Seconds between the first and the last step of a run."""
    times = [row["time"] for row in rows_of(run, "metrics.jsonl") if "loss" in row]
    return float(times[-1] - times[0])


def table(found: list[Row]) -> str:
    """The figures as Markdown, best first."""
    lines = [
        "| method | exact match, 5 seeds | loss | at its default rate | rate | trained | peak MiB | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: -statistics.mean(row["exact_match"])):
        match, loss = row["exact_match"], row["loss"]
        lines.append(
            f"| {row['method']} | {statistics.mean(match):.1%} ± {statistics.stdev(match):.1%} "
            f"| {statistics.mean(loss):.3f} ± {statistics.stdev(loss):.3f} "
            f"| {row['exact_match_at_default_lr']:.0%}, loss {row['loss_at_default_lr']:.3f} | {row['lr']:.1e} "
            f"| {row['trained']:,} | {row['peak_memory_bytes'] / 2**20:.0f} | {row['seconds']:.0f} |"
        )
    untuned = found[0]
    lines.append(f"\nThe untuned base: {untuned['exact_match_untuned']:.0%}, loss {untuned['loss_untuned']:.3f}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
