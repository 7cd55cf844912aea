"""Forgetting: the loss on text that is not trained on, before the first step and after the last one."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.tracking.history import history
from runfolder.appended import read_lines
from runfolder.chain import Attempt
from runfolder.digests import changes, digests
from runfolder.job import Job
from trainer.export import results

WORDS = ("Then it sleeps.", "And again, until the morning.", "No sum is in here.", "The end of it.", "Or is it?")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Rows that have nothing to do with sums."""
    path = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": f"The quick brown fox jumps over the lazy dog. {words}"}) for words in WORDS]
    path.write_text("\n".join(rows))
    return path


def losses(run_dir: Path, metric: str) -> dict[int, float]:
    """What a run reported of a metric, by the step."""
    return {row["step"]: row[metric] for row in history(run_dir) if metric in row}


def test_text_that_is_not_trained_on_is_judged_as_held_out_rows_would_be(
    new_run: Any, launch: Any, held_out: Path, text: Path
) -> None:
    evaluation = {"max_new_tokens": 0, "every": 2, "test": 0.5, "rows": 8}
    settings: dict[str, Any] = {"train": {"steps": 4}, "sharding": {"zero": 3}}
    run = new_run("run", data={"eval": str(held_out), "retain": str(text)}, evaluation=evaluation, **settings)
    other = new_run("other", data={"eval": str(text)}, evaluation={"max_new_tokens": 0, "every": 2}, **settings)
    launch(2, run, other)
    expected = losses(other, "eval_loss")
    found = losses(run, "eval_retain_loss")
    assert found == {step: expected[step] for step in (0, 4)} and found[0] != found[4]
    assert losses(run, "loss") == losses(other, "loss"), "it was trained on"
    assert sorted(losses(run, "eval_loss")) == [0, 2, 4] and results(run)["eval_retain_loss"] == found[4]
    rows = read_lines(Attempt(run, 1), "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_test_loss" in row] == [4]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": {"eval": None}}, r"data\.retain, which is judged with the held-out rows"),
        ({"evaluation": {"before": False}}, r"allowed: with data\.eval and evaluation\.before"),
        ({"evaluation": {"every": 2, "keep": "best"}}, r"data\.retain with evaluation\.keep best or stop_after"),
        ({"objective": "dpo", "method": "lora"}, r"data\.retain with objective dpo; allowed: objective sft"),
    ],
)
def test_a_job_that_cannot_be_judged_so_is_refused(parts: dict[str, Any], message: str) -> None:
    job = {"base": "b", "train": {"steps": 1}, **parts}
    job["data"] = {"train": "t.jsonl", "eval": "e.jsonl", "retain": "r.jsonl", **parts.get("data", {})}
    with pytest.raises(ValidationError, match=message):
        Job.model_validate(job)


def test_it_is_of_the_digests_of_a_run(text: Path, held_out: Path) -> None:
    data = {"train": str(held_out), "eval": str(held_out), "retain": str(text)}
    job = Job.model_validate({"base": "/b", "train": {"steps": 1}, "data": data})
    known = digests(job, None)
    assert job.sources["data.retain"] == str(text) and changes(job, known) == []
    text.write_text("other")
    (change,) = changes(job, known)
    assert change.startswith(f"data.retain: {text} has changed since the submission")
