"""Data and base that change between the submission and an attempt, or between two attempts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runfolder.chain import attempts, result
from runfolder.digests import changes, digests, file_digest, folder_digest
from runfolder.job import Job
from runfolder.record import load_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job on a base and data of its own."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    return Job.model_validate({"base": str(base), "data": data, "train": {"steps": 1}})


def test_what_is_as_it_was_has_not_changed(job: Job) -> None:
    frozen = digests(job, Path(job.base.model))
    assert all(frozen.values())
    assert changes(job, frozen) == changes(job, {}) == changes(job, dict.fromkeys(frozen)) == []


@pytest.mark.parametrize(
    ("field", "file"),
    [
        ("data.train", "train.jsonl"),
        ("data.eval", "eval.jsonl"),
        ("base", "base/config.json"),
        ("base", "base/model.safetensors"),
    ],
)
def test_a_change_is_named_with_both_digests(job: Job, tmp_path: Path, field: str, file: str) -> None:
    frozen = digests(job, Path(job.base.model))
    (tmp_path / file).write_text("other")
    (line,) = changes(job, frozen)
    now = digests(job, Path(job.base.model))[field]
    assert line.startswith(f"{field}: {tmp_path / file.split('/')[0]} has changed since the submission")
    assert f"sha256 {str(frozen[field])[:12]} then, {str(now)[:12]} now" in line


def test_what_is_gone_is_named(job: Job, tmp_path: Path) -> None:
    frozen = digests(job, Path(job.base.model))
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "train.jsonl").unlink()
    assert [line.partition(";")[0] for line in changes(job, frozen)] == [
        f"data.train: {tmp_path}/train.jsonl cannot be read now (No such file or directory)",
        f"base: {tmp_path}/base cannot be read now (No such file or directory)",
    ]


def test_weights_of_a_base_from_scratch_do_not_count(job: Job) -> None:
    job = job.model_copy(update={"base": job.base.model_copy(update={"init": "scratch"})})
    frozen = digests(job, Path(job.base.model))
    (Path(job.base.model) / "model.safetensors").unlink()
    assert changes(job, frozen) == []


def test_plain_workers_all_stop_before_they_train_on_other_rows(
    new_run: Callable[..., Path], launch: Callable[..., None], tmp_path: Path, sums: Path
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(sums.read_text())
    run_dir = new_run("changed", data={"train": str(data)}, train={"steps": 2})
    frozen = {"data.train": file_digest(str(data)), "data.eval": None, "base": None}
    record: dict[str, Any] = yaml.safe_load((run_dir / "job.yaml").read_text())
    (run_dir / "job.yaml").write_text(yaml.safe_dump({**record, "digests": frozen}))
    data.write_text(sums.read_text() * 2)
    with pytest.raises(AssertionError, match=r"(?s)InputChanged: data\.train: .*InputChanged: data\.train: "):
        launch(2, run_dir)
    assert result(run_dir) is None
    data.write_text(sums.read_text())
    launch(2, run_dir)
    assert (result(run_dir) or {})["state"] == "succeeded"
    assert [attempt.number for attempt in attempts(run_dir)] == [1, 2]
    assert changes(load_job(run_dir), frozen) == []


def test_a_large_file_of_the_same_size_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    before = folder_digest(tmp_path, scratch=False)
    assert folder_digest(tmp_path, scratch=False) == before
    with path.open("r+b") as stream:  # as another training leaves all weights changed
        for place in range(0, 64 << 20, 1 << 16):
            stream.seek(place)
            stream.write(b"x")
    assert folder_digest(tmp_path, scratch=False) != before
