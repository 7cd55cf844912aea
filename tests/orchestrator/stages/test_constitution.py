"""Constitutional AI on the tiny base, as examples/constitution has it, and what a change of it redoes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from stages_here import do_all_stages

import fleetune
from runfolder.draws import drawn_principle
from runfolder.stages import noted_stage, stage_folders

ROOT = Path(__file__).parents[3]
STAGES = ("revise", "sft", "sample", "judge", "dpo", "report")
PRINCIPLES = [{"id": "knife"}, {"id": "saw"}, {"id": "rope"}]
FEW = ["stages.sft.train.steps=25", "stages.dpo.train.steps=6"]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A copy of the example whose base is where it was."""
    folder = tmp_path / "constitution"
    shutil.copytree(ROOT / "examples" / "constitution", folder)
    path = folder / "job.yaml"
    job = yaml.safe_load(path.read_text())
    job["base"] = str(ROOT / "examples" / "tiny")
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "output" / "rows.jsonl").read_text().splitlines()]


def reported(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "attempts" / "1" / "metrics.jsonl").read_text().splitlines()]


def measured(folder: Path) -> dict[str, float]:
    return reported(folder)[-1]


def answered(folder: Path) -> list[float]:
    """How many answers there were after each look, those that were there before among them."""
    return [row["answered"] for row in reported(folder) if "answered" in row]


@pytest.mark.usefixtures("home")
def test_a_model_learns_from_its_principles_and_a_change_redoes_what_depends_on_it(
    example: Path, launch: Callable[..., None]
) -> None:
    first = fleetune.submit(example, overrides=FEW).run_dir
    assert do_all_stages(first, launch)["state"] == "succeeded"
    folders = stage_folders(first, STAGES)
    revised = measured(folders["revise"])
    assert revised["harm_before_share"] > 0.9 and revised["harm_revised_share"] < 0.1
    assert measured(folders["report"])["harm_share"] < 0.2, "of prompts that no stage has seen"
    pairs = rows_of(folders["judge"])
    agrees = [pair["chosen"] == pair["revised"] for pair in pairs]
    assert len(pairs) > 20 and sum(agrees) / len(agrees) > 0.9
    assert {row["id"] for row in rows_of(folders["sample"])} >= {pair["id"] for pair in pairs}

    principles = example.with_name("constitution.yaml")
    text = principles.read_text()
    principles.write_text(text.replace("compare: is saw there?", "compare: is the saw there?"))
    other = fleetune.submit(example, overrides=FEW).run_dir
    do_all_stages(other, launch)
    notes = {stage: noted_stage(other, stage) for stage in STAGES}
    reused = {stage for stage, note in notes.items() if note is not None and note.reused}
    assert {"sft", "sample"} <= reused, "what the first stage reads has changed, and what it writes has not"
    assert not reused & {"revise", "judge", "dpo"}
    folders = stage_folders(other, STAGES)
    assert len(answered(folders["revise"])) == 0, "no prompt is another one"
    drew = sum(drawn_principle(PRINCIPLES, row["id"], 0, 0)["id"] == "saw" for row in rows_of(folders["sample"]))
    assert drew > 0 and answered(folders["judge"])[-1] - answered(folders["judge"])[0] <= 2 * drew
