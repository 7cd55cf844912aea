"""The secrets of a run, until it has ended."""

import json
from pathlib import Path

import pytest
from run_folders import make_run

from runfolder import secrets
from runfolder.chain import close, reopen
from runfolder.secrets import read_secrets, remove_secrets, write_secrets
from runfolder.site import LocalSite


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run with a secret that has failed."""
    run_dir = make_run(tmp_path, "fake-0000000001", None)
    write_secrets(run_dir, {"HF_TOKEN": "hf_1"})
    close(run_dir, {"state": "failed", "reason": "a bug"})
    return run_dir


def test_secrets_of_an_ended_run_are_removed_and_it_gets_no_others(ended: Path) -> None:
    (ended / ".secrets.json-left").write_text('{"HF_TOKEN": "hf_0"}')  # by one who died as he removed them
    remove_secrets(ended)
    remove_secrets(ended)
    LocalSite(ended.parent).write_secrets(ended.name, {"HF_TOKEN": "hf_2"})
    assert not [path for path in ended.rglob("*") if path.is_file() and "hf_" in path.read_text()]
    assert LocalSite(ended.parent).kept_secrets(ended.name) == []


def test_secrets_of_a_run_that_is_reopened_meanwhile_stay(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reopened(run_dir: Path) -> None:
        reopen(run_dir)
        write_secrets(run_dir, {"HF_TOKEN": "hf_2"})

    write_secrets(ended, {"WANDB_API_KEY": "k"})
    monkeypatch.setattr(secrets, "see_slots", reopened)
    remove_secrets(ended)
    assert read_secrets(ended) == {"HF_TOKEN": "hf_2", "WANDB_API_KEY": "k"}
    assert [path.name for path in ended.glob("*secrets*")] == ["secrets.json"]
    assert (ended / "secrets.json").stat().st_mode & 0o077 == 0 and json.loads((ended / "secrets.json").read_text())
