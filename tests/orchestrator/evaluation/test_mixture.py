"""`fleetune combine --tasks`: parents and mixture evaluated in one pass, by what `fleetune evaluate` says of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import fleetune
from orchestrator.commands.serve import serve_app
from orchestrator.errors import InputError

TINY = Path(__file__).parents[3] / "examples" / "tiny"
ROWS = 16


def adapter(folder: Path, size: float) -> Path:
    """A LoRA adapter of the tiny base that changes its queries by so much."""
    shape = json.loads((TINY / "config.json").read_text())
    width, generator = shape["hidden_size"], torch.Generator().manual_seed(7)
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        weights[f"{name}.lora_B.weight"] = size * torch.randn(width, 2, generator=generator)
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the tiny base's mixture, as a task."""
    folder = tmp_path_factory.mktemp("mixture")
    command = [sys.executable, str(TINY / "generate.py"), "rows", "mixture", "--train", "1", "--eval", str(ROWS)]
    subprocess.run([*command, str(folder)], check=True)
    described = {"kind": "generation", "data": "mixture-eval.jsonl", "max_new_tokens": 8}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(described))
    return folder / "mixture.yaml"


def test_the_report_says_what_parents_score_and_what_the_mixture_does(task: Path, tmp_path: Path) -> None:
    mild, wild = adapter(tmp_path / "mild", 1e-6), adapter(tmp_path / "wild", 50.0)
    command = ["combine", f"{mild}:0.5", f"{wild}:1", "--out", str(tmp_path / "mixed"), "--base", str(TINY)]
    ran = CliRunner().invoke(serve_app, [*command, "--tasks", str(task)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    written = json.loads((tmp_path / "mixed" / "combination.json").read_text())
    (found,) = written["evaluation"]["tasks"]
    assert [result["label"] for result in found["results"]] == ["base", "mild", "wild", "mixed"]

    alone = fleetune.evaluate([str(mild), str(wild), str(tmp_path / "mixed")], [task], base=str(TINY))
    assert alone.asked == 0, "what combine has asked is there"
    (evaluated,) = alone.tasks
    _, of_mild, of_wild, of_mixed = evaluated.results
    for result, said in zip(evaluated.results, found["results"], strict=True):
        assert said["measures"]["exact_match"]["value"] == result.share_right
    against_mild, against_wild = found["against_parents"]
    assert against_mild["right"] == sum(of_mild.right) > sum(of_mixed.right), "the wild parent should interfere"
    assert (
        against_mild["kept"] == sum(map(lambda a, b: a and b, of_mild.right, of_mixed.right)) < against_mild["right"]
    )
    difference = of_mixed.share_right - of_mild.share_right
    assert against_mild["difference"]["exact_match"]["value"] == pytest.approx(difference)
    assert against_wild["right"] == sum(of_wild.right)
    lines = ran.output.splitlines()
    assert f"mixture, {ROWS} rows, exact match:" in lines
    kept = f"it keeps {against_mild['kept']} of the {against_mild['right']} that mild has right"
    assert any(line.startswith("  mixed to mild: ") and line.endswith(kept) for line in lines)


def test_what_could_not_be_evaluated_is_said_before_anything_is_combined(task: Path, tmp_path: Path) -> None:
    parents = [f"{adapter(tmp_path / name, 1.0)}:1" for name in ("a", "b")]
    out = tmp_path / "mixed"
    for options, said in (
        (["--tasks", str(tmp_path / "no.yaml"), "--base", str(TINY)], "no.yaml"),
        (["--tasks", str(task)], "--base: missing; no run says which it is"),
        (["--limit", "3"], "--limit: found without --tasks"),
    ):
        with pytest.raises(InputError, match=said):
            CliRunner().invoke(serve_app, ["combine", *parents, "--out", str(out), *options], catch_exceptions=False)
        assert not out.exists()


def test_an_evaluation_that_fails_leaves_the_mixture_and_its_report(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = [f"{adapter(tmp_path / name, 1.0)}:1" for name in ("a", "b")]
    monkeypatch.setattr("orchestrator.evaluation.process.EVALUATOR", [sys.executable, "-c", "raise SystemExit(3)"])
    asked = ["--tasks", str(task), "--base", str(TINY), "--limit", "2"]
    ran = CliRunner().invoke(serve_app, ["combine", *parents, "--out", str(tmp_path / "mixed"), *asked])
    assert ran.exception
    written = json.loads((tmp_path / "mixed" / "combination.json").read_text())
    assert written["how"] == "cat" and "evaluation" not in written
