"""Runs as parents of a combination, and as what is served: their outputs, and what they scored."""

import json
from pathlib import Path

import pytest
import torch
from run_folders import claim, make_run, plan, steps
from safetensors.torch import save_file

from orchestrator import runs
from orchestrator.combine import combine_adapters, report_lines
from orchestrator.errors import InputError
from orchestrator.serve import adapter_folders
from runfolder.chain import close

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def finished_run(home: Path, name: str, exact_match: float | None) -> Path:
    """A run that left a small LoRA adapter, and was evaluated if it has a score."""
    run_dir = make_run(home / "runs", runs.new_id(name), None)
    attempt = claim(run_dir)
    plan(attempt)
    steps(attempt, 1, 10)
    if exact_match is not None:
        row = {"step": 10, "time": 1.0, "eval_loss": 0.5, "eval_exact_match": exact_match}
        with (attempt.folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(row) + "\n")
    output = attempt.folder / "output"
    output.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "b",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    (output / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{LAYER}.lora_A.weight": torch.ones(2, 8), f"{LAYER}.lora_B.weight": torch.ones(8, 2)},
              output / "adapter_model.safetensors")  # fmt: skip
    close(run_dir, {"state": "succeeded", "reason": None})
    return run_dir


def test_a_report_has_what_each_parent_scored(home: Path, tmp_path: Path) -> None:
    first, second = finished_run(home, "first", 0.625), finished_run(home, "second", None)
    report = combine_adapters(tmp_path / "mixed", [f"{first.name}:0.75", f"{second.name}:0.25"], "svd")
    scores = [parent["scores"] for parent in report["parents"]]
    assert scores == [{"eval_loss": 0.5, "eval_exact_match": 0.625}, {}]
    lines = report_lines(report)
    assert lines[0] == f"0.75 x {first.name}: eval_loss 0.5, eval_exact_match 0.625"
    assert lines[1] == f"0.25 x {second.name}: no evaluation is known"
    assert "interfere" in lines[-1]


def test_a_run_is_served_by_its_output(home: Path) -> None:
    run_dir = finished_run(home, "served", None)
    assert adapter_folders([f"mine={run_dir.name}"]) == {"mine": run_dir / "output"}
    unfinished = make_run(home / "runs", runs.new_id("unfinished"), None)
    with pytest.raises(InputError, match="found no output; allowed: a run that has succeeded"):
        adapter_folders([f"mine={unfinished.name}"])
