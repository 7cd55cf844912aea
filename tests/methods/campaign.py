"""What the support matrix measures: each method at each ZeRO stage, against one worker at ZeRO 0 (fp32).

A cell holds the largest relative difference that was found, over losses and gradient norms: of 20 steps, and of all
50 steps a tenth of it, as so much more is allowed there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finished_runs import Curve, curve, difference, events, interrupted, loss_gap
from transformers import AutoConfig, AutoModelForCausalLM

from methods.options import KINDS
from methods.options.lora_family import LowRankOptions
from methods.parts import quantised
from runfolder.chain import last_attempt
from runfolder.record import load_job
from trainer.omissions import omissions

# Small enough for a random model of two layers; each refreshes, cuts or merges within the first 20 steps and after.
LORA_FAMILY = [kind for kind, options in KINDS.items() if issubclass(options, LowRankOptions)]
METHODS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS}
METHODS |= {kind: {"kind": kind, "rank": 4} for kind in LORA_FAMILY}
METHODS |= {
    "lora": {"kind": "lora", "rank": 4, "lr_ratio": 4.0},
    "qlora": {"kind": "qlora", "rank": 4, "init": "loftq"},  # the start whose merge is exact
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
TRAIN: dict[str, dict[str, float]] = {kind: {"lr": 1e-2} for kind in KINDS}
TRAIN |= {kind: {"lr": 2.5e-3} for kind in LORA_FAMILY}
TRAIN |= {
    "qlora": {"lr": 2.5e-3, "eps": 1e-6},
    "dora": {"lr": 1e-2},
    "fourierft": {"lr": 2.5e-3},
    **{kind: {"lr": 1e-3} for kind in ("full", "galore", "longlora", "relora", "ptuning")},
}
STAGES, STEPS, FIRST = (0, 1, 2, 3), 50, 20
LIMITS = {"resume": 0.0, "reshard": 1e-5, "merge": 1e-5, "export": 1e-5}  # 1e-6 for the others

Cells = dict[str, float]


@dataclass(frozen=True)
class Campaign:
    """Runs of all methods."""

    new_run: Any
    launch: Any
    cache: Path
    held_out: Path

    def run(self, kind: str, name: str, zero: int, micro: int, packing: bool) -> Path:
        """A run folder; unpacked and with 8 rows per pass a step takes one pass on each of two workers."""
        made: Path = self.new_run(
            f"{kind}-{name}-{zero}",
            method=METHODS[kind],
            data={"eval": str(self.held_out), "packing": packing},
            train={"steps": STEPS, "micro_batch": micro, **TRAIN[kind]},
            sharding={"zero": zero},
            checkpoint={"every": STEPS // 2, "keep": 9},
            evaluation={"max_new_tokens": 0, "before": False},
            output={"merge": merges(kind)},
        )
        return made

    def measure(self, kinds: Iterable[str] = METHODS) -> dict[str, dict[int, Cells]]:
        """All cells of methods, by ZeRO stage."""
        each = [(kind, zero) for kind in kinds for zero in STAGES]
        alone = {(kind, zero): self.run(kind, "alone", zero, 16, False) for kind, zero in each}
        parts = {(kind, zero): self.run(kind, "parts", zero, 4, False) for kind, zero in each}
        pair = {(kind, zero): self.run(kind, "pair", zero, 8, False) for kind, zero in each}
        small = {(kind, zero): self.run(kind, "small", zero, 2, False) for kind, zero in each}
        packed = {(kind, zero): self.run(kind, "packed", zero, 8, True) for kind, zero in each}
        self.launch(1, *alone.values(), *parts.values())
        self.launch(2, *pair.values(), *small.values(), *packed.values())
        again = {key: interrupted(run, f"{run.name}-again", STEPS // 2) for key, run in pair.items()}
        other = {key: elsewhere(run, (key[1] + 2) % 4) for key, run in pair.items()}
        self.launch(2, *again.values())
        self.launch(1, *other.values())
        cells: dict[str, dict[int, Cells]] = {kind: {} for kind, _ in each}
        for kind, zero in each:
            truth, whole = curve(alone[kind, 0]), curve(pair[kind, zero])
            cells[kind][zero] = {
                "train": max(apart(whole, truth), apart(curve(alone[kind, zero]), truth)),
                "accumulate": max(apart(curve(run[kind, zero]), truth) for run in (small, parts)),
                "packed": apart(curve(packed[kind, zero]), truth),
                "resume": difference(curve(again[kind, zero], 2), whole[STEPS // 2 :]),
                "reshard": difference(curve(other[kind, zero], 2), whole[STEPS // 2 :]),
                **output_gaps(kind, pair[kind, zero], self.cache),
            }
        return cells


def output_gaps(kind: str, run: Path, cache: Path) -> Cells:
    """How far the loss of a run's output is from the trainer's, as an adapter or a model, and merged."""
    options, output = KINDS[kind], run / "output"
    found: Cells = {}
    if "export" not in options.refusals:
        found["export"] = loss_gap(reload(kind, load_job(run).base.model, output), run, cache)
    if merges(kind):
        found["merge"] = loss_gap(plain(output if options.makes_model else output / "merged"), run, cache)
    return found


def merges(kind: str) -> bool:
    """Whether a run of a method can leave a merged model."""
    return "merge" not in KINDS[kind].refusals


def assert_output_passed(kind: str, run: Path) -> None:
    """The check at the end of a run compared all of its output, also the merged model, and found nothing missing."""
    compared = [event for event in events(run) if event["event"] == "compared"]
    has_both = merges(kind) and not KINDS[kind].makes_model
    assert len(compared) == (2 if has_both else 1), run.name
    assert all(event["gap"] <= event["allowed"] for event in compared), (run.name, compared)
    assert omissions(last_attempt(run)) == [], run.name


def apart(found: Curve, truth: Curve) -> float:
    """How far two curves are apart, as a cell has it."""
    return max(difference(found[:FIRST], truth[:FIRST]), difference(found, truth) / 10)


def elsewhere(run: Path, zero: int) -> Path:
    """The second half of a run at another ZeRO stage."""
    return interrupted(run, f"{run.name}-at-{zero}", STEPS // 2, sharding={"zero": zero})


def plain(folder: Path) -> torch.nn.Module:
    """A model as transformers loads it."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def reload(kind: str, base: str, output: Path) -> torch.nn.Module:
    """What a user gets from plain PEFT or transformers."""
    from peft import PeftModel

    if KINDS[kind].makes_model:
        return plain(output)
    options: dict[str, Any] = {}
    if kind == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    if kind == "longlora":
        options["config"] = AutoConfig.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    for _, layer in quantised.four_bit_layers(model):
        # In evaluation bitsandbytes computes in bf16 on some CPUs, and fails there for layers as narrow as these.
        layer.support_avx512bf16_for_cpu = False
    adapted: torch.nn.Module = PeftModel.from_pretrained(model, output)
    return adapted
