"""Checkpoints: resume at the same and at another layout, and what a broken one does."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from finished_runs import curve, difference, interrupted, rows
from mounts import two_clients
from ports import free_port
from safetensors.torch import load_file
from sampling import each_sampled

from runfolder import chain
from runfolder.files import read_json
from trainer import speed
from trainer.checkpoint.lineage import checkpoint_folder, claim_from_newest, newest, write_manifest
from trainer.checkpoint.reading import CheckpointGone, CheckpointReader, open_start
from trainer.checkpoint.saving import CheckpointWriter, write_shard
from trainer.prepare import prepare_run
from trainer.world import World

HALF = {"checkpoint": {"every": 5, "keep": 9}}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("method", each_sampled([{"kind": "full"}, {"kind": "dora", "rank": 4}]))
def test_resume_at_another_layout(method: Any, world: int, new_run: Any, launch: Any) -> None:
    whole = new_run("whole", method=method, sharding={"zero": 3}, **HALF)
    launch(world, whole)
    smaller = interrupted(whole, "smaller", 5, sharding={"zero": 1})
    alone = interrupted(whole, "alone", 5, sharding={"zero": 0})
    launch(2, smaller)
    launch(1, alone)
    for run in (smaller, alone):
        assert list(rows(run, 2)) == list(range(6, 11))
        assert difference(curve(run, 2), curve(whole)[5:]) < 1e-5


@pytest.mark.parametrize("zero", each_sampled([0, 2, 3]))
def test_resume_is_bitwise_at_the_same_layout(zero: int, new_run: Any, launch: Any) -> None:
    whole = new_run("whole", sharding={"zero": zero}, method={"kind": "lora", "rank": 4, "dropout": 0.1}, **HALF)
    launch(2, whole)
    again = interrupted(whole, "again", 5)
    launch(2, again)
    assert curve(again, 2) == curve(whole)[5:]
    one, other = (load_file(run / "output" / "adapter_model.safetensors") for run in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("workers")  # it makes forks cheap
def test_at_stage_3_no_rank_reads_weights_that_it_does_not_keep(new_run: Any, launch: Any, tmp_path: Path) -> None:
    whole = new_run("whole", method={"kind": "full"}, sharding={"zero": 3}, train={"steps": 5}, **HALF)
    launch(2, whole)
    again = interrupted(whole, "again", 5)
    assert claim_from_newest(again)
    arguments = (str(again), str(tmp_path), free_port())
    torch.multiprocessing.start_processes(count_elements_read, arguments, 2, start_method="forkserver")
    counts = [read_json(tmp_path / f"read-{rank}.json") for rank in range(2)]
    for count in counts:
        assert count["read"] == count["held"]
    assert sum(count["held"] for count in counts) == counts[0]["trained"]


def count_elements_read(rank: int, run_dir: str, folder: str, port: int) -> None:
    """One of two workers that loads the second attempt: elements of weights that it reads, and that it holds then."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    read, count = CheckpointReader.read, 0

    def counted(self: CheckpointReader, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal count
        count += (stop - start) * (kind == "weight")
        return read(self, kind, name, start, stop)

    CheckpointReader.read = counted  # type: ignore[method-assign]
    run, _ = prepare_run(chain.Attempt(Path(run_dir), 2))
    held = sum(fragment.stop - fragment.start for fragment in run.sharded.fragments())
    trained = speed.count_trained(run.model)
    (Path(folder) / f"read-{rank}.json").write_text(json.dumps({"read": count, "held": held, "trained": trained}))
    dist.destroy_process_group()


def save(attempt: chain.Attempt, *steps: int) -> None:
    """Leave checkpoints of two ranks in an attempt's folder."""
    for step in steps:
        folder = checkpoint_folder(attempt, step)
        folder.mkdir(parents=True)
        for rank in range(2):
            write_shard(folder, rank, {f"weight/w/{4 * rank}": torch.full((4,), float(step))})
        files = {f"shard-{rank}.safetensors": read_json(folder / f"shard-{rank}.json") for rank in range(2)}
        write_manifest(folder, {"step": step, "files": files})


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def first(tmp_path: Path) -> chain.Attempt:
    """An attempt with checkpoints of steps 10, 20 and 30."""
    attempt = chain.claim_next(tmp_path, None)
    assert attempt
    save(attempt, 10, 20, 30)
    return attempt


@pytest.fixture
def alone() -> Iterator[World]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def test_what_is_not_whole_is_passed_over(first: chain.Attempt) -> None:
    assert newest(first.run_dir) == chain.Start(1, 30)
    manifest = checkpoint_folder(first, 30) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 30', '"step": 31'))
    assert newest(first.run_dir) == chain.Start(1, 20)
    with (checkpoint_folder(first, 20) / "shard-1.safetensors").open("ab") as stream:
        stream.write(b" ")
    assert newest(first.run_dir) == chain.Start(1, 10)
    (checkpoint_folder(first, 10) / "shard-0.safetensors").unlink()
    assert newest(first.run_dir) is None


def test_a_damaged_checkpoint_is_found_by_those_who_load_it_and_not_taken_again(
    first: chain.Attempt, alone: World
) -> None:
    flip_a_bit(checkpoint_folder(first, 30) / "shard-1.safetensors")
    second = claim_from_newest(first.run_dir)
    assert second and second.start == chain.Start(1, 30)
    with pytest.raises(CheckpointGone, match=r"step 30 of attempt 1: shard-1.safetensors: not what was written"):
        open_start(second, alone)
    third = claim_from_newest(first.run_dir)
    assert third and third.start == chain.Start(1, 20)
    reader = open_start(third, alone)
    assert reader and torch.equal(reader.read("weight", "w", 2, 8), torch.full((6,), 20.0))


def test_a_predecessor_that_lives_cannot_remove_what_its_successor_starts_from(
    first: chain.Attempt, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks, is paused, and wakes to remove an older one, while the newest turned out to be damaged."""
    shutil.rmtree(checkpoint_folder(first, 10))
    (checkpoint_folder(first, 30) / "shard-0.safetensors").unlink()
    successors: list[chain.Attempt | None] = []
    monkeypatch.setattr(chain.Attempt, "check", lambda _: successors.append(claim_from_newest(first.run_dir)))
    with pytest.raises(FileNotFoundError, match="step-20"):
        CheckpointWriter(first, alone, 10, keep=1)._clean()
    (successor,) = successors
    assert successor and successor.start == chain.Start(1, 20)
    reader = open_start(successor, alone)
    assert reader and reader.step == 20


def test_a_start_that_was_removed_before_it_was_claimed_says_so(first: chain.Attempt, alone: World) -> None:
    second = chain.claim_next(first.run_dir, chain.Start(1, 15))
    assert second
    with pytest.raises(CheckpointGone, match=r"step 15 of attempt 1: .*No such file"):
        open_start(second, alone)


def test_a_save_of_two_clients_does_not_wait_for_their_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 writes its shard once rank 0 has seen that it is not there, which its client believes for an hour."""
    (tmp_path / "real").mkdir()
    with two_clients(tmp_path / "real", tmp_path, kept_s=3600) as (a, b):
        attempt = chain.claim_next(a, None)
        assert attempt
        saves = CheckpointWriter(attempt, World(0, 2, torch.device("cpu")), 5, 2)
        looked = threading.Event()
        monkeypatch.setattr(chain.Attempt, "check", lambda *_, **__: looked.set())
        tensors = {"weight/w/0": torch.zeros(4)}
        saving = threading.Thread(target=saves._write, args=({"step": 5}, tensors), daemon=True)
        saving.start()
        assert looked.wait(60)
        write_shard(checkpoint_folder(chain.Attempt(b, 1), 5), 1, {"weight/w/4": torch.ones(4)})
        saving.join(60)
        assert not saving.is_alive()
        saves.wait()
        assert newest(b) == chain.Start(1, 5)
        reader = CheckpointReader(checkpoint_folder(chain.Attempt(b, 1), 5))
        assert reader.read("weight", "w", 0, 8).tolist() == [0.0] * 4 + [1.0] * 4


def test_the_newest_checkpoint_is_claimed_by_a_client_that_has_looked_before(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    with two_clients(tmp_path / "real", tmp_path) as (a, b):
        attempt = chain.claim_next(a, None)
        assert attempt and newest(b) is None
        save(attempt, 10)
        assert newest(b) == chain.Start(1, 10)
        unfinished = checkpoint_folder(attempt, 20)
        unfinished.mkdir()
        assert newest(b) == chain.Start(1, 10)
        unfinished.rmdir()
        save(attempt, 20)
        second = claim_from_newest(b)
        assert second and second.start == chain.Start(1, 20)


def test_any_range_can_be_read(new_run: Any, launch: Any) -> None:
    run = new_run("run", sharding={"zero": 3}, **HALF)
    launch(2, run)
    reader = CheckpointReader(run / "attempts" / "1" / "checkpoints" / "step-10")
    exported = load_file(run / "output" / "adapter_model.safetensors")
    key = next(iter(exported))
    name, whole = key.replace(".weight", ".default.weight"), exported[key].flatten()
    assert reader.kinds(name) == {"exp_avg", "exp_avg_sq", "step"}
    assert torch.equal(reader.read("weight", name, 0, whole.numel()), whole)
    assert torch.equal(reader.read("weight", name, 5, 77), whole[5:77])
    with pytest.raises(ValueError, match="are not in the checkpoint"):
        reader.read("weight", name, 0, whole.numel() + 1)


def test_auto_asks_once_for_each_save_that_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("trainer.checkpoint.saving.time.monotonic", lambda: now[0])
    saves = CheckpointWriter(chain.Attempt(tmp_path, 1), World(0, 1, torch.device("cpu")), "auto", 2)
    saves._stall_s = 0.5  # Young: sqrt(2 x 0.5 x 4 h) = 120 s
    asked = []
    for _ in range(300):
        now[0] += 1
        asked.append(saves.overdue())
    assert [second for second, yes in enumerate(asked, 1) if yes] == [121, 242]


class HeldSave(threading.Thread):
    """A save that goes on until somebody waits for it."""

    def __init__(self) -> None:
        self.awaited = threading.Event()
        super().__init__(target=self.awaited.wait, daemon=True)

    def join(self, timeout: float | None = None) -> None:
        """Wait for it, which ends it."""
        self.awaited.set()
        super().join(timeout)


def test_the_log_says_that_a_save_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saves = CheckpointWriter(chain.Attempt(tmp_path, 1), World(0, 1, torch.device("cpu")), "auto", 2)
    saves.wait()
    assert capsys.readouterr().out == ""
    saves._thread = HeldSave()
    saves._thread.start()
    saves.wait()
    assert capsys.readouterr().out == "waiting until the checkpoint is on disk\n"
    ended = threading.Thread()
    ended.start()
    ended.join()
    saves._thread = ended
    saves.wait()
    assert capsys.readouterr().out == ""
