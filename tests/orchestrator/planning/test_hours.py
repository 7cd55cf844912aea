"""Hours before the start, and what earlier runs correct: intervals hold in 9 of 10 simulated runs."""

import json
import random
from math import exp
from pathlib import Path
from typing import Any

import pytest
from jobs import CONFIG, make_job

from clusters.base import Capacity
from methods.options import KINDS
from orchestrator.errors import InputError
from orchestrator.planning import device as devices
from orchestrator.planning.device import Device, device_said, planned_device
from orchestrator.planning.earlier import UNCORRECTED, correction_of, earlier_costs
from orchestrator.planning.hours import LIKE_SPREAD, STATED, UNLIKE_SPREAD, hours, planned_flops, prediction
from orchestrator.planning.model import Model
from orchestrator.planning.plan import plan
from orchestrator.planning.sizes import sizes
from orchestrator.runs import new_id, runs_folder
from runfolder.chain import claim_next
from runfolder.costs import Costs, costs_of
from runfolder.job import Job
from runfolder.record import create_run_folder
from runfolder.site import LocalSite
from runfolder.snapshot import Snapshot
from trainer.devices import bandwidth_of_name, memory_of_name, peak_of_name

GIB = 2**30
WORK = {
    "method": "lora",
    "objective": "sft",
    "zero": 0,
    "kernels": "fast",
    "checkpointing": False,
    "precision": "bf16",
    "workers": 2,
    "device": "NVIDIA H200",
    "peak": 989e12,
    "flops_per_token": 4e9,
    "batch_tokens": 100_000,
}
JOB = Job.model_validate(
    {"base": "b", "data": "d.jsonl", "method": "lora", "train": {"steps": 1000}, "resources": {"gpus_per_node": 1}}
)
CASES = 2000


def costs(
    utilisation: float | None = None, foretold: int | None = None, measured: int | None = None, **work: Any
) -> Costs:
    return Costs({**WORK, **work}, foretold, measured, utilisation)


@pytest.mark.parametrize("expected", [LIKE_SPREAD, UNLIKE_SPREAD])
@pytest.mark.parametrize("earlier", [1, 2, 3, 10])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_next_run_is_in_the_interval_of_those_before_it(expected: float, earlier: int, share: float) -> None:
    """Runs may spread as much as they are expected to, or less."""
    rng = random.Random(earlier)
    held = 0
    for _ in range(CASES):
        *before, after = (0.3 * exp(rng.gauss(0.0, share * expected)) for _ in range(earlier + 1))
        low, likely, high = prediction(before, expected)
        assert low < likely < high
        held += low <= after <= high
    assert held >= 0.895 * CASES  # whose own standard error is 0.007


def test_many_runs_that_spread_more_than_expected_widen_it() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(CASES):
        *before, after = (0.3 * exp(rng.gauss(0.0, 3 * LIKE_SPREAD)) for _ in range(21))
        low, _, high = prediction(before, LIKE_SPREAD)
        held += low <= after <= high
    assert held >= 0.89 * CASES


def test_hours_are_the_arithmetic_over_what_runs_like_it_used_of_their_devices() -> None:
    model = Model(CONFIG)
    of_model = sizes(JOB, model, "gpu")
    assert of_model is not None
    per_token = planned_flops(JOB, model, of_model)
    alike = [costs(0.25, flops_per_token=per_token), costs(0.25, flops_per_token=1.5 * per_token)]
    others = [costs(0.9, flops_per_token=per_token, method="dora"), costs(0.01, flops_per_token=100 * per_token)]
    found = hours(JOB, model, of_model, 1000, "fast", [*alike, *others], None)
    assert found is not None
    seconds = per_token * 1000 * JOB.train.batch_tokens / (0.25 * WORK["peak"])
    assert found.likely == pytest.approx(seconds / 3600)
    assert found.low < found.likely < found.high < 2 * found.low
    assert found.runs == 2
    far = hours(JOB, model, of_model, 1000, "fast", others, None)
    assert far is not None and far.runs == 1 and far.high / far.low > found.high / found.low
    stated = hours(JOB, model, of_model, 1000, "fast", [], "NVIDIA H200 NVL")
    assert stated is not None and stated.runs == 0 and stated.high > 5 * stated.low
    assert hours(JOB, model, of_model, 1000, "fast", [], "a GPU of next year") is None


def test_each_method_has_a_stated_share_with_fast_and_with_plain_kernels() -> None:
    for by_method in STATED.values():
        assert set(by_method) == set(KINDS)
        assert all(0 < share < 1 for share in by_method.values())


def test_forecasts_are_corrected_by_runs_that_did_the_same() -> None:
    measured = [costs(foretold=100, measured=ratio) for ratio in (102, 104, 109)]
    others = [costs(foretold=100, measured=150, zero=3), costs(foretold=100, measured=900), costs(foretold=100)]
    others.append(costs(foretold=100, measured=150, offload="optimizer"))
    found = correction_of(JOB, "fast", [*measured, *others])
    assert (found.factor, found.runs) == (1.04, 3)
    assert found.margin == pytest.approx(3 * 0.0360555)
    assert correction_of(JOB, "fast", measured[:1]).margin == UNCORRECTED.margin
    assert correction_of(JOB, "plain", measured) == UNCORRECTED


def test_the_share_that_was_used_is_that_between_the_first_steps_and_the_last() -> None:
    events = [
        {"event": "plan", "steps": 40, "work": WORK},
        {"event": "foretold", "bytes": 9},
        {"event": "calibrated", "what": "training", "bytes": 10},
        {"event": "calibrated", "what": "answers", "bytes": 99},
    ]
    compiling = [{"step": step, "time": 50.0 * step - 100.0, "loss": 1.0} for step in (1, 2)]
    rows = compiling + [{"step": step, "time": 2.0 * step, "loss": 1.0} for step in range(3, 41)]
    found = costs_of(events, rows)
    assert found is not None
    assert (found.foretold, found.measured) == (9, 10)
    assert found.utilisation == pytest.approx(100_000 * 4e9 / (2.0 * 989e12 * 2))
    few = costs_of(events, rows[:9])
    assert few is not None and few.utilisation is None
    assert costs_of([{"event": "plan", "steps": 40}], rows) is None
    snapshot = Snapshot("a-0123456789", "/a", costs=found)
    assert Snapshot.load(json.loads(json.dumps(snapshot.dump()))).costs == found


def test_a_plan_goes_by_what_is_known_of_runs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    source = make_job(tmp_path, method="lora", resources={"gpus_per_node": 1})
    monkeypatch.setattr("orchestrator.planning.memory.can_dry_run", lambda: False)
    assert plan(source, gpu="80").hours is None  # of which nobody knows what it does
    run_dir = runs_folder() / new_id("before")
    run_dir.parent.mkdir(parents=True)
    create_run_folder(run_dir, {"cluster": "local", "submitted": 1.0, "job": {}})
    attempt = claim_next(run_dir, None)
    assert attempt is not None
    attempt.event("plan", work=WORK)
    for step in range(1, 30):
        attempt.append("metrics.jsonl", {"step": step, "time": 2.0 * step, "loss": 1.0})
    assert [found.work for found in earlier_costs(LocalSite(runs_folder()))] == [WORK]
    found = plan(source, gpu="80")
    assert found.hours is not None and found.hours.runs == 1
    assert found.dump()["hours"]["runs"] == 1


def test_a_gpu_has_the_memory_that_is_said_or_told_or_that_its_name_stands_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "device_here", lambda: Device("NVIDIA L40S", 44 * GIB))
    nothing = Capacity("gpu", 8, 8)
    named = Capacity("gpu", 8, 8, "h100")
    told = Capacity("gpu", 8, 8, "NVIDIA-A100-SXM4-80GB", 80 * GIB)
    unsaid = Device()
    assert planned_device(nothing, True, unsaid) == Device("NVIDIA L40S", 44 * GIB)
    assert planned_device(nothing, False, unsaid) == Device()
    assert planned_device(nothing, False, device_said("24")) == Device(None, 24 * GIB)
    assert planned_device(named, False, unsaid) == Device("h100", int(79.1 * GIB))
    assert planned_device(told, False, unsaid) == Device("NVIDIA-A100-SXM4-80GB", 80 * GIB)
    assert planned_device(told, False, device_said("40")) == Device("NVIDIA-A100-SXM4-80GB", 40 * GIB)
    assert planned_device(told, True, device_said("h100")) == Device("h100", int(79.1 * GIB))


def test_a_gpu_is_said_by_its_memory_its_name_or_both() -> None:
    assert device_said(None) == Device()
    assert device_said("80") == Device(None, 80 * GIB)
    assert device_said("h100") == Device("h100", int(79.1 * GIB))
    assert device_said("A100:80") == Device("A100", 80 * GIB)
    assert device_said("some-card:12.5") == Device("some-card", int(12.5 * GIB))
    allowed = r"^--gpu: found .*; allowed: GiB like 80 .*, one of GH200, H200, .*A100:80"
    for wrong in ("", "0", "-1", "nan", "inf", "some-card", "H100:", "H100:much", "1e7"):
        with pytest.raises(InputError, match=allowed):
            device_said(wrong)


def test_gpus_are_known_by_parts_of_their_names_and_have_the_memory_that_these_say() -> None:
    sizes = {
        "NVIDIA A100-SXM4-40GB": 39.4,
        "NVIDIA A100-SXM4-80GB": 78.8,
        "NVIDIA H100 80GB HBM3": 79.1,
        "NVIDIA GH200 480GB": 94.5,
        "NVIDIA L40S-48GB": 44.4,
        "NVIDIA-GeForce-RTX-4090": 23.5,
        "NVIDIA L4": 22.0,
    }
    for name, gib in sizes.items():
        assert memory_of_name(name) == int(gib * GIB), name
    for unknown in ("NVIDIA RTX A4000", "L400", "A1000", "Tesla T4"):
        assert memory_of_name(unknown) is None and peak_of_name(unknown) is None
    assert peak_of_name("NVIDIA L40S") == 362e12 and peak_of_name("NVIDIA L40") == 181e12
    assert bandwidth_of_name("nvidia h200 nvl") == 4.8e12
