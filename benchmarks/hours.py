"""How long runs take beside what was foretold: before the start, by runs like them, and after 20 steps.

    python benchmarks/hours.py --gpus 2 --out benchmarks/results/hours-h200.json

Each cell trains a random model of Llama-3.2-1B's shape twice: for 15 steps on rows of half the length, which is the
run that the second is foretold by, then for 60. `stated` is the forecast where no run was before, `like` the one that
goes by the first run, both of the seconds of the steps after the first two, which compile; `later` is that of the
seconds from step 20 on. A forecast is [low, likely, high]: it should hold in 9 of 10 runs. With several GPUs as
many cells run at the same time, each on its own.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from layouts import commit, device, launch, make_inputs, metrics, on_gpus, write, write_run

STEPS = 60
STEPS_BEFORE = 15
TOLD_AT = 20
COMPILING = 2  # steps
CELLS: list[dict[str, Any]] = [
    *({"method": kind} for kind in ("lora", "dora", "adalora", "ia3", "prefix", "full", "galore", "fourierft")),
    {"method": "lora", "train": {"gradient_checkpointing": True}},
    {"method": "lora", "train": {"kernels": "plain"}},
]


def main() -> None:
    """Run the cells and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--cells", type=int, default=len(CELLS), help="how many, from the first on")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_inputs(place, arguments.layers)
        for row in on_gpus(arguments.gpus, partial(measured, place), CELLS[: arguments.cells]):
            rows.append(row)
            print(line(row), flush=True)
            write(arguments.out, rows)
    print(f"\n{device()}, commit {commit()}")
    for forecast in ("stated", "like", "later"):
        print(summary(forecast, rows))


def measured(place: Path, cell: dict[str, Any], gpu: int) -> dict[str, Any]:
    """What a cell took, and what was foretold."""
    from orchestrator.planning.hours import hours
    from orchestrator.planning.model import locate
    from orchestrator.planning.sizes import planned_kernels, sizes
    from runfolder.costs import read_costs
    from runfolder.pace import pace_of
    from runfolder.record import load_job

    name = "-".join([cell["method"], *map(str, cell.get("train", {}).values())]).lower()
    before = train(place, f"{name}-before", cell, STEPS_BEFORE, 1024, gpu)
    costs = read_costs(before)
    run = train(place, name, cell, STEPS, 2048, gpu)
    job = load_job(run)
    model = locate(job.base)
    assert model and costs
    of_model = sizes(job, model, "gpu")
    assert of_model
    kernels = planned_kernels(job, "gpu")
    rows = metrics(run, 1)
    found: dict[str, Any] = {"cell": name, "seconds": {}}
    for forecast, earlier in (("stated", []), ("like", [costs])):
        foretold = hours(job, model, of_model, STEPS - COMPILING, kernels, earlier, device())
        assert foretold
        found[forecast] = [3600 * value for value in (foretold.low, foretold.likely, foretold.high)]
        found["seconds"][forecast] = rows[-1]["time"] - rows[COMPILING - 1]["time"]
    pace = pace_of(rows[:TOLD_AT], [], None)
    assert pace
    remaining = pace.remaining(TOLD_AT, STEPS)
    found["later"] = [remaining.low, remaining.likely, remaining.high]
    found["seconds"]["later"] = rows[-1]["time"] - rows[TOLD_AT - 1]["time"]
    for folder in (before, run):
        shutil.rmtree(folder)
    return found


def train(place: Path, name: str, cell: dict[str, Any], steps: int, length: int, gpu: int) -> Path:
    """The folder of a run that has ended, on rows of at most so many tokens."""
    settings = {"steps": steps, "batch_tokens": 32768, "micro_batch": 8192 // length, "precision": "bf16", "lr": 1e-4}
    job = {
        "name": name,
        "base": str(place / "base"),
        "method": {"kind": cell["method"]},
        "data": {"train": str(place / "text.jsonl"), "seq_len": length, "too_long": "cut"},
        "train": settings | cell.get("train", {}),
        "sharding": {"zero": 0},
        "resources": {"gpus_per_node": 1},
        "checkpoint": {"every": 10**6},
    }
    run = write_run(place, job)
    launch(place, 1, run, gpu)
    return run


def line(row: dict[str, Any]) -> str:
    """A cell as a line of the table."""
    words = [row["cell"]]
    for forecast in ("stated", "like", "later"):
        low, likely, high = row[forecast]
        seconds = row["seconds"][forecast]
        words.append(f"{forecast} {low:.1f} to {high:.1f}, took {seconds:.1f} s ({likely / seconds - 1:+.1%})")
    return "| " + " | ".join(words) + " |"


def summary(forecast: str, rows: list[dict[str, Any]]) -> str:
    """How far a forecast was off, and how often its interval held."""
    errors = list(errors_of(forecast, rows))
    held = 0
    for row in rows:
        low, _, high = row[forecast]
        held += low <= row["seconds"][forecast] <= high
    middle = statistics.median(errors)
    return f"{forecast}: median error {middle:.1%}, largest {max(errors):.1%}, {held} of {len(rows)} intervals held"


def errors_of(forecast: str, rows: list[dict[str, Any]]) -> Iterator[float]:
    """How far the likely value of each forecast was off, as a share of what it took."""
    for row in rows:
        _, likely, _ = row[forecast]
        yield abs(likely / row["seconds"][forecast] - 1)


if __name__ == "__main__":
    main()
