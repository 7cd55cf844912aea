"""Invariant 4: what is exported, loaded by plain PEFT or transformers, is what was trained and evaluated."""

from pathlib import Path
from typing import Any

from finished_runs import events, loss_gap
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.export import results

RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": {"kind": "full"}, "sharding": {"zero": 3}},
    "lora": {"method": {"kind": "lora", "rank": 4}, "sharding": {"zero": 3}},
    "rslora": {"method": {"kind": "rslora", "rank": 4, "alpha": 3}, "sharding": {"zero": 2}},
    "dora": {"method": {"kind": "dora", "rank": 4, "target": ["q_proj", "down_proj"]}, "sharding": {"zero": 3}},
}


def test_plain_libraries_load_what_was_trained(
    new_run: Any, launch: Any, held_out: Path, cache: Path, tiny_base: Path
) -> None:
    from peft import PeftModel

    common: dict[str, Any] = {
        "train": {"steps": 4, "lr": 1e-2},
        "data": {"eval": str(held_out)},
        "evaluation": {"max_new_tokens": 4},
        "output": {"merge": True},
    }
    runs = {name: new_run(name, **common, **parts) for name, parts in RUNS.items()}
    launch(2, *runs.values())
    samples_are_kept(runs["lora"])
    phases_are_told(runs["lora"])
    for name, run_dir in runs.items():
        said = results(run_dir)
        assert {"eval_loss", "eval_exact_match"} <= said.keys()
        output = run_dir / "output"
        if name == "full":
            models = [AutoModelForCausalLM.from_pretrained(output)]
        else:
            base = AutoModelForCausalLM.from_pretrained(tiny_base)
            merged = AutoModelForCausalLM.from_pretrained(output / "merged")
            models = [PeftModel.from_pretrained(base, output), merged]
        for model in models:
            assert loss_gap(model, run_dir, cache) < 1e-6
        assert loss_gap(AutoModelForCausalLM.from_pretrained(tiny_base), run_dir, cache) > 1e-4
        assert len(AutoTokenizer.from_pretrained(output)) == len(AutoTokenizer.from_pretrained(tiny_base))
        card = (output / "README.md").read_text()
        assert "None" not in card and "()" not in card
        assert name != "lora" or "alpha 8.0" in card
        assert f"**{name}**" in card and str(tiny_base) in card and f"{said['eval_loss']:.4f}" in card


def samples_are_kept(run: Path) -> None:
    """What the model wrote to the prompts, before and after."""
    samples = [event for event in events(run) if event["event"] == "sample"]
    assert {sample["step"] for sample in samples} == {0, 4}
    assert all({"prompt", "answer", "written"} <= sample.keys() for sample in samples)


def phases_are_told(run: Path) -> None:
    """What begins after the last step, and how much of the evaluation there is."""
    told = events(run)
    kinds = [event["event"] for event in told if event["event"] not in ("evaluating", "sample", "compared")]
    assert kinds[:4] == ["workers_up", "loading_base", "base_loaded", "plan"]
    assert kinds[-3:] == ["exporting", "exported", "merging"]
    assert kinds.index("saving") < kinds.index("checkpoint") < kinds.index("exporting")
    evaluations = [event for event in told if event["event"] == "evaluating"]
    begun = [(event["step"], event["what"], event["total"]) for event in evaluations if not event["done"]]
    assert begun == [(step, what, 40) for step in (0, 4) for what in ("rows", "answers")]
