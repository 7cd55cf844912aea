"""What the support matrix measures: each method at each ZeRO stage, against one worker at ZeRO 0 (fp32).

A cell holds the largest relative difference that was found, over losses and gradient norms.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from methods.options import ALL
from trainer.attempt import load_job
from trainer.base import load_tokenizer
from trainer.export import results
from trainer.tokens import tokenise

KINDS = {options.model_fields["kind"].default: options for options in ALL}
# Small enough for a random model of two layers; every method refreshes, cuts or merges within the first 20 steps.
METHODS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS} | {
    "lora": {"kind": "lora", "rank": 4, "lr_ratio": 4.0},
    "rslora": {"kind": "rslora", "rank": 4},
    "dora": {"kind": "dora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
    "adalora": {"kind": "adalora", "rank": 2, "initial_rank": 4, "every": 3},
    "longlora": {"kind": "longlora", "rank": 4},
    "vera": {"kind": "vera", "rank": 8},
    "fourierft": {"kind": "fourierft", "frequencies": 50},
    "prefix": {"kind": "prefix", "tokens": 4},
    "prompt": {"kind": "prompt", "tokens": 4},
    "ptuning": {"kind": "ptuning", "tokens": 4, "hidden": 16},
    "bottleneck": {"kind": "bottleneck", "size": 4},
    "galore": {"kind": "galore", "rank": 4, "refresh_every": 7},
    "relora": {"kind": "relora", "rank": 4},
}
# What trains well without amplifying rounding. The weights of a 4-bit base repeat, so some gradients are zero but for
# rounding, of which AdamW makes steps at its usual eps (LoRA on the same weights in fp32 shows the same).
TRAIN: dict[str, dict[str, float]] = {kind: {"lr": 1e-2} for kind in KINDS} | {
    "lora": {"lr": 2.5e-3},
    "qlora": {"lr": 1e-2, "eps": 1e-6},
    **{kind: {"lr": 1e-3} for kind in ("full", "galore", "longlora", "relora", "ptuning")},
}
STAGES = (0, 1, 2, 3)
LIMITS = {"resume": 0.0, "reshard": 1e-5, "merge": 1e-5, "export": 1e-5}  # 1e-6 for the others

Rows = list[dict[str, float]]
Cells = dict[str, float]


@dataclass
class Campaign:
    """The runs of one method."""

    kind: str
    new_run: Any
    launch: Any
    cache: Path
    held_out: Path
    steps: int
    cells: dict[int, Cells] = field(default_factory=dict)

    def run(self, name: str, zero: int, micro: int, packing: bool) -> Path:
        """A run folder; unpacked and with 8 rows per pass a step takes one pass on each of two workers."""
        options = KINDS[self.kind]
        made: Path = self.new_run(
            f"{self.kind}-{name}",
            method=METHODS[self.kind],
            data={"eval": str(self.held_out), "packing": packing},
            train={"steps": self.steps, "micro_batch": micro, **TRAIN[self.kind]},
            sharding={"zero": zero},
            checkpoint={"every": self.steps // 2, "keep": 9},
            evaluation={"max_new_tokens": 0, "before": False},
            output={"merge": "merge" not in options.refusals},
        )
        return made

    def measure(self, stages: Iterable[int]) -> dict[int, Cells]:
        """All cells of these stages."""
        alone = {zero: self.run(f"alone-{zero}", zero, 16, False) for zero in {0, *stages}}
        pair = {zero: self.run(f"pair-{zero}", zero, 8, False) for zero in stages}
        small = {zero: self.run(f"small-{zero}", zero, 2, False) for zero in stages}
        packed = {zero: self.run(f"packed-{zero}", zero, 8, True) for zero in stages}
        self._train(1, alone.values())
        self._train(2, [*pair.values(), *small.values(), *packed.values()])
        again = {zero: interrupted(run, self.steps, zero) for zero, run in pair.items()}
        other = {zero: interrupted(run, self.steps, (zero + 2) % 4) for zero, run in pair.items()}
        self._train(2, again.values())
        self._train(1, other.values())
        truth = curve(alone[0], 1)
        for zero in stages:
            whole = curve(pair[zero], 1)
            self.cells[zero] = {
                "train": max(difference(whole, truth), difference(curve(alone[zero], 1), truth)),
                "accumulate": difference(curve(small[zero], 1), truth),
                "packed": difference(curve(packed[zero], 1), truth),
                "resume": difference(curve(again[zero], 2), whole[self.steps // 2 :]),
                "reshard": difference(curve(other[zero], 2), whole[self.steps // 2 :]),
                **self._outputs(pair[zero]),
            }
        return self.cells

    def _train(self, world: int, runs: Iterable[Path]) -> None:
        assert self.launch(world, *runs, timeout=1500) == [0] * world

    def _outputs(self, run: Path) -> Cells:
        options, output, said = KINDS[self.kind], run / "output", results(run)["eval_loss"]
        base = load_job(run).base.model
        found: Cells = {}
        if "export" not in options.refusals:
            found["export"] = abs(loss(reload(self.kind, base, output), run, self.cache) / said - 1)
        if "merge" not in options.refusals:
            merged = output if options.makes_model else output / "merged"
            found["merge"] = abs(loss(AutoModelForCausalLM.from_pretrained(merged), run, self.cache) / said - 1)
        return found


def interrupted(whole: Path, steps: int, zero: int) -> Path:
    """A copy of a run that looks as if it had died in the middle, to go on at a ZeRO stage."""
    copy = whole.with_name(f"{whole.name}-at-{zero}")
    shutil.copytree(whole, copy)
    for gone in ("attempts/2", f"attempts/1/checkpoints/step-{steps}", "output"):
        shutil.rmtree(copy / gone)
    (copy / "result.json").unlink()
    record = yaml.safe_load((copy / "job.yaml").read_text())
    record["job"]["sharding"] = {"zero": zero}
    (copy / "job.yaml").write_text(yaml.safe_dump(record))
    return copy


def curve(run: Path, attempt: int) -> Rows:
    """Loss and gradient norm of each step of an attempt."""
    lines = (run / "attempts" / str(attempt) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def difference(a: Rows, b: Rows) -> float:
    """The largest relative difference between two curves; raises where their steps differ."""
    pairs = list(zip(a, b, strict=True))
    assert pairs and all(x["step"] == y["step"] for x, y in pairs)
    return max(abs(x[key] - y[key]) / abs(y[key]) for x, y in pairs for key in ("loss", "grad_norm"))


def reload(kind: str, base: str, output: Path) -> torch.nn.Module:
    """What a user gets from plain PEFT or transformers."""
    from peft import PeftModel

    if KINDS[kind].makes_model:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(output)
        return model
    options: dict[str, Any] = {}
    if kind == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    if kind == "longlora":
        options["config"] = AutoConfig.from_pretrained(output)
    adapted: torch.nn.Module = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options), output
    )
    return adapted


def loss(model: torch.nn.Module, run_dir: Path, cache: Path) -> float:
    """The loss per target token over the evaluation rows, one example at a time."""
    job = load_job(run_dir)
    assert job.data.eval
    tokens = tokenise(job.data.eval, load_tokenizer(job.base), job.data.seq_len, cache)
    total = 0.0
    for i in range(len(tokens)):
        example = tokens.example(i)
        ids = torch.tensor(example.ids, dtype=torch.long)
        labels = ids.masked_fill(~torch.tensor(example.target), -100)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, -len(ids) : -1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
    return total / float(tokens.targets.sum())
