"""Tune the tiny base with three methods on one task, compare and evaluate them: what `make demo` runs."""

import subprocess
import sys
import time
from pathlib import Path

import fleetune
from runfolder.appended import read_lines
from runfolder.chain import attempts

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "demo"
METHODS = ("lora", "dora", "full")
BIN = Path(sys.executable).parent


def main() -> None:
    """Generate the task's rows, submit three jobs, follow them, show answers, the comparison, and an evaluation."""
    began = time.monotonic()
    step(f"python examples/tiny/generate.py rows record {BUILD}")
    subprocess.run([sys.executable, HERE / "tiny" / "generate.py", "rows", "record", BUILD], check=True)
    # An experiment of its own for each time, so that the comparison holds these three runs alone.
    experiment = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    sets = [f"tracking.experiment={experiment}"]
    runs = []
    for method in METHODS:
        step(f"fleetune submit examples/demo/{method}.yaml")
        runs.append(fleetune.submit(HERE / "demo" / f"{method}.yaml", overrides=sets))
        print(runs[-1].run_id)
    for run in runs:
        step(f"fleetune logs -f {run.run_id}")
        subprocess.run([BIN / "fleetune", "logs", "-f", run.run_id], check=True)
    for run in runs:
        step(f"answers of {run.run_id}, before and after")
        show_answers(run.run_dir)
    report = BUILD / "report.html"
    command = ["compare", "--experiment", experiment, "--html", str(report)]
    step("fleetune " + " ".join(command))
    subprocess.run([BIN / "fleetune", *command], check=True)
    answers = BUILD / "answers.html"
    adapters = [run.run_id for run in runs]
    command = ["evaluate", "--adapters", *adapters, "--tasks", "examples/demo/record.yaml", "--html", str(answers)]
    step("fleetune " + " ".join(command))
    subprocess.run([BIN / "fleetune", *command], cwd=HERE.parent, check=True)
    print(f"All answers: {answers.resolve().as_uri()}")
    print(f"\n{time.monotonic() - began:.0f} seconds. The report: {report.resolve().as_uri()}")
    print(
        f"The adapter: {runs[0].run_dir / 'output'}\nThe local cluster ends by itself; or now: fleetune cluster stop"
    )


def step(command: str) -> None:
    """Say what is done next, as a person would type it."""
    print(f"\n\033[1m$ {command}\033[0m" if sys.stdout.isatty() else f"\n$ {command}", flush=True)


def show_answers(run_dir: Path, rows: int = 3) -> None:
    """What the model wrote to the first held-out prompts before the first step and after the last."""
    samples = [
        record
        for attempt in attempts(run_dir)
        for record in read_lines(attempt, "events.jsonl")
        if record["event"] == "sample"
    ]
    last = max(sample["step"] for sample in samples)
    before = {s["prompt"]: s for s in samples if s["step"] == 0}
    after = {s["prompt"]: s for s in samples if s["step"] == last}
    for prompt in list(after)[:rows]:
        print(f"  prompt  {prompt.strip()}")
        print(f"  before  {before[prompt]['written'].strip()}")
        print(f"  after   {after[prompt]['written'].strip()}")
        print(f"  answer  {after[prompt]['answer'].strip()}\n")


if __name__ == "__main__":
    main()
