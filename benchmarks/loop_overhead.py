"""What Fleetune's loop costs over a bare DeepSpeed loop: the same model, micro-batches and objective, in one process.

    python benchmarks/loop_overhead.py --out benchmarks/results/loop_overhead.json [--zero 2] [--layers 16]

The bare loop has its micro-batches on the device and calls engine.backward and engine.step, with DeepSpeed's own
clipping; ours also collates, measures, reduces the loss, takes the norm, reports each step and asks whether to save.
Rounds alternate; the figure is the median over rounds of ours / bare. Starts under any launcher that sets RANK.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import layouts
import torch
import torch.distributed as dist

from methods.registry import create
from trainer import zero
from trainer.attempt import claim_next
from trainer.base import load_model
from trainer.checkpoint import Checkpoints
from trainer.loop import Run, micro_batches, prefetch, prepare, take_step
from trainer.meter import Meter
from trainer.objectives import sft
from trainer.speed import flops_per_token, peak_flops

STEPS, ROUNDS, BATCH_TOKENS = 4, 9, 16384


def main() -> None:
    """Time both loops in turn and write the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        layouts.make_inputs(place, arguments.layers)
        steps = STEPS * (ROUNDS + 1)
        run_dir = layouts.make_run(place, "ours", arguments.method, arguments.zero, steps, BATCH_TOKENS)
        attempt = claim_next(run_dir, None)
        assert attempt is not None
        run, _ = prepare(attempt)
        ours, bare = Ours(run), Bare(run)
        ours(), bare()
        pairs = [(timed(run, ours), timed(run, bare)) for _ in range(ROUNDS)]
    ratios = [a / b for a, b in pairs]
    result: dict[str, Any] = {
        "commit": layouts.commit(),
        "device": layouts.device(),
        "workers": run.world.size,
        "zero": arguments.zero,
        "method": arguments.method,
        "seconds_per_step_bare": statistics.median(b for _, b in pairs) / STEPS,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    if run.world.leads:
        arguments.out.write_text(json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))
    dist.destroy_process_group()


def timed(run: Run, rounds: Any) -> float:
    """Seconds of one round, device included."""
    wait(run)
    began = time.perf_counter()
    rounds()
    wait(run)
    return time.perf_counter() - began


def wait(run: Run) -> None:
    """Wait for the device and for the other workers."""
    if run.world.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


class Ours:
    """Rounds of the loop that trains jobs."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = 0
        self.stream = prefetch(micro_batches(run, 0))
        self.saves = Checkpoints(run.attempt, run.world, 10**9, 1)
        peak = peak_flops(run.world.device, run.dtype)
        self.meter = Meter(run.attempt, run.world, run.batches.steps, flops_per_token(run.model), peak)

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.step += 1
            take_step(self.run, self.step, self.stream, self.meter, self.saves.overdue())


class Bare:
    """Rounds of DeepSpeed alone, on a model of its own and micro-batches that are on the device."""

    def __init__(self, run: Run) -> None:
        import deepspeed

        self.run = run
        method = create(run.job.method)
        model = load_model(run.job, method, run.dtype, run.world.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        config = zero.config(run.job.sharding.zero, sum(p.numel() for p in trained))
        config["zero_optimization"].pop("compute_grad_norm", None)
        config["gradient_clipping"] = 1.0
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        stream = micro_batches(run, 0)
        self.steps = [list(iter(lambda: next(stream), None)) for _ in range(STEPS)]

    def __call__(self) -> None:
        for k, step in enumerate(self.steps):
            total = self.run.batches.target_tokens(k)
            for batch in step:
                loss, _ = sft.loss(self.engine, batch)
                self.engine.backward(loss * self.run.world.size / total, scale_wrt_gas=False)
            self.engine.step()


if __name__ == "__main__":
    main()
