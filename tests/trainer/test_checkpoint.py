"""Checkpoints: resume at the same and at another layout, and what a broken one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import curve, difference, interrupted, rows
from safetensors.torch import load_file

from runfolder import chain
from trainer.checkpoint import CheckpointGone, Checkpoints, Reader, newest, open_checkpoint
from trainer.world import World

HALF = {"checkpoint": {"every": 10, "keep": 9}}


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "dora", "rank": 4}], ids=["full", "dora"])
def test_resume_at_another_layout(method: Any, new_run: Any, launch: Any) -> None:
    whole = new_run("whole", method=method, sharding={"zero": 3}, **HALF)
    launch(4, whole)
    smaller = interrupted(whole, "smaller", 10, sharding={"zero": 1})
    alone = interrupted(whole, "alone", 10, sharding={"zero": 0})
    launch(2, smaller)
    launch(1, alone)
    for run in (smaller, alone):
        assert list(rows(run, 2)) == list(range(11, 21))
        assert difference(curve(run, 2), curve(whole)[10:]) < 1e-5


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_resume_is_bitwise_at_the_same_layout(zero: int, new_run: Any, launch: Any) -> None:
    whole = new_run("whole", sharding={"zero": zero}, method={"kind": "lora", "rank": 4, "dropout": 0.1}, **HALF)
    launch(2, whole)
    again = interrupted(whole, "again", 10)
    launch(2, again)
    assert curve(again, 2) == curve(whole)[10:]
    one, other = (load_file(run / "output" / "adapter_model.safetensors") for run in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def two_checkpoints(new_run: Any, launch: Any) -> Path:
    run = new_run("run", sharding={"zero": 3}, **HALF)
    launch(2, run)
    return Path(run)


def test_a_damaged_checkpoint_is_passed_over(two_checkpoints: Path) -> None:
    folder = two_checkpoints / "attempts" / "1" / "checkpoints"
    assert newest(two_checkpoints) == chain.Start(1, 20)
    shard = folder / "step-20" / "shard-1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert newest(two_checkpoints) == chain.Start(1, 10)
    (folder / "step-10" / "shard-0.safetensors").unlink()
    assert newest(two_checkpoints) is None


def test_any_range_can_be_read(two_checkpoints: Path) -> None:
    reader = Reader(two_checkpoints / "attempts" / "1" / "checkpoints" / "step-20")
    exported = load_file(two_checkpoints / "output" / "adapter_model.safetensors")
    key = next(iter(exported))
    name, whole = key.replace(".weight", ".default.weight"), exported[key].flatten()
    assert reader.kinds(name) == {"exp_avg", "exp_avg_sq", "step"}
    assert torch.equal(reader.read("weight", name, 0, whole.numel()), whole)
    assert torch.equal(reader.read("weight", name, 5, 77), whole[5:77])
    with pytest.raises(ValueError, match="are not in the checkpoint"):
        reader.read("weight", name, 0, whole.numel() + 1)


def test_a_start_that_is_gone_says_so(two_checkpoints: Path) -> None:
    with pytest.raises(CheckpointGone, match="step 15 of attempt 1"):
        open_checkpoint(two_checkpoints, chain.Start(1, 15))


def test_auto_asks_once_for_each_save_that_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("trainer.checkpoint.time.monotonic", lambda: now[0])
    saves = Checkpoints(chain.Attempt(tmp_path, 1), World(0, 1, torch.device("cpu")), "auto", 2)
    saves._stall_s = 0.5  # Young: sqrt(2 x 0.5 x 4 h) = 120 s
    asked = []
    for _ in range(300):
        now[0] += 1
        asked.append(saves.overdue())
    assert [second for second, yes in enumerate(asked, 1) if yes] == [121, 242]
