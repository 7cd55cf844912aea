"""The longest passes are tried before the first step: nothing moves by it, and too little memory shows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import curve, events, interrupted
from llamas import random_llama
from safetensors.torch import load_file
from sampling import each_sampled

from orchestrator.failure import Failure, types_of
from orchestrator.verdict import classify
from runfolder.job import Job
from runfolder.record import load_job
from trainer import foretelling
from trainer.calibration import DoesNotFit
from trainer.data.batches import Batches
from trainer.data.counts import Counts
from trainer.data.examples import Examples
from trainer.data.layout import Layout
from trainer.data.longest import longest_pass, padded_positions
from trainer.data.shards import join_examples
from trainer.data.tokens import Tokens
from trainer.dry_run.fit import with_setting
from trainer.dry_run.process import DryRunProcess
from trainer.generation import cache_bytes

LAYOUTS = [(1, 0, "sft"), (2, 1, "sft"), (2, 2, "pairs"), (2, 3, "sft"), (1, 3, "pairs"), (2, 0, "dpo")]
PAIRS = "preferences.jsonl"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "outside")


def documents(lengths: list[int]) -> Examples:
    made = [(np.zeros(length, np.int32), np.arange(length) > 0) for length in lengths]
    return Examples.of_each(Tokens([join_examples(made, list(range(len(made))), Counts())]))


@pytest.mark.parametrize("packing", [False, True])
def test_the_longest_micro_batch_is_found_among_all_that_are_left(packing: bool) -> None:
    rng = np.random.default_rng(0)
    examples = documents(rng.integers(2, 60, 300).tolist())
    layout = Layout(64, packing, 3)
    batches = Batches(examples, layout, seed=1, batch_tokens=400, epochs=2)
    for first in (0, batches.steps // 2):
        found = longest_pass(batches, first, lambda batch: layout.deal(batch, 0, 2))
        dealt = [layout.deal(batches.batch(k), 0, 2) for k in range(first, batches.steps)]
        every = [padded_positions(micro, examples.tokens) for of_step in dealt for micro in of_step]
        assert found.size[0] == max(every) > min(every)


@pytest.mark.parametrize(("world", "zero", "objective"), each_sampled(LAYOUTS))
def test_a_run_is_what_it_is_without(
    world: int, zero: int, objective: str, new_run: Any, launch: Any, held_out: Path, tmp_path: Path
) -> None:
    data = {"eval": str(held_out)}
    if objective == "dpo":
        path = tmp_path / PAIRS
        rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}{n}"} for n in range(60)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": str(path), "eval": str(path)}
    runs = {
        tried: new_run(
            f"tried-{tried}",
            objective=objective,
            method={"kind": "lora", "rank": 4, "dropout": 0.1},
            data=data,
            train={"steps": 3, "calibrate": tried},
            sharding={"zero": zero},
            checkpoint={"every": 2},
            evaluation={"rows": 4, "max_new_tokens": 4},
        )
        for tried in (True, False)
    }
    launch(world, *runs.values())
    again = interrupted(runs[True], "again", 2)
    launch(world, again)
    assert curve(runs[True]) == curve(runs[False])
    assert curve(again, 2) == curve(runs[False])[2:]
    outputs = [load_file(run / "output" / "adapter_model.safetensors") for run in (*runs.values(), again)]
    assert all(torch.equal(output[name], value) for output in outputs for name, value in outputs[0].items())
    wanted = ["training", "evaluation", "answers"]
    if objective != "sft":  # which ask for no answers
        wanted.pop()
    assert [event["what"] for event in events(runs[True]) if event["event"] == "calibrated"] == wanted
    assert [event["what"] for event in events(again, 2) if event["event"] == "calibrated"] == wanted
    assert not [event for event in events(runs[False]) if event["event"] == "calibrated"]


def test_too_little_memory_ends_a_run_before_its_first_step_with_what_to_change(new_run: Any, launch: Any) -> None:
    run = new_run("hungry", objective="hungry", train={"calibrate": True, "micro_batch": 8, "batch_tokens": 2000})
    said = r"before the first step: a micro-batch of 8 x \d+ positions does not fit .*; train.micro_batch: 1"
    with pytest.raises(AssertionError, match=said):
        launch(1, run)
    assert not (run / "attempts" / "1" / "metrics.jsonl").exists()


def test_it_is_judged_as_out_of_memory() -> None:
    error = DoesNotFit("out of memory before the first step: all of it; train.micro_batch: 1 would fit")
    verdict = classify({0: Failure(f"trainer.calibration.DoesNotFit: {error}", types_of(error))})
    assert verdict.kind == "out_of_memory"
    assert "train.micro_batch: 1 would fit" in verdict.reason
    assert "train.micro_batch: 1 would fit" in verdict.evidence


@pytest.mark.soak
def test_the_change_that_fits_is_foretold_on_the_worker(new_run: Any) -> None:
    run = worker_of(new_run)
    assert foretelling.fitting_changes(run, 2**40, None).startswith("it would with train.micro_batch=")


def test_a_forecast_that_was_too_low_is_corrected_by_what_did_not_fit(
    new_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runner(_process: Any, _config: Any, sample: Any) -> Any:
        assert sample[0] == (60, 59)

        def parts(job: Job, precision: str, fast: bool) -> dict[str, int]:
            assert (precision, fast) == ("fp32", True)
            return {"activations": 5 * job.train.micro_batch * 2**30}

        return SimpleNamespace(parts=parts)

    monkeypatch.setattr(foretelling, "DryRunner", runner)
    run = worker_of(new_run)
    # 40 GiB were foretold and 80 do not suffice: for half of the rows 40 do, with a margin and what CUDA takes.
    assert foretelling.fitting_changes(run, 80 * 2**30, None) == "it would with train.micro_batch=4 (about 42.6 GiB)"
    assert foretelling.fitting_changes(run, 20 * 2**30, None).startswith("it would with train.micro_batch=2 (about ")
    run.job = with_setting(run.job, "train.micro_batch", 1)
    assert foretelling.fitting_changes(run, 2**30, None).startswith("not even with train.gradient_checkpointing=true")


def test_a_job_that_does_not_fit_is_foretold_once(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def runner(_process: Any, _config: Any, _sample: Any) -> Any:
        def parts(job: Job, _precision: str, _fast: bool, tried: bool = False) -> dict[str, int]:
            asked.append((job.train.micro_batch, tried))
            return {"activations": 5 * job.train.micro_batch * 2**30}

        return SimpleNamespace(parts=parts)

    monkeypatch.setattr(foretelling, "DryRunner", runner)
    monkeypatch.setattr(DryRunProcess, "start", lambda _: None)
    run = worker_of(new_run)
    kept: list[str] = []
    run.attempt = SimpleNamespace(event=lambda name, **_: kept.append(name))
    batch = Batches(Examples.of_each(run.tokens), Layout(64, False, 8), seed=1, batch_tokens=400, epochs=1)
    longest = longest_pass(batch, 0, lambda each: Layout(64, False, 8).deal(each, 0, 1))
    beside = foretelling.Foretelling(run, longest)
    assert foretelling.fitting_changes(run, 30 * 2**30, beside).startswith("it would with train.micro_batch=4 (")
    assert (kept, asked) == (["foretold"], [(8, True), (4, False)])
    beside.end()
    beside.join(60)


def worker_of(new_run: Any) -> Any:
    """What a worker knows of a run with eight rows at once."""
    job = load_job(new_run("asked", train={"micro_batch": 8, "batch_tokens": 2000}, data={"packing": False}))
    model = random_llama(vocab_size=512)
    return SimpleNamespace(
        job=job,
        tokens=documents([60, 50, 40] * 9).tokens,
        dtype=torch.float32,
        model=model,
        world=SimpleNamespace(size=1),
    )


@pytest.mark.parametrize("heads", [4, 2])
def test_a_cache_is_counted_as_the_model_has_it(heads: int) -> None:
    model = random_llama(num_key_value_heads=heads)
    ids = torch.zeros(3, 7, dtype=torch.long)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    bytes_ = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    whole, of_layer = cache_bytes(model.config, 4)
    assert whole * ids.numel() == bytes_
    assert of_layer * len(cache.layers) == whole
