"""Steps on preferences beside supervised ones on the same documents, and beside TRL: tokens a second, and the peak.

    python benchmarks/preferences.py --out benchmarks/results/preferences.json
    python benchmarks/preferences.py --base meta-llama/Llama-3.2-1B --methods lora dora --rows sft dpo trl --data hh
    python benchmarks/preferences.py --layers 2 --rows sft dpo reward     (without a GPU: a tiny base, in fp32)
    python benchmarks/preferences.py --rows grpo grpo-fp32 --out benchmarks/results/grpo.json
    python benchmarks/preferences.py --layers 2 --rows grpo --prompts 4 --samples 4 --new-tokens 16

All rows run on this machine in turn, each in a process of its own, with the same weights and the same answers. `sft`
learns both answers of each pair as rows of their own, so it computes what an objective on pairs does; the rows that
end on `shared` compute a pair's prompt once, and their tokens are counted as if they did not. What the policy
gave before the first step is computed before, and its seconds are told apart. `hh` are pairs of HH-RLHF's lengths (or
those of --pairs), `full` are documents of 2,048 tokens. Of padding nothing counts. Figures are medians over the
steps after the warm-up. `trl` is TRL's DPO with PEFT's LoRA of the same rank, its reference computed before too, and
is left out where TRL is not installed. `grpo` learns from answers that the model itself writes, and has figures of
its own (grpo_step.py): 64 prompts a step, 8 answers of 256 tokens to each, in bf16 on a GPU; `grpo-fp32` the same in
fp32, where engine and trainer are as near as they get.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from typing import Any

import grpo_step
import layouts
import llama_1b
import yaml
from peers import RANK, SEQ_LEN
from train_step import METHODS, WORDS, Figures, forked, installed

WARMUP, STEPS = 8, 12
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft"},
    "dpo": {"kind": "dpo"},
    "dpo-shared": {"kind": "dpo", "share_prompts": True},
    "simpo": {"kind": "simpo"},
    "orpo": {"kind": "orpo"},
    "kto": {"kind": "kto"},
    "reward": {"kind": "reward"},
    "reward-shared": {"kind": "reward", "share_prompts": True},
}
GENERATING = {"grpo": "bf16", "grpo-fp32": "fp32"}
DEFAULT_ROWS = ["sft", "dpo", "dpo-shared", "reward", "trl"]
LENGTHS = {"hh": (4.5, 0.9, 3.4, 0.9), "full": (7.2, 0.05, 5.9, 0.05)}  # of the words of prompts and of replies
ON_CPU = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def main() -> None:
    """Run the rows that were asked for, and write and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a model id or folder; default: random weights of Llama-3.2-1B's shape")
    parser.add_argument("--layers", type=int, default=llama_1b.SHAPE["num_hidden_layers"])
    parser.add_argument("--methods", nargs="+", default=["lora"], help="what Fleetune's own rows train")
    parser.add_argument("--rows", nargs="*", default=DEFAULT_ROWS, choices=[*OBJECTIVES, *GENERATING, "trl"])
    parser.add_argument("--data", nargs="*", default=["hh"], choices=LENGTHS)
    parser.add_argument("--pairs", type=Path, help="a .jsonl of pairs in the place of those that are made up for hh")
    parser.add_argument("--batch-tokens", type=int, help="of a step; default: 32,768, without a GPU 4,096")
    parser.add_argument("--prompts", type=int, default=64, help="of a step of the rows that generate")
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt there")
    parser.add_argument("--new-tokens", type=int, default=256, help="of each answer there")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    gpu = forked(has_gpu) is True
    if arguments.batch_tokens is None:
        arguments.batch_tokens = 32768 if gpu else 4096
    rows: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder), arguments, gpu)
        for row in measured(inputs, arguments):
            rows.append(row)
            compare(rows)
            print(json.dumps(row), flush=True)
            write(arguments, rows)
    generating = [row for row in rows if row["row"] in GENERATING]
    if others := [row for row in rows if row not in generating]:
        print(table(others))
    if generating:
        print(grpo_step.grpo_table(generating))


def has_gpu() -> bool:
    """Whether there is a GPU; asked in a process of its own, as a fork must not inherit one that is in use."""
    import torch

    return torch.cuda.is_available()


class Inputs:
    """A base, pairs, and the runs that are made of them."""

    def __init__(self, place: Path, arguments: argparse.Namespace, gpu: bool) -> None:
        self.place = place
        self.gpu = gpu
        self.batch_tokens = arguments.batch_tokens
        os.environ.setdefault("FLEETUNE_CACHE", str(place / "cache"))
        os.environ.setdefault("FLEETUNE_HOME", str(place / "home"))
        self.base = arguments.base or str(place / "base")
        if not arguments.base:
            forked(make_base, place / "base", arguments.layers, gpu)
        self.pairs: dict[str, list[dict[str, str]]] = {}
        for data in arguments.data:
            pairs = list(made_up(data, pairs_needed(data, arguments.batch_tokens)))
            if data == "hh" and arguments.pairs:
                pairs = list(read(arguments.pairs))
            self.pairs[data] = pairs
            self._write(data, pairs)

    def run(self, method: str, row: str, data: str) -> Path:
        """A new run folder of one row."""
        job = {
            "name": "step",
            "base": self.base,
            "objective": OBJECTIVES[row],
            "method": {"kind": method, **METHODS.get(method, {})},
            "data": {"train": str(self._file(data, row)), "seq_len": SEQ_LEN, "too_long": "cut"},
            "train": {
                "steps": WARMUP + STEPS,
                "batch_tokens": self.batch_tokens,
                "micro_batch": 4,
                "precision": "bf16" if self.gpu else "fp32",
                "lr": 1e-6,
            },
        }
        run_dir = Path(tempfile.mkdtemp(prefix=f"{method}-{row}-{data}-", dir=self.place))
        (run_dir / "job.yaml").write_text(yaml.safe_dump({"run_id": run_dir.name, "job": job}))
        return run_dir

    def _file(self, data: str, row: str) -> Path:
        shape = {"sft": "answers", "kto": "judged"}.get(row, "pairs")
        return self.place / f"{data}-{shape}.jsonl"

    def _write(self, data: str, pairs: list[dict[str, str]]) -> None:
        """The same answers in the three shapes of rows."""
        answers, judged = [], []
        for pair in pairs:
            for side, liked in (("chosen", True), ("rejected", False)):
                answer = {"prompt": pair["prompt"], "completion": pair[side]}
                answers.append(answer)
                judged.append(answer | {"label": liked})
        for shape, rows in (("pairs", pairs), ("answers", answers), ("judged", judged)):
            lines = [json.dumps(row) + "\n" for row in rows]
            (self.place / f"{data}-{shape}.jsonl").write_text("".join(lines))


def pairs_needed(data: str, batch_tokens: int) -> int:
    """Pairs for all steps, so that no document comes twice."""
    words = 2048 if data == "full" else 150
    return 2 * (WARMUP + STEPS) * batch_tokens // (2 * words) + 8


def made_up(data: str, count: int) -> Iterator[dict[str, str]]:
    """Pairs of random words, whose lengths are log-normal."""
    rng = random.Random(0)
    prompt, prompt_spread, reply, reply_spread = LENGTHS[data]

    def words(mean: float, spread: float) -> str:
        number = min(1600, 2 + int(rng.lognormvariate(mean, spread)))
        return " ".join(rng.choices(WORDS, k=number))

    for _ in range(count):
        asked = words(prompt, prompt_spread)
        yield {
            "prompt": asked,
            "chosen": " " + words(reply, reply_spread),
            "rejected": " " + words(reply, reply_spread),
        }


def read(path: Path) -> Iterator[dict[str, str]]:
    """The pairs of a file as plain texts, those that teach something."""
    from trainer.data.preferences import read_pairs

    for pair in read_pairs(path):
        if pair.left_out is None:
            chosen, rejected = pair.answers
            yield {"prompt": chosen.prompt, "chosen": chosen.completion, "rejected": rejected.completion}


def make_base(folder: Path, layers: int, gpu: bool) -> None:
    """Random weights of Llama-3.2-1B's shape with so many layers, without a GPU tiny ones; and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = llama_1b.SHAPE | {"rope_theta": 500000.0, "num_hidden_layers": layers}
    tokenizer = layouts.ROOT / "examples" / "tiny"
    if not gpu:
        shape |= ON_CPU | {"vocab_size": len(AutoTokenizer.from_pretrained(tokenizer))}
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    if gpu:
        model = model.bfloat16()
    model.save_pretrained(folder)
    for path in tokenizer.glob("token*"):
        shutil.copy(path, folder)


def measured(inputs: Inputs, arguments: argparse.Namespace) -> Iterator[Figures]:
    """The figures of each row on each kind of data."""
    size = grpo_step.Size(arguments.prompts, arguments.samples, arguments.new_tokens)
    for row, method in product(arguments.rows, arguments.methods):
        if row in GENERATING:
            figures = forked(generating_steps, inputs, method, row, size)
            yield {"row": row, "method": method, **dataclasses.asdict(size), **figures}
    for data, row in product(arguments.data, arguments.rows):
        if row in OBJECTIVES:
            for method in arguments.methods:
                figures = forked(our_steps, inputs, method, row, data)
                yield {"row": row, "method": method, "data": data, **figures}
        elif row == "trl" and find_spec("trl"):
            figures = forked(trl_steps, inputs, data)
            yield {"row": row, "method": "lora", "data": data, **figures}


def our_steps(inputs: Inputs, method: str, row: str, data: str) -> Figures:
    """The steps of Fleetune's own loop."""
    from trainer.meter import SaveRequest
    from trainer.step import take_step

    run_dir = inputs.run(method, row, data)
    with started(run_dir) as (run, micro_batches, meter, reference_s):
        for step in range(1, WARMUP + STEPS + 1):
            take_step(run, step, micro_batches, meter, SaveRequest())
        meter.flush()
        pairs = [len(run.batches.batch(k).chosen) for k in range(WARMUP, WARMUP + STEPS)]
    rows = layouts.metrics(run_dir, 1)[WARMUP:]
    tokens = [row["tokens_per_second"] for row in rows]
    return {
        "tokens_per_second": statistics.median(tokens),
        "examples_per_step": statistics.median(pairs),
        "peak_gib": rows[-1]["peak_memory_bytes"] / 2**30,
        "reference_s": round(reference_s, 2),
        "loss": rows[-1]["loss"],
        "kernels": run.objective.kernels.names,
        "problems": run.objective.kernels.problems,
    }


def generating_steps(inputs: Inputs, method: str, row: str, size: grpo_step.Size) -> Figures:
    """The steps of a run that learns from answers of its own."""
    options = {"kind": method, **METHODS.get(method, {})}
    precision = GENERATING[row] if inputs.gpu else "fp32"
    run_dir = grpo_step.grpo_run(inputs.place, inputs.base, options, size, precision)
    return grpo_step.grpo_steps(run_dir, started)


@contextmanager
def started(run_dir: Path) -> Iterator[Any]:
    """A run under its engine, the feed of its micro-batches, its meter, and the seconds that its reference took."""
    import torch
    import torch.distributed as dist

    from runfolder.chain import claim_next
    from trainer.loop import create_meter, prepare_run
    from trainer.reference import know_reference
    from trainer.step import feed

    attempt = claim_next(run_dir, None)
    assert attempt is not None
    run, _ = prepare_run(attempt)
    began = time.monotonic()
    know_reference(run, run.examples, run.batches.all_examples())
    took = time.monotonic() - began
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield run, feed(run, 0), create_meter(run), took
    finally:
        dist.destroy_process_group()


def trl_steps(inputs: Inputs, data: str) -> Figures:
    """The steps of TRL's DPO: the same pairs in their order, as many in a step as ours has at about."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(inputs.base)
    counts = [pair_tokens(tokenizer, pair) for pair in islice(inputs.pairs[data], 200)]
    pairs = max(4, round(inputs.batch_tokens / statistics.mean(counts)))
    at_once = 4
    accumulated = max(1, pairs // at_once)
    a_step = at_once * accumulated
    needed = (WARMUP + STEPS) * a_step
    args = DPOConfig(
        output_dir=str(inputs.place / "trl"),
        bf16=inputs.gpu,
        use_cpu=not inputs.gpu,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=SEQ_LEN,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulated,
        max_steps=WARMUP + STEPS,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
    )
    dtype = torch.bfloat16 if inputs.gpu else torch.float32
    clock = step_clock()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(inputs.base, dtype=dtype),
        args=args,
        train_dataset=Dataset.from_list(inputs.pairs[data][:needed]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    rates = []
    for number, seconds in enumerate(clock.seconds):
        of_step = inputs.pairs[data][number * a_step : (number + 1) * a_step]
        tokens = sum(pair_tokens(tokenizer, pair) for pair in of_step)
        rates.append(tokens / seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if inputs.gpu else float("nan")
    return {"tokens_per_second": statistics.median(rates[WARMUP:]), "examples_per_step": a_step, "peak_gib": peak}


def pair_tokens(tokenizer: Any, pair: dict[str, str]) -> int:
    """The tokens of both documents of a pair, each with its end."""
    documents = [pair["prompt"] + pair[side] for side in ("chosen", "rejected")]
    return sum(min(SEQ_LEN, len(ids) + 1) for ids in tokenizer(documents)["input_ids"])


def step_clock() -> Any:
    """A callback of transformers' trainer that takes the time of each step."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        """The `seconds` that each step took, by the device's own clock."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.monotonic()

        def on_step_begin(self, *_arguments: Any, **_keywords: Any) -> None:
            if not self.seconds and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.began = self.now()

        def on_step_end(self, *_arguments: Any, **_keywords: Any) -> None:
            self.seconds.append(self.now() - self.began)

    return StepClock()


def compare(rows: list[Figures]) -> None:
    """Say of each row what share of the supervised one it is, in speed and in memory, once there is one."""
    compared = [row for row in rows if row["row"] not in GENERATING]
    supervised = {(row["method"], row["data"]): row for row in compared if row["row"] == "sft" and "error" not in row}
    for row in compared:
        beside = supervised.get((row["method"], row["data"]))
        if beside and "error" not in row:
            row["of_sft"] = row["tokens_per_second"] / beside["tokens_per_second"]
            row["peak_of_sft"] = row["peak_gib"] / beside["peak_gib"]


def write(arguments: argparse.Namespace, rows: list[Figures]) -> None:
    """Write the figures so far, with what they were measured on, where they are to be kept."""
    if not arguments.out:
        return
    names = ["torch", "triton", "transformers", "peft", "deepspeed", "trl"]
    result = {
        "commit": os.environ.get("FLEETUNE_COMMIT") or layouts.commit(),
        "device": forked(layouts.device),
        "versions": {name: found for name in names if (found := installed(name))},
        "base": arguments.base or f"Llama-3.2-1B's shape, {arguments.layers} layers, random",
        "batch_tokens": arguments.batch_tokens,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1))


def table(rows: list[Figures]) -> str:
    """The figures as Markdown."""
    lines = ["| row | method | data | tokens/s | of sft | peak GiB | of sft |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['row']} | {row['method']} | {row['data']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']} | | | |")
            continue
        share = f"{row['of_sft']:.3f}" if "of_sft" in row else ""
        peak = f"{row['peak_of_sft']:.3f}" if "peak_of_sft" in row else ""
        lines.append(f"{start} {row['tokens_per_second']:,.0f} | {share} | {row['peak_gib']:.2f} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
