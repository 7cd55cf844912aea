"""Whether a worker fits on its GPU: the sums, the changes that are tried, and a plan that has a dry run made."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import make_base, make_job
from llamas import LLAMA_1B
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.planning import memory
from orchestrator.planning.fitted_line import fitted
from orchestrator.planning.model import Model
from orchestrator.planning.plan import plan
from orchestrator.terminal.fit_text import fit_fields
from runfolder.job import Job
from trainer.dry_run.fit import (
    LINE_MARGIN,
    Change,
    Forecast,
    changes_that_fit,
    with_more_gpus,
    with_setting,
)
from trainer.dry_run.process import DryRunFailed

GIB = 2**30
FIGURES = Path(__file__).parents[2] / "trainer" / "dry_run_figures.json"
CELLS = [
    cell
    for cell in json.loads(FIGURES.read_text())["cells"]
    if not {"zero", "checkpointed", "objective"} & cell.keys()
]
WITHOUT_LINE = {"fourierft", "longlora", "relora"}


def job(**changes: Any) -> Job:
    found = {"base": "some/base", "data": "/x.jsonl", "train": {"steps": 3}, **changes}
    return Job.model_validate(found)


def forecast(gib: float, part: str = "activations") -> Forecast:
    return Forecast({part: int(gib * GIB)}, "dry run", 0.05)


def test_a_device_has_more_than_tensors_in_it() -> None:
    assert forecast(10).needed(1) == int(10.5 * GIB) + 600 * 2**20
    assert forecast(10).needed(2) == forecast(10).needed(1) + GIB


def test_changes_are_tried_upon_each_other_until_one_fits() -> None:
    asked = []

    def find(changed: Job) -> Forecast:
        asked.append(changed)
        smaller = changed.train.gradient_checkpointing
        return forecast(5 if smaller else 20)

    tried = changes_that_fit(job(train={"steps": 3, "micro_batch": 4}), find, 8 * GIB, forecast(20))
    assert [change.fits for change in tried] == [False, True]
    assert tried[-1].settings == {"train.micro_batch": 1, "train.gradient_checkpointing": True}
    assert asked[-1].train.micro_batch == 1


def test_changes_read_as_in_job_yaml() -> None:
    change = Change({"train.gradient_checkpointing": True, "method": {"kind": "qlora", "rank": 8}}, 0, True)
    assert change.text == "train.gradient_checkpointing=true and method={kind: qlora, rank: 8}"


def test_a_change_that_no_dry_run_can_try_is_left_out() -> None:
    def find(changed: Job) -> Forecast:
        if changed.train.gradient_checkpointing:
            raise DryRunFailed("it broke")
        return forecast(20 if changed.method.makes_model else 5)

    offloaded, both, change = changes_that_fit(job(), find, 8 * GIB, forecast(20))
    assert offloaded.settings == {"sharding.offload": "optimizer"} and not offloaded.fits
    assert both.settings == {"sharding.offload": "optimizer", "method": {"kind": "lora"}}
    assert change.settings == {"method": {"kind": "lora"}} and both.fits and change.fits


def test_weights_that_are_too_large_are_not_tried_with_smaller_activations() -> None:
    asked: list[Job] = []

    def find(changed: Job) -> Forecast:
        asked.append(changed)
        return forecast(5 if changed.method.quantises else 20, "weights")

    job_now = job(method="lora", resources={"nodes": 2, "gpus_per_node": 1}, train={"steps": 3, "micro_batch": 4})
    sharded, both, change = changes_that_fit(job_now, find, 8 * GIB, forecast(20, "weights"))
    assert [tried.sharding.zero for tried in asked] == [3, 3, 0]
    assert not sharded.fits and both.fits and change.fits
    assert both.settings == {"sharding.zero": 3, "method": {"kind": "qlora", "rank": 16}}
    assert change.settings == {"method": {"kind": "qlora", "rank": 16}}


def test_weights_are_shared_first_where_they_are_too_large_and_activations_made_smaller_then() -> None:
    def find(changed: Job) -> Forecast:
        smaller = changed.train.gradient_checkpointing
        shared = changed.sharding.zero == 3
        parts = {"weights": 2 if shared else 20, "activations": 1 if smaller else 9}
        return Forecast({part: gib * GIB for part, gib in parts.items()}, "dry run", 0.05)

    job_now = job(method="lora", resources={"nodes": 2, "gpus_per_node": 1})
    tried = changes_that_fit(job_now, find, 8 * GIB, find(job_now))
    assert [change.settings for change in tried] == [
        {"sharding.zero": 3},
        {"sharding.zero": 3, "train.gradient_checkpointing": True},
    ]
    assert [change.fits for change in tried] == [False, True]


def test_what_costs_time_and_is_not_needed_is_left_out_again() -> None:
    """Sharding alone fits here, which is tried after checkpointing."""

    def find(changed: Job) -> Forecast:
        shared = changed.sharding.zero >= 2
        checkpointed = changed.train.gradient_checkpointing
        return forecast(5 if shared else 19 if checkpointed else 20)

    two_workers = job(resources={"nodes": 2, "gpus_per_node": 1})
    tried = changes_that_fit(two_workers, find, 8 * GIB, forecast(20))
    assert tried[-2].settings == {"train.gradient_checkpointing": True, "sharding.zero": 2}
    assert tried[-1].settings == {"sharding.zero": 2} and tried[-1].fits


def test_gpus_of_a_node_are_proposed_where_nothing_less_does() -> None:
    asked: list[Job] = []

    def find(changed: Job) -> Forecast:
        asked.append(changed)
        workers = changed.resources.world_size if changed.sharding.zero == 3 else 1
        return Forecast(
            {"weights": 40 * GIB // workers, "activations": changed.train.micro_batch * 2 * GIB}, "", 0.05
        )

    job_now = job(method="lora", train={"steps": 3, "micro_batch": 4})
    change = with_more_gpus(job_now, find, 16 * GIB)
    assert change is not None and change.fits
    assert change.settings == {"resources.gpus_per_node": 8, "sharding.zero": 3}
    assert [asked_job.resources.world_size for asked_job in asked] == [2, 4, 8]
    smaller = with_more_gpus(job_now, find, 9 * GIB)
    assert smaller is not None and smaller.settings["train.micro_batch"] == 1
    assert with_more_gpus(job_now, find, 3 * GIB) is None
    assert with_more_gpus(job(method="lora", resources={"workers_per_node": 2}), find, 16 * GIB) is None


def test_a_change_that_the_job_forbids_is_left_out() -> None:
    job_now = job(base={"model": "some/base", "init": "scratch"}, method="lora")
    tried = changes_that_fit(job_now, lambda _: forecast(20), 8 * GIB, forecast(20))
    assert tried and all("method" not in change.settings for change in tried)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell['method']}-{cell['kernels']}-{cell['rows']}")
def test_fitted_lines_are_within_a_fifth_of_dry_runs(cell: dict[str, Any]) -> None:
    data = {"train": "/x.jsonl", "seq_len": 2048, "packing": False}
    train = {"steps": 3, "micro_batch": 4}
    planned = job(method={"kind": cell["method"]}, data=data, train=train, resources={"gpus_per_node": 1})
    longest = {"padded": 1728, "full": 2048}[cell["rows"]]
    found = fitted(planned, Model(LLAMA_1B), ((longest, longest - 1),), "bf16", cell["kernels"] == "fast")
    if found is None:
        assert cell["method"] in WITHOUT_LINE
    else:
        assert found.allocated / GIB == pytest.approx(cell["foretold"], rel=LINE_MARGIN)


def test_a_base_in_4_bits_is_the_last_change_and_keeps_the_rank() -> None:
    tried = changes_that_fit(job(method={"kind": "lora", "rank": 8}), lambda _: forecast(20), 8 * GIB, forecast(20))
    assert tried[-1].settings["method"] == {"kind": "qlora", "rank": 8}
    assert "method" not in tried[-2].settings
    quantised = changes_that_fit(job(method="qlora"), lambda _: forecast(20), 8 * GIB, forecast(20))
    assert all("method" not in change.settings for change in quantised)


def test_what_cannot_be_foretold_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "can_dry_run", lambda: False)
    source = make_job(tmp_path, method={"kind": "fourierft", "frequencies": 4}, resources={"gpus_per_node": 1})
    found = plan(source, gpu="80")
    assert found.fit is None
    assert any(warning.startswith("memory: not foretold: torch") for warning in found.warnings)


def test_what_makes_no_sense_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sharding\.sequence"):
        with_setting(job(resources={"gpus_per_node": 3}), "sharding.sequence", 2)


def test_a_plan_without_gpus_foretells_no_memory_of_them_and_says_how_it_would(tmp_path: Path) -> None:
    assert plan(make_job(tmp_path)).fit is None
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "job.yaml")])
    assert "--gpu H100 or --cluster NAME" in " ".join(shown.output.split())


def test_a_plan_says_what_a_worker_takes_and_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    make_base(tmp_path / "base")
    source = make_job(tmp_path, train={"steps": 3, "kernels": "plain", "micro_batch": 2, "batch_tokens": 4096})
    found = plan(source, gpu="80").fit
    assert found is not None
    assert (found.problem, found.fits, found.changes) == (None, True, ())
    parts = found.forecast.parts
    assert parts["activations"] > 0
    monkeypatch.setattr(memory, "can_dry_run", lambda: False)
    without = plan(source, gpu="80").fit
    assert without is not None
    assert without.forecast.source == "fitted line"
    assert "fleetune[train]" in str(without.problem)


def test_random_weights_are_not_in_4_bits_whatever_the_base_is_in() -> None:
    in_4_bits = {**LLAMA_1B, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert memory.config_of_base(Model(in_4_bits)) == in_4_bits
    assert memory.config_of_base(Model(in_4_bits, scratch=True)) == LLAMA_1B


def test_a_plan_says_so_where_it_knows_no_change_that_would_fit() -> None:
    too_large = memory.MemoryFit(forecast(10), 11 * GIB, 8 * GIB, False, (), None)
    assert fit_fields(too_large)["instead"] == "no change of settings is known that would fit"
    assert "instead" not in fit_fields(memory.MemoryFit(forecast(1), 2 * GIB, 8 * GIB, True, (), None))
