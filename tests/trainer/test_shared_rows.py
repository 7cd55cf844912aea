"""Rows that two workers share (sharding.sequence: 2) are trained on as one worker does, in fp32."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from campaign import METHODS, STAGES, TRAIN, assert_output_passed, merges
from finished_runs import curve, difference, interrupted
from llamas import LLAMA_1B, TWO_LAYERS
from ports import free_port
from pydantic import ValidationError
from sampling import SEED, sampled

from methods.options.base import check_heads
from runfolder.job import Job
from trainer.data.parts import part_of_rows
from trainer.dry_run.forecast import Forecaster

TOLERANCE = 1e-6  # as over all other layouts
STEPS, HALF = 6, 3
FEW = 1  # methods in `make test`


class Layout(NamedTuple):
    """How a job is laid out."""

    sequence: int
    zero: int = 0
    packing: bool = False


ALONE = Layout(1)


def layouts_of(kinds: list[str]) -> Iterator[tuple[str, Layout]]:
    """Each method at every ZeRO stage, packed and not; few of them at one stage each."""
    rng = random.Random(SEED)
    for kind in kinds:
        every = [Layout(2, zero, packing) for zero in STAGES for packing in (False, True)]
        yield from ((kind, layout) for layout in (rng.sample(every, 1) if len(kinds) == FEW else every))


@pytest.fixture
def make(new_run: Any, held_out: Path) -> Any:
    """Make a run of a method in a layout; keyword arguments replace parts of its job."""

    def of(kind: str, layout: Layout, name: str = "", **parts: Any) -> Path:
        job: dict[str, Any] = {
            "method": METHODS[kind],
            "data": {"packing": layout.packing, "eval": str(held_out)},
            "train": {"steps": STEPS, **TRAIN[kind]},
            "sharding": {"zero": layout.zero, "sequence": layout.sequence},
            "resources": {"workers_per_node": layout.sequence},
            "checkpoint": {"every": HALF, "keep": 9},
            "evaluation": {"max_new_tokens": 4, "before": False, "rows": 12},
        }
        for key, value in parts.items():
            job[key] = job.get(key, {}) | value
        made: Path = new_run(f"{kind}{name}-{layout.sequence}-{layout.zero}-{layout.packing}", **job)
        return made

    return of


def evaluated(run_dir: Path, attempt: int) -> dict[str, float]:
    """What the last evaluation of an attempt said."""
    lines = (run_dir / "attempts" / str(attempt) / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "eval_loss" in row][-1]
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def assert_same(shared: Path, alone: Path, attempt: int = 1) -> None:
    """The steps of an attempt and what it was evaluated to are those of one worker."""
    found = curve(shared, attempt)
    assert difference(found, curve(alone)[-len(found) :]) < TOLERANCE, shared.name
    assert evaluated(shared, attempt) == pytest.approx(evaluated(alone, 1), rel=TOLERANCE, abs=1e-6), shared.name


@pytest.mark.parametrize("kinds", sampled(list(METHODS), FEW))
@pytest.mark.timeout(3600)
def test_every_method_is_the_same(kinds: list[str], make: Any, launch: Any) -> None:
    alone = {kind: make(kind, ALONE) for kind in kinds}
    shared = {key: make(*key, output={"merge": merges(key[0])}) for key in layouts_of(kinds)}
    launch(1, *alone.values())
    launch(2, *shared.values())
    for (kind, _), made in shared.items():
        assert_same(made, alone[kind])
        assert_output_passed(kind, made)


REWARD = "def spread(prompt, completion, row):\n    return sum(map(ord, completion)) % 11 / 11\n"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "dpo-shared": {"kind": "dpo", "share_prompts": True},
    "ipo": {"kind": "dpo", "loss": "ipo"},
    "simpo": {"kind": "simpo"},
    "orpo": {"kind": "orpo"},
    "kto": {"kind": "kto"},
    "reward": {"kind": "reward"},
    "grpo": {"kind": "grpo", "samples": 3, "new_tokens": 7, "temperature": 1.5, "beta": 0.1, "updates": 2},
}


@pytest.mark.parametrize("names", sampled(list(OBJECTIVES), 1))
@pytest.mark.timeout(1200)
def test_every_objective_is_the_same(
    names: list[str], make: Any, launch: Any, pairs: Path, held_out: Path, tmp_path: Path
) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARD)
    liked = tmp_path / "judged.jsonl"
    with liked.open("w") as stream:
        for number, row in enumerate(map(json.loads, pairs.read_text().splitlines())):
            is_liked = number % 3 > 0
            answer = row["chosen" if is_liked else "rejected"]
            print(json.dumps({"prompt": row["prompt"], "completion": answer, "label": is_liked}), file=stream)
    alone, shared = {}, {}
    for name in names:
        objective = OBJECTIVES[name]
        kind = objective["kind"]
        data = {"train": str({"kto": liked, "grpo": held_out}.get(kind, pairs)), "seq_len": 128}
        if kind == "grpo":
            objective = objective | {"reward": f"{rewards}:spread"}
        parts = {"objective": objective, "data": {**data, "eval": data["train"]}, "train": {"steps": 4, "lr": 1e-3}}
        alone[name] = make("lora", ALONE, f"-{name}", **parts)
        shared[name] = make("lora", Layout(2, 2, name != "grpo"), f"-{name}", **parts)
    launch(1, *alone.values())
    launch(2, *shared.values())
    for name in names:
        found, truth = curve(shared[name]), curve(alone[name])
        # A loss of GRPO is near zero; a reward model's first step is Adam's sign of gradients that may be rounding.
        assert found == [pytest.approx(step, rel=1e-5, abs=1e-6) for step in truth], name
        assert difference([found[0][1:]], [truth[0][1:]]) < TOLERANCE, name
        losses = [evaluated(run, 1)["eval_loss"] for run in (shared[name], alone[name])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", ["longlora"])
def test_a_run_goes_on_with_rows_shared_and_not(kind: str, make: Any, launch: Any) -> None:
    alone, shared = make(kind, ALONE), make(kind, Layout(2, 1, True), train={"gradient_checkpointing": True})
    launch(1, alone)
    launch(2, shared)
    begins_alone = interrupted(
        alone, "begins-alone", HALF, sharding={"zero": 3, "sequence": 2}, resources={"workers_per_node": 2}
    )
    begins_shared = interrupted(shared, "begins-shared", HALF, sharding={"zero": 0, "sequence": 1}, resources={})
    launch(2, begins_alone)
    launch(1, begins_shared)
    for other in (begins_alone, begins_shared):
        assert_same(other, alone, 2)


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_two_groups_of_two_are_the_same(make: Any, launch: Any) -> None:
    kinds = ("lora", "full", "galore", "prefix")
    cells = [(kind, zero) for kind in kinds for zero in STAGES]
    alone = {kind: make(kind, ALONE) for kind in kinds}
    shared = [
        (kind, make(kind, Layout(2, zero, True), "-four", resources={"workers_per_node": 4})) for kind, zero in cells
    ]
    launch(1, *alone.values())
    launch(4, *(made for _, made in shared))
    for kind, made in shared:
        assert_same(made, alone[kind])


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_losses_in_chunks_and_compiled_layers_are_the_same(make: Any, launch: Any) -> None:
    """Attention within documents is not part of it: that is a GPU's."""
    kinds = ("lora", "longlora", "prefix")
    alone = {kind: make(kind, ALONE) for kind in kinds}
    shared = {kind: make(kind, Layout(2, 1), train={"kernels": "fast"}) for kind in kinds}
    launch(1, *alone.values())
    launch(2, *shared.values(), timeout=600)
    for kind in kinds:
        assert difference(curve(shared[kind]), curve(alone[kind])) < 1e-5
        plan = next(
            event
            for event in map(json.loads, (shared[kind] / "attempts/1/events.jsonl").read_text().splitlines())
            if event["event"] == "plan"
        )
        assert {"losses in chunks", "compiled layers"} <= {*plan["kernels"]}, plan["kernel_problems"]


WINDOWS = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": WINDOWS,
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi3": {},
}


def gaps(rank: int, folder: str, port: int) -> None:
    """One of two workers: how far bases are from what they say alone when they share rows."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.shared_rows.attention import share_rows
    from trainer.shared_rows.check import gap_of_sharing
    from trainer.world import join_process_group

    world = join_process_group(2)
    torch.set_num_threads(1)
    found = {}

    def measure(base: Any, packing: bool) -> float:
        with torch.no_grad():
            return gap_of_sharing(base, world.sequence, 8, 320, packing, world.device)

    for kind, config in BASES.items():
        torch.manual_seed(0)
        shape = {**TWO_LAYERS, "vocab_size": 320, "initializer_range": 0.2, "pad_token_id": 0, **config}
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
        share_rows(base, world.sequence)
        found[kind] = max(measure(base, packing) for packing in (False, True))
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TWO_LAYERS, vocab_size=320)).eval()
    share_rows(base, world.sequence)
    base.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, out: out.roll(1, 1))
    found["mixed"] = measure(base, False)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.usefixtures("workers")  # it makes forks cheap
def test_bases_are_the_same_and_one_that_mixes_positions_elsewhere_is_found(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(gaps, (str(tmp_path), free_port()), 2, start_method="forkserver")
    found = json.loads((tmp_path / "0.json").read_text())
    assert found.pop("mixed") > 1e-2
    assert found == dict.fromkeys(BASES, pytest.approx(0, abs=1e-6))


def test_each_label_is_on_the_rank_of_the_position_before_it() -> None:
    arrays = {
        "input_ids": np.arange(16).reshape(2, 8),
        "position_ids": np.arange(16).reshape(2, 8) % 8,
        "kept": np.array([2, 3, 6]),
        "row": np.array([0, 0, 1]),
        "column": np.array([1, 2, 0]),  # places 3, 6 and 2
        "label": np.array([4, 7, 11]),
        "labels": np.array([2, 1]),
    }
    first, second = (part_of_rows(arrays, index, 2) for index in range(2))
    assert first["input_ids"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert second["position_ids"].tolist() == [[4, 5, 6, 7]] * 2
    assert first["whole_position_ids"].shape == (2, 8)
    for part, own, places in ((first, [4, 11], [(0, 3), (1, 2)]), (second, [7], [(0, 2)])):
        assert part["label"].tolist() == own
        assert [*zip(part["row"].tolist(), part["kept"][part["column"]].tolist(), strict=True)] == places
        assert part["labels"].tolist() == [2, 1]
    assert (first["slot"].tolist(), second["slot"].tolist()) == ([0, 2, 1], [1, 0, 1])
    *_, last = (part_of_rows(arrays, index, 8) for index in range(8))
    assert (last["label"].tolist(), last["slot"].tolist()) == ([-100], [1, 1, 1]), "one that is ignored stands in"


def job_of(sequence: int, **parts: Any) -> Job:
    """A job whose workers share rows."""
    shared = {"base": "some/base", "data": "/x.jsonl", "train": {"steps": 1}, "sharding": {"sequence": sequence}}
    return Job.model_validate(shared | parts)


@pytest.mark.parametrize(
    ("resources", "problem"),
    [
        ({}, "sharding.sequence 2 with one worker; allowed: a divisor of that number, or 1"),
        ({"workers_per_node": 3}, "sharding.sequence 2 with 3 workers; allowed: a divisor"),
        ({"nodes": "2-4", "gpus_per_node": 1}, "sharding.sequence 2 with one worker on each of nodes 2-4; allowed"),
    ],
)
def test_workers_that_cannot_share_rows_are_refused(resources: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        job_of(2, resources=resources)


def test_each_rank_has_keys_of_its_own() -> None:
    check_heads(LLAMA_1B, 8)
    with pytest.raises(ValueError, match="found 8; allowed: a divisor of 2, as the base has 4 heads"):
        check_heads(TWO_LAYERS, 8)


@pytest.mark.matrix
def test_a_dry_run_has_about_half_the_activations() -> None:
    documents = [(4096, 1)]
    alone, shared = (
        Forecaster().forecast(
            job_of(sequence, method="lora", data={"train": "-", "seq_len": 4096}, resources={"gpus_per_node": 2}),
            LLAMA_1B,
            documents,
            "bf16",
            fast=False,
        )
        for sequence in (1, 2)
    )
    assert shared["activations"] == pytest.approx(alone["activations"] / 2, rel=0.05)
    assert shared["weights"] == pytest.approx(alone["weights"], rel=1e-3)
