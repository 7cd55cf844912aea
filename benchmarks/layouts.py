"""Throughput and peak memory of every ZeRO stage, on the GPUs of this machine, as plain processes without Ray.

    python benchmarks/layouts.py --workers 2 --out benchmarks/results/layouts.json

Trains a random model of Llama-3.2-1B's shape with LoRA and in full, in bf16, at each stage, then resumes the last run
of several workers on one of them. Figures are the median over the second half of the steps.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import llama_1b
import yaml

ROOT = Path(__file__).parent.parent
Item = TypeVar("Item")
Found = TypeVar("Found")
SHAPE = llama_1b.SHAPE | {"rope_theta": 500000.0}


def main() -> None:
    """Run all layouts and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--zeros", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--kernels", default="fast", choices=["fast", "plain"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_inputs(place, arguments.layers)
        for method, zero in itertools.product(arguments.methods, arguments.zeros):
            run = make_run(place, f"{method}-z{zero}", method, zero, arguments.steps, kernels=arguments.kernels)
            launch(place, arguments.workers, run)
            rows.append(figures(run, 1, arguments.workers))
            if (method, zero) == ("lora", 3) and arguments.workers > 1:
                rows.append(resume_alone(place, run))
            shutil.rmtree(run / "attempts" / "1" / "checkpoints")
            write(arguments.out, rows)
    print(table(rows))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what was measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"commit": commit(), "device": device(), "rows": rows}, indent=1))


def make_inputs(place: Path, layers: int) -> None:
    """A base folder (a tokenizer, and random weights in bf16) and rows of random words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    base = place / "base"
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = LlamaConfig(**SHAPE | {"num_hidden_layers": layers}, dtype=torch.bfloat16)
        LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    torch.cuda.empty_cache()
    for path in (ROOT / "examples" / "tiny").glob("token*"):
        shutil.copy(path, base)
    rng = random.Random(0)
    words = ["red", "blue", "cat", "dog", "one", "two", "three", "is", "in", "the", "box"]
    rows = [{"text": " ".join(rng.choices(words, k=900))} for _ in range(800)]
    (place / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    place: Path, name: str, method: str, zero: int, steps: int, batch_tokens: int = 65536, kernels: str = "auto"
) -> Path:
    """A run folder of one layout."""
    job = {
        "name": name,
        "base": str(place / "base"),
        "method": {"kind": method},
        "data": {"train": str(place / "text.jsonl"), "seq_len": 2048},
        "train": {
            "steps": steps,
            "batch_tokens": batch_tokens,
            "micro_batch": 4,
            "precision": "bf16",
            "lr": 1e-4,
            "kernels": kernels,
        },
        "sharding": {"zero": zero},
        "checkpoint": {"every": steps // 2 if method == "lora" else 10**6, "keep": 9},
    }
    return write_run(place, job)


def write_run(place: Path, job: dict[str, Any]) -> Path:
    """A new run folder of a job, with its name."""
    run_dir = place / job["name"]
    run_dir.mkdir()
    record = {"run_id": run_dir.name, "submitted": time.time(), "job": job}
    (run_dir / "job.yaml").write_text(yaml.safe_dump(record))
    return run_dir


def on_gpus(gpus: int, work: Callable[[Item, int], Found], items: Iterable[Item]) -> Iterator[Found]:
    """What `work` gives of each item, in order, with the number of a GPU that no other item uses meanwhile."""
    free: SimpleQueue[int] = SimpleQueue()
    for gpu in range(gpus):
        free.put(gpu)

    def on_free_gpu(item: Item) -> Found:
        gpu = free.get()
        try:
            return work(item, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(gpus) as pool:
        yield from pool.map(on_free_gpu, items)


def name_of_gpu(number: int) -> str:
    """The name, for CUDA_VISIBLE_DEVICES, of one of the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[number] if visible else str(number)


def launch(place: Path, workers: int, run: Path, gpu: int | None = None) -> None:
    """Train a run in fresh processes, on one GPU alone where that is said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"FLEETUNE_CACHE": str(place / "cache"), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if gpu is not None:
        common["CUDA_VISIBLE_DEVICES"] = name_of_gpu(gpu)
    path = place / f"{run.name}.log"
    with path.open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "trainer", str(run)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(workers)
        ]
        codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{path.read_text()[-5000:]}\n{run.name} ended with {codes}")
    print(run.name, "done", flush=True)


def metrics(run: Path, attempt: int) -> list[dict[str, Any]]:
    """The steps that an attempt reported."""
    return [json.loads(line) for line in (run / "attempts" / str(attempt) / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path, attempt: int, workers: int) -> dict[str, Any]:
    """One row: medians over the second half of the steps."""
    rows = metrics(run, attempt)
    folder = run / "attempts" / str(attempt)
    claimed = json.loads((folder / "claim.json").read_text())["time"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    plan = next(event for event in events if event["event"] == "plan")
    tail = rows[len(rows) // 2 :]
    return {
        "run": run.name,
        "workers": workers,
        "kernels": plan["kernels"],
        "kernel_problems": plan["kernel_problems"],
        "planned_gib": planned(run, workers) / 2**30,
        "tokens_per_second_per_worker": statistics.median(row["tokens_per_second"] for row in tail) / workers,
        "mfu": statistics.median(row["mfu"] for row in tail),
        "seconds_from_claim": {
            **{event["event"]: round(event["time"] - claimed, 1) for event in events},
            "first step": round(rows[0]["time"] - claimed, 1),
            "last step": round(rows[-1]["time"] - claimed, 1),
        },
        "peak_memory_gib": max(row["peak_memory_bytes"] for row in rows) / 2**30,
        "losses": [round(row["loss"], 5) for row in rows],
    }


def planned(run: Path, workers: int) -> int:
    """What the plan says that a worker holds beside activations, in bytes."""
    from orchestrator.planning.model import locate
    from orchestrator.planning.sizes import sizes
    from runfolder.record import load_job

    job = load_job(run)
    job = job.model_copy(update={"resources": job.resources.model_copy(update={"gpus_per_node": workers})})
    model = locate(job.base)
    assert model
    found = sizes(job, model)
    assert found, "a Llama's shapes are known"
    return found.memory.total


def resume_alone(place: Path, run: Path) -> dict[str, Any]:
    """Take a run back to the middle and finish it with one worker; the largest relative difference of the losses."""
    copy = place / f"{run.name}-resumed"
    shutil.copytree(run, copy)
    steps = len(metrics(run, 1))
    for gone in ("attempts/2", f"attempts/1/checkpoints/step-{steps}", "output"):
        shutil.rmtree(copy / gone)
    (copy / "result.json").unlink()
    launch(place, 1, copy)
    expected = {row["step"]: row["loss"] for row in metrics(run, 1)}
    resumed = {row["step"]: row["loss"] for row in metrics(copy, 2)}
    worst = max(abs(loss - expected[step]) / expected[step] for step, loss in resumed.items())
    return figures(copy, 2, 1) | {
        "run": copy.name,
        "resumed_steps": sorted(resumed),
        "worst_relative_loss_difference": worst,
    }


def commit() -> str:
    """The commit of this checkout, with a mark when it has changes; `unknown` outside a checkout."""
    found = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def device() -> str:
    """What the figures were measured on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| run | workers | tokens/s per worker | MFU | peak GiB | planned |", "|---|---|---|---|---|---|"]
    for row in rows:
        speed, mfu, memory = row["tokens_per_second_per_worker"], row["mfu"], row["peak_memory_gib"]
        start = f"| {row['run']} | {row['workers']} | {speed:,.0f} | {mfu:.1%} |"
        lines.append(f"{start} {memory:.1f} | {row['planned_gib']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
