"""The first job of the README, as it stands there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fleetune

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "README.md").read_text().partition("\n## The first job\n")[2].partition("\n## ")[0]


def block(kind: str) -> str:
    """The one block of the chapter that is of this kind."""
    (text,) = re.findall(rf"```{kind}\n(.*?)```", CHAPTER, re.DOTALL)
    return str(text)


def test_the_first_job_is_planned_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(block("yaml"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (command,) = re.findall(r"^    python (.*?)  +#", CHAPTER, re.MULTILINE)
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    plan = fleetune.plan("job.yaml")
    assert not plan.warnings
    assert (plan.steps, plan.rows, plan.eval_rows) == (60, 8000, 100)
    job = yaml.safe_load(block("yaml"))
    shown = json.loads(block("json"))
    made = json.loads((tmp_path / job["data"]["train"]).read_text().splitlines()[0])
    assert shown.keys() == made.keys()


def test_the_row_that_is_shown_is_one_that_can_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(block("json") * 4)
    job = yaml.safe_load(block("yaml")) | {"base": str(ROOT / "examples" / "tiny")}
    job["data"] = {"train": str(tmp_path / "train.jsonl"), "seq_len": 96}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    view = fleetune.rows(tmp_path / "job.yaml")
    learned = "".join(token.text for token in view.examples[0].tokens if token.learned)
    assert learned.startswith(json.loads(block("json"))["completion"])
