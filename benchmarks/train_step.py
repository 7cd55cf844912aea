"""One training step of an adapter: peers and Fleetune's own path, each as a share of what a frozen base allows.

    python benchmarks/train_step.py --out benchmarks/results/train-step.json
    python benchmarks/train_step.py --base meta-llama/Llama-3.2-1B --methods lora dora --rows floor fast --check full

All variants run on this machine in turn, each in a process of its own, with the same weights and the same batches:
random words, four rows of 2,048 tokens a step, without padding. `floor` is the frozen base with Liger's kernels
that computes the loss and the gradients of activations alone: no adapter can be faster. Peers train LoRA of the
same rank on all linear layers (`adamw-liger-compile`: all weights) with fused AdamW and no clipping. Those that are
not installed are left out. Figures are medians over the steps after the warm-up, by the device's own clock. `short`
and `padded` are documents of GSM8K's lengths, packed and one to a row; of them only what is not padding counts.

--offload adds a row with AdamW's moments on the host to each of Fleetune's own, --without-masters one with weights in
bf16 to those of `full`. What such a step takes hangs on its tokens:
`--methods full --rows fast --offload --without-masters --batch-tokens 65536`.

--check trains plain and fast from one start, and compares losses and gradients: in fp32 with each other, in bf16 both
with the plain path in fp32, which the fast one must be as near to.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import layouts
import llama_1b
import numpy as np
import yaml
from peers import PEERS, SEQ_LEN, TRAINED

ROWS = 4
WARMUP, STEPS = 8, 12
# What is not a method with its own defaults.
METHODS: dict[str, dict[str, Any]] = {"vera": {"rank": 256}, "relora-alone": {"kind": "relora", "others": False}}
CHECKED_STEPS = 5
WORDS = ["red", "blue", "cat", "dog", "one", "two", "three", "is", "in", "the", "box"]
OURS = ["plain", "fast"]
BATCH_TOKENS = {"full": ROWS * SEQ_LEN, "short": 4 * ROWS * SEQ_LEN, "padded": 4 * ROWS * SEQ_LEN}
# How much farther from the plain path in fp32 than the plain path in bf16, and from it in fp32.
AS_NEAR, EXACT = 1.5, 1e-5
LONGEST = 300  # seconds that a variant may take
# A fork has its parent's imports; but importing bitsandbytes starts the GPU, after which no fork can use it.
PROCESSES = multiprocessing.get_context("spawn" if find_spec("bitsandbytes") else "fork")

Figures = dict[str, Any]


def main() -> None:
    """Run the variants that were asked for, and write and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a model id or folder; default: random weights of Llama-3.2-1B's shape")
    parser.add_argument("--layers", type=int, default=llama_1b.SHAPE["num_hidden_layers"])
    parser.add_argument("--methods", nargs="+", default=["lora"], help="what Fleetune's own rows train")
    parser.add_argument("--rows", nargs="*", default=[*PEERS, *OURS], choices=[*PEERS, *OURS])
    parser.add_argument("--data", nargs="*", default=["full"], choices=BATCH_TOKENS)
    parser.add_argument("--check", nargs="*", default=[], choices=BATCH_TOKENS)
    parser.add_argument("--offload", action="store_true", help="Fleetune's own rows also with moments on the host")
    parser.add_argument("--without-masters", action="store_true", help="`full` also with weights in bf16 alone")
    parser.add_argument("--micro-batches", nargs="*", type=int, default=[], help="own rows also with so many at once")
    parser.add_argument("--checkpointing", action="store_true", help="own rows also with gradient checkpointing")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS["full"], help="of a step of full rows")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    preload()
    rows: list[Figures] = []
    checks: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder), arguments)
        for row in measured(inputs, arguments):
            rows.append(row)
            compare(rows)
            write(arguments, rows, checks)
        for check in checked(inputs, arguments):
            checks.append(check)
            write(arguments, rows, checks)
            print(json.dumps(check), flush=True)
    print(table(rows))
    if not all(check["holds"] for check in checks):
        sys.exit("the fast path differs from the plain one")


def preload() -> None:
    """Import what every variant needs, so that forks have it; nothing here may start the GPU."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if PROCESSES.get_start_method() != "fork":
        return
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import trainer.loop  # noqa: F401


class Inputs:
    """A base, rows of text, and the runs that are made of them."""

    def __init__(self, place: Path, arguments: argparse.Namespace) -> None:
        self.place = place
        self.batch_tokens = BATCH_TOKENS | {"full": arguments.batch_tokens}
        os.environ.setdefault("FLEETUNE_CACHE", str(place / "cache"))
        os.environ.setdefault("FLEETUNE_HOME", str(place / "home"))
        self.base = arguments.base or str(place / "base")
        if not arguments.base:
            forked(make_base, place / "base", arguments.layers)
        rng = random.Random(0)
        lengths = {"full": lambda: SEQ_LEN, "short": lambda: gsm8k_words(rng)}
        for name, length in lengths.items():
            texts = [" ".join(rng.choices(WORDS, k=length())) for _ in range(6000 if name == "short" else 300)]
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (place / f"{name}.jsonl").write_text("".join(lines))

    def run(self, method: str, kernels: str, data: str, offload: str = "none", **train: Any) -> Path:
        """A new run folder; `data` says of which rows, and whether they are packed."""
        rows = "full" if data == "full" else "short"
        options = METHODS.get(method, {})
        job = {
            "name": "step",
            "base": self.base,
            "method": {"kind": method, **options},
            "data": {
                "train": str(self.place / f"{rows}.jsonl"),
                "seq_len": SEQ_LEN,
                "too_long": "cut",
                "packing": data == "short",
            },
            "train": {
                "steps": WARMUP + STEPS,
                "batch_tokens": self.batch_tokens[data],
                "micro_batch": 32 if data == "padded" else ROWS,
                "precision": "bf16",
                "lr": 1e-4,
                "kernels": kernels,
                **train,
            },
            "sharding": {"offload": offload},
        }
        run_dir = Path(tempfile.mkdtemp(prefix=f"{method}-{kernels}-{data}-", dir=self.place))
        (run_dir / "job.yaml").write_text(yaml.safe_dump({"run_id": run_dir.name, "job": job}))
        return run_dir

    def batches(self) -> Iterator[np.ndarray]:
        """The token ids [B, T] of the full rows of each step, as Fleetune's own path has them."""
        from runfolder.folders import cache
        from runfolder.record import load_job
        from trainer.data.batches import Batches
        from trainer.data.encode import Reading
        from trainer.data.tokenizer import end_ids, load_tokenizer
        from trainer.objectives.base import ObjectiveSetup
        from trainer.objectives.registry import create_objective

        job = load_job(self.run("lora", "plain", "full"))
        tokenizer = load_tokenizer(job.base)
        reading = Reading.of(job, end_ids(tokenizer, job.base))
        setup = ObjectiveSetup(job, tokenizer, reading, cache(), lambda _: None)
        objective = create_objective(setup)
        examples = objective.read(job.data.train)
        batches = Batches.of(job, examples)
        for k in range(batches.steps):
            for micro in batches.layout.deal(batches.batch(k), 0, 1):
                yield objective.arrays(examples, micro)["input_ids"]


def gsm8k_words(rng: random.Random) -> int:
    """A number of words of which texts as long as GSM8K's rows become: 150 to 200 tokens as a rule, at most 600."""
    return min(600, int(rng.lognormvariate(4.55, 0.35)))


def make_base(folder: Path, layers: int) -> None:
    """Random weights in bf16 of Llama-3.2-1B's shape with so many layers, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = llama_1b.SHAPE | {"rope_theta": 500000.0, "num_hidden_layers": layers}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape, dtype=torch.bfloat16))
    model.bfloat16().save_pretrained(folder)
    for path in (layouts.ROOT / "examples" / "tiny").glob("token*"):
        shutil.copy(path, folder)


def measured(inputs: Inputs, arguments: argparse.Namespace) -> Iterator[Figures]:
    """The figures of each row on each kind of data; peers run on full rows alone."""
    for data, row in product(arguments.data, arguments.rows):
        if row in OURS:
            for method in arguments.methods:
                for words, settings in variants(arguments, method):
                    figures = forked(our_steps, inputs, method, row, data, settings)
                    yield told(row + words, data, method, figures)
        elif data == "full" and (row != "unsloth" or find_spec("unsloth")):
            yield told(row, data, TRAINED.get(row, "lora"), forked(peer_steps, inputs, row))


def variants(arguments: argparse.Namespace, method: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each of Fleetune's own rows is run with, in words and as settings of the run."""
    yield "", {}
    for count in arguments.micro_batches:
        yield f", micro-batch {count}", {"micro_batch": count}
    if arguments.checkpointing:
        yield ", checkpointed", {"gradient_checkpointing": True}
    if arguments.offload:
        yield ", moments on the host", {"offload": "optimizer"}
    if arguments.without_masters and method == "full":
        yield ", bf16 weights", {"master_weights": False}
        if arguments.offload:
            yield ", bf16 weights, moments on the host", {"master_weights": False, "offload": "optimizer"}


def told(row: str, data: str, method: str, figures: Figures) -> Figures:
    """The figures of a row with what they are of, printed too."""
    whole = {"row": row, "method": method, "data": data, **figures}
    print(json.dumps(whole), flush=True)
    return whole


def forked(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own; why it gave nothing, where it fails."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=serve, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LONGEST) else {"error": "it did not end"}
    except EOFError:
        return {"error": "its process died"}
    finally:
        process.kill()
        process.join()


def serve(answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Send what a function gives."""
    try:
        answers.send(work(*arguments))
    except Exception as error:
        traceback.print_exc()
        answers.send({"error": f"{type(error).__name__}: {error}"[:300]})


def our_steps(inputs: Inputs, method: str, kernels: str, data: str, settings: dict[str, Any]) -> Figures:
    """The steps of Fleetune's own loop."""
    from trainer.meter import SaveRequest
    from trainer.step import take_step

    began = time.monotonic()
    run_dir = inputs.run(method, kernels, data, **settings)
    with started(run_dir) as (run, micro_batches, meter):
        for step in range(1, WARMUP + STEPS + 1):
            take_step(run, step, micro_batches, meter, SaveRequest())
            if step == 1:
                meter.flush()
                first = time.monotonic() - began
        meter.flush()
    rows = layouts.metrics(run_dir, 1)[WARMUP:]
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
        "utilisation": statistics.median(row["mfu"] for row in rows),
        "peak_gib": rows[-1]["peak_memory_bytes"] / 2**30,
        "host_gib": host_gib(run),
        "seconds_to_first_step": round(first, 1),
        "kernels": run.objective.kernels.names,
        "problems": run.objective.kernels.problems,
    }


def host_gib(run: Any) -> float:
    """The GiB of moments that a run has on the host."""
    chunked = run.sharded.chunked
    return chunked.moments.nbytes / 2**30 if chunked and chunked.on_host else 0.0


@contextmanager
def started(run_dir: Path) -> Iterator[Any]:
    """A run under its engine, the feed of its micro-batches, and its meter."""
    import torch
    import torch.distributed as dist

    from runfolder.chain import claim_next
    from trainer.meter import Meter
    from trainer.prepare import prepare_run
    from trainer.speed import flops_per_token, peak_flops
    from trainer.step import feed

    attempt = claim_next(run_dir, None)
    assert attempt is not None
    run, _ = prepare_run(attempt)
    torch.cuda.reset_peak_memory_stats()
    peak = peak_flops(run.world.device, run.dtype)
    meter = Meter(attempt, run.world, run.batches.steps, flops_per_token(run.model), peak)
    try:
        yield run, feed(run, 0), meter
    finally:
        dist.destroy_process_group()


def peer_steps(inputs: Inputs, row: str) -> Figures:
    """The steps of a peer in a bare loop over the same batches."""
    import torch

    batches = [torch.from_numpy(ids).cuda() for ids in inputs.batches()]
    model = PEERS[row](inputs.base)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(batches) + 1)]
    events[0].record()
    torch.cuda.reset_peak_memory_stats()
    for number, ids in enumerate(batches):
        with torch.autocast("cuda", torch.bfloat16, enabled=model.dtype == torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        events[number + 1].record()
    torch.cuda.synchronize()
    pairs = zip(events[WARMUP:-1], events[WARMUP + 1 :], strict=True)
    seconds = statistics.median(first.elapsed_time(second) for first, second in pairs) / 1000
    return {"tokens_per_second": batches[0].numel() / seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def checked(inputs: Inputs, arguments: argparse.Namespace) -> Iterator[Figures]:
    """How far fast is from plain: in fp32 from each other, in bf16 how far each is from the plain path in fp32."""
    for data, method in product(arguments.check, arguments.methods):
        found = {}
        for precision, kernels in product(("fp32", "bf16"), OURS):
            found[precision, kernels] = forked(checked_steps, inputs, method, kernels, data, precision)
        failed = [answer["error"] for answer in found.values() if "error" in answer]
        if failed:
            yield {"method": method, "data": data, "error": failed[0], "holds": False}
            continue
        truth = found["fp32", "plain"]
        for kind in ("losses", "gradients"):
            exact = apart(found["fp32", "fast"][kind], truth[kind])
            plain = apart(found["bf16", "plain"][kind], truth[kind])
            fast = apart(found["bf16", "fast"][kind], truth[kind])
            holds = exact <= EXACT and fast <= AS_NEAR * plain
            figures = {"fp32": exact, "bf16 plain": plain, "bf16 fast": fast, "holds": holds}
            yield {"method": method, "data": data, "of": kind, **figures}


def apart(found: list[Any], truth: list[Any]) -> float:
    """The largest relative distance of a step's values, as vectors."""
    distances = []
    for value, true in zip(found, truth, strict=True):
        value, true = np.asarray(value, np.float64), np.asarray(true, np.float64)
        distances.append(float(np.linalg.norm(value - true) / np.linalg.norm(true)))
    return max(distances)


def checked_steps(inputs: Inputs, method: str, kernels: str, data: str, precision: str) -> Figures:
    """The loss of each step, and the clipped gradients of its trained weights."""
    from trainer.meter import SaveRequest
    from trainer.step import take_step

    train = {"precision": precision, "steps": CHECKED_STEPS, "batch_tokens": inputs.batch_tokens["full"]}
    run_dir = inputs.run(method, kernels, data, **train)
    gradients = []
    with started(run_dir) as (run, micro_batches, meter):
        before = run.method.before_step

        def keep(view: Any) -> None:
            flat = [fragment.parameter.grad.view(-1).cpu().numpy() for fragment in view.fragments()]
            gradients.append(np.concatenate(flat))
            before(view)

        run.method.before_step = keep
        for step in range(1, CHECKED_STEPS + 1):
            take_step(run, step, micro_batches, meter, SaveRequest())
        meter.flush()
    return {"losses": [row["loss"] for row in layouts.metrics(run_dir, 1)], "gradients": gradients}


def compare(rows: list[Figures]) -> None:
    """Say of each row what share of the floor it is, once there is one."""
    floors = [row.get("tokens_per_second") for row in rows if row["row"] == "floor"]
    for row in rows:
        if floors and floors[0] and "tokens_per_second" in row:
            row["of_floor"] = row["tokens_per_second"] / floors[0]


def write(arguments: argparse.Namespace, rows: list[Figures], checks: list[Figures]) -> None:
    """Write the figures so far, with what they were measured on, where they are to be kept."""
    if not arguments.out:
        return
    names = ["torch", "triton", "transformers", "peft", "deepspeed", "liger-kernel", "unsloth"]
    result = {
        "commit": os.environ.get("FLEETUNE_COMMIT") or layouts.commit(),
        "device": forked(layouts.device),
        "versions": {name: found for name in names if (found := installed(name))},
        "base": arguments.base or f"Llama-3.2-1B's shape, {arguments.layers} layers, random",
        "batch_tokens": BATCH_TOKENS | {"full": arguments.batch_tokens},
        "rows": rows,
        "checks": checks,
    }
    arguments.out.write_text(json.dumps(result, indent=1))


def installed(name: str) -> str | None:
    """The version of a package; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(rows: list[Figures]) -> str:
    """The figures as Markdown."""
    lines = ["| row | method | data | tokens/s | of floor | peak GiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['row']} | {row['method']} | {row['data']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']} | | |")
            continue
        share = f"{row['of_floor']:.2f}" if "of_floor" in row else ""
        lines.append(f"{start} {row['tokens_per_second']:,.0f} | {share} | {row['peak_gib']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
