"""What Fleetune's loop costs over a bare DeepSpeed loop: the same model, micro-batches and objective, in one process.

    python benchmarks/loop_overhead.py --out benchmarks/results/loop_overhead.json [--zero 2] [--layers 16]

The bare loop has its micro-batches on the device and calls engine.backward and engine.step, with DeepSpeed's own
clipping; ours also collates, measures, reduces the loss, takes the norm, reports each step and asks whether to save.
In each round both take the same steps, in turns who is first (who comes second finds its sizes in the allocator's
cache); the figure is the median over rounds of ours / bare. Starts under any launcher that sets RANK.
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

from methods.base import Setup
from methods.registry import create
from runfolder.chain import claim_next
from trainer.base import load_model
from trainer.checkpoint.saving import CheckpointWriter
from trainer.meter import Meter, SaveRequest
from trainer.objectives.base import Totals
from trainer.prepare import prepare_run
from trainer.run import Run
from trainer.speed import flops_per_token, peak_flops
from trainer.step import BatchTensors, feed, micro_batches, take_step
from trainer.zero import gather
from trainer.zero.engine import config as deepspeed_config

STEPS, ROUNDS, BATCH_TOKENS = 4, 9, 32768


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
        steps = STEPS * (ROUNDS + 2)
        run_dir = layouts.make_run(place, "ours", arguments.method, arguments.zero, steps, BATCH_TOKENS)
        attempt = claim_next(run_dir, None)
        assert attempt is not None
        run, _ = prepare_run(attempt)
        ours, bare = Ours(run), Bare(run)
        pairs = [round_(run, ours, bare, number % 2 == 0) for number in range(ROUNDS + 2)][2:]
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


def round_(run: Run, ours: "Ours", bare: "Bare", ours_first: bool) -> tuple[float, float]:
    """Seconds of ours and of the bare loop over the next steps."""
    bare.load()
    first, second = (ours, bare) if ours_first else (bare, ours)
    seconds = timed(run, first), timed(run, second)
    return seconds if ours_first else seconds[::-1]


def timed(run: Run, loop: "Ours | Bare") -> float:
    """Seconds of a loop's next steps, device included."""
    wait(run)
    began = time.perf_counter()
    loop()
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
        self.feed = feed(run, 0)
        self.saves = CheckpointWriter(run.attempt, run.world, 10**9, 1)
        peak = peak_flops(run.world.device, run.dtype)
        self.meter = Meter(run.attempt, run.world, run.batches.steps, flops_per_token(run.model), peak)

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.step += 1
            take_step(self.run, self.step, self.feed, self.meter, SaveRequest(self.saves.overdue()))


class Bare:
    """Rounds of DeepSpeed alone, on a model of its own and micro-batches that are on the device."""

    def __init__(self, run: Run) -> None:
        import deepspeed

        self.run = run
        method = create(run.job.method, Setup(gather=gather))
        model = load_model(run.job, method, run.dtype, run.world.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        config = deepspeed_config(run.job.sharding.zero, sum(p.numel() for p in trained))
        config["zero_optimization"].pop("compute_grad_norm", None)
        config["gradient_clipping"] = 1.0
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.steps: list[tuple[Totals, list[BatchTensors]]] = []
        self.done = 0

    def load(self) -> None:
        """Put the next steps' micro-batches on the device."""
        batches = [self.run.batches.batch(k) for k in range(self.done, self.done + STEPS)]
        self.steps = [(self.run.objective.totals(batch), list(micro_batches(self.run, batch))) for batch in batches]
        self.done += STEPS

    def __call__(self) -> None:
        for totals, passes in self.steps:
            for batch in passes:
                loss = self.run.objective.loss(self.engine, batch, totals, {}).loss
                self.engine.backward(loss * self.run.world.size, scale_wrt_gas=False)
            self.engine.step()


if __name__ == "__main__":
    main()
