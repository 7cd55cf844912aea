"""A rename that was done and whose answer was lost: the client asks again, and is told that nothing is there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking import store
from runfolder import chain
from runfolder.files import read_json, take_name, write_json
from runfolder.record import create_run_folder, read_record

RECORD = {"run_id": "a", "cluster": "local", "submitted": 1.0, "job": {"train": {"steps": 1}}}


@pytest.fixture(autouse=True)
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rename that succeeds is done once more, as a client of NFS does whose first answer was lost."""

    def twice(rename: Callable[..., None]) -> Callable[..., None]:
        def do(source: Any, target: Any, **where: Any) -> None:
            rename(source, target, **where)
            rename(source, target, **where)

        return do

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, twice(getattr(os, name)))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_folder_is_made_once(tmp_path: Path) -> None:
    assert create_run_folder(tmp_path / "a", RECORD) is None
    assert read_record(tmp_path / "a")["run_id"] == "a"
    assert create_run_folder(tmp_path / "a", {**RECORD, "run_id": "b"})["run_id"] == "a"  # type: ignore[index]
    assert left_in(tmp_path) == ["a"]


def test_a_file_is_written(tmp_path: Path) -> None:
    for number in range(2):
        write_json(tmp_path / "x.json", {"number": number})
        assert read_json(tmp_path / "x.json") == {"number": number}
    assert left_in(tmp_path) == ["x.json"]


def test_the_mlflow_run_of_the_first_counts(tmp_path: Path) -> None:
    for mlflow_run_id in ("first", "second"):
        store._claim_mlflow_run(tmp_path, {"mlflow_run_id": mlflow_run_id, "uri": "http://host"})
        counting = store.counting_run(tmp_path)
        assert counting and counting["mlflow_run_id"] == "first"
    assert left_in(tmp_path) == ["mlflow"]


def test_a_slot_is_sealed_and_closed(tmp_path: Path) -> None:
    attempt = chain.claim_next(tmp_path, None)
    assert attempt and attempt.close({"state": "failed"})
    assert left_in(tmp_path / "attempts" / "2") == ["claim.json", "seals.json"]


def test_what_was_not_renamed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    with pytest.raises(FileNotFoundError):
        take_name(tmp_path / "prepared", tmp_path / "nowhere" / "name")
    assert left_in(tmp_path) == []
