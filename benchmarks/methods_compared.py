"""Can any method beat LoRA? All of them on tasks of the tiny base: five rates each, then eight seeds at the best one.

    python benchmarks/methods_compared.py --out benchmarks/results/methods-compared
    python benchmarks/methods_compared.py --out /tmp/slice --tasks record --methods lora ia3 --seeds 2 --steps 20

All have equal tokens. Rates are chosen with seed 0 by the loss on the first half of the held-out rows (a range whose
best is at its end is widened), and judged with other seeds by exact match on the second half, which chose nothing.
Forgetting is the rise of the loss on rows like those that the base was made from. Both parts are sweeps on the local
cluster, in a folder of this commit below build/: end it at any time, and the same command goes on. Writes
OUT/TASK.html, OUT/TASK.json, and OUT/README.md with what each task says.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
DESCRIBE = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
COMMIT = subprocess.run(DESCRIBE, capture_output=True, text=True).stdout.strip() or "unknown"
BUILD = HERE.parent / "build" / "methods-compared" / COMMIT
os.environ["FLEETUNE_HOME"] = str(BUILD / "home")  # before anything asks for it
sys.path.append(str(HERE.parent))

from clusters.local import Local  # noqa: E402
from methods.options import KINDS  # noqa: E402
from orchestrator.comparison.report import write_report  # noqa: E402
from orchestrator.sweeps.driver import SweepDriver  # noqa: E402
from orchestrator.sweeps.result import SweepResult, conclude  # noqa: E402
from orchestrator.sweeps.spec import six_digits  # noqa: E402
from runfolder.job import Job  # noqa: E402

TASKS = {"record": 24, "swap": 30, "only": 30}  # with the steps of each, after which LoRA is not at the ceiling
FACTORS = [10 ** (power / 2) for power in (-2, -1, 0, 1, 2)]  # of a method's default rate
HELD_OUT = 400
BY_LOSS = {"evaluation.max_new_tokens": [0], "evaluation.before": [False], "data.retain": [None]}
Rates = dict[str, float]  # by method
SweptMethods = list[dict[str, Any]]  # as a sweep.yaml has them


def main() -> None:
    """Compare on each task, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, help="of each task, in the place of its own")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    said = ["# Can any method beat LoRA on the tiny base?\n", f"`{' '.join(['python', *sys.argv])}`\n"]
    try:
        for task in arguments.tasks:
            steps = arguments.steps or TASKS[task]
            sentence = compared(task, arguments.methods, arguments.seeds, steps, arguments.out)
            said.append(f"- **{task}**: {sentence} ([page]({task}.html), [figures]({task}.json))")
            print(said[-1], flush=True)
    finally:
        Local.here().stop()
    (arguments.out / "README.md").write_text("\n".join(said) + "\n")


def compared(task: str, methods: list[str], seeds: int, steps: int, out: Path) -> str:
    """Compare methods on one task; gives the sentence that answers the question."""
    job = write_job(task, steps)
    rates = tuned(task, job, methods, steps)
    finals = [swept(kind, [rates[kind]]) for kind in methods]
    result = run_sweep(job, f"{task}-final", finals, list(range(1, seeds + 1)), steps)
    comparison = result.comparison
    write_report(comparison, out / f"{task}.html")
    figures = {
        "commit": COMMIT,
        "rates": rates,
        "steps": result.steps,
        "device_hours": result.device_hours,
        **comparison.to_json(),
    }
    (out / f"{task}.json").write_text(json.dumps(figures, indent=1))
    return comparison.verdict or "nothing was compared"


def write_job(task: str, steps: int) -> Path:
    """The job of a task, and its rows."""
    make = [sys.executable, EXAMPLES / "tiny" / "generate.py", "rows"]
    for source in (task, "mixture"):
        subprocess.run([*make, source, BUILD, "--eval", str(HELD_OUT)], check=True)
    job: dict[str, Any] = yaml.safe_load((EXAMPLES / "demo" / "lora.yaml").read_text())
    job |= {
        "name": task,
        "base": str(EXAMPLES / "tiny"),
        "sharding": {"zero": 0},
        "resources": {"workers_per_node": 1},
    }
    rows = {"train": f"{task}-train.jsonl", "eval": f"{task}-eval.jsonl", "retain": "mixture-eval.jsonl"}
    job["data"] |= {field: str(BUILD / name) for field, name in rows.items()}
    job["train"] |= {"steps": steps}
    path = BUILD / f"{task}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def tuned(task: str, job: Path, methods: list[str], steps: int) -> Rates:
    """The best rate of each method, of five around its default and those beyond."""
    plain = yaml.safe_load(job.read_text())
    width = int(json.loads((EXAMPLES / "tiny" / "config.json").read_text())["hidden_size"])
    tried = []
    for kind in methods:
        plain["method"], plain["train"]["lr"] = {"kind": kind}, None
        default = Job.model_validate(plain).at_width(width).lr
        tried.append(swept(kind, [six_digits(default * factor) for factor in FACTORS]))
    driver = sweep_driver(job, f"{task}-rates", tried, [0], steps, "eval_loss", BY_LOSS)
    _, found = driver.run(tell)
    best: dict[str, tuple[float, float]] = {}
    for trial, reached in found.items():
        if steps in reached.scores:
            rate = float(trial.configuration.settings["train.lr"])
            scored = (reached.scores[steps], rate)
            method = trial.configuration.method
            best[method] = min(best.get(method, scored), scored)
    return {method: rate for method, (_, rate) in best.items()}


def swept(kind: str, rates: list[float]) -> dict[str, Any]:
    """A method with its rates, as a sweep.yaml has them."""
    return {"kind": kind, "axes": {"train.lr": rates}}


def sweep_driver(
    job: Path, name: str, methods: SweptMethods, seeds: list[int], steps: int, measure: str, axes: dict[str, Any]
) -> SweepDriver:
    """The driver of a grid that is judged by a measure, and is written down beside its job."""
    most = 2 * len(FACTORS) * len(methods) * len(seeds) * steps  # of ranges that are widened, too
    sweep = {"name": name, "job": job.name, "methods": methods, "axes": axes, "seeds": seeds, "budget": most}
    path = job.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**sweep, "measure": measure, "rule": "grid", "parallel": os.cpu_count()}))
    return SweepDriver.of(path, "local")


def tell(line: str) -> None:
    """Print what a sweep does."""
    print(line, flush=True)


def run_sweep(job: Path, name: str, methods: SweptMethods, seeds: list[int], steps: int) -> SweepResult:
    """Run a grid to its end, and compare what came of it."""
    driver = sweep_driver(job, name, methods, seeds, steps, "eval_exact_match", {})
    _, found = driver.run(tell)
    return conclude(driver, found, lambda _cluster, _runs: None)


if __name__ == "__main__":
    main()
