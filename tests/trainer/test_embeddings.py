"""A tokenizer with more ids than its base has embeddings: those that lack are added, trained, exported and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import curve, difference, events, interrupted, loss_gap
from peft import PeftModel
from sampling import each_sampled
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods.parts import quantised
from orchestrator.planning.plan import plan
from runfolder.record import load_job

ZERO = {"full": 3, "galore": 3}
NEW = ["<|im_start|>", "<|im_end|>", "<think>"]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "galore": {"kind": "galore", "rank": 4, "refresh_every": 2},
    "lora": {"kind": "lora", "rank": 4},
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
    "dora": {"kind": "dora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4, "init": "loftq"},
}
CASES = [(kind, ties) for kind in METHODS for ties in ("tied", "untied")]


@pytest.fixture
def base(ties: str, tmp_path: Path) -> Path:
    """A tiny base whose tokenizer has three tokens more than it has embeddings."""
    from llamas import random_llama

    folder = tmp_path / "longer"
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent.parent / "examples" / "tiny")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tied = {"tie_word_embeddings": ties == "tied"}
    random_llama(vocab_size=len(tokenizer), initializer_range=0.1, **tied, **special).save_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that use the new tokens, in prompts and in answers."""
    path = tmp_path_factory.mktemp("data") / "marked.jsonl"
    rows = [
        {"prompt": f"{NEW[0]}{a} + {b} ={NEW[1]}", "completion": f"{NEW[2]} {a + b}"}
        for a in range(6)
        for b in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("kind", "ties"), each_sampled(CASES))
def test_new_embeddings_are_trained_and_delivered(
    kind: str, base: Path, marked: Path, new_run: Any, launch: Any, cache: Path
) -> None:
    common: dict[str, Any] = {
        "base": {"model": str(base), "resize_embeddings": True},
        "method": METHODS[kind],
        "data": {"train": str(marked), "eval": str(marked), "parse_special": True},
        "train": {"steps": 6, "lr": 5e-3, "eps": 1e-6},
        "evaluation": {"max_new_tokens": 0},
        "checkpoint": {"every": 3, "keep": 9},
    }
    alone = new_run("alone", **common)
    pair = new_run("pair", **common, sharding={"zero": ZERO.get(kind, 2)}, output={"merge": True})
    launch(1, alone)
    launch(2, pair)
    assert difference(curve(pair), curve(alone)) < 1e-6
    resumed = interrupted(pair, "resumed", 3)
    launch(2, resumed)
    assert curve(resumed, 2) == curve(pair)[3:]
    check_counts(pair)
    rows = len(AutoTokenizer.from_pretrained(base))
    for model in outputs(pair, base, rows):
        assert model.get_input_embeddings().weight.shape[0] == rows
        assert loss_gap(model, pair, cache) < 1e-5
        tuned = embeddings(model)
        moved = (tuned[-len(NEW) :] - tuned[: -len(NEW)].mean(0)).abs().amax(1)
        assert moved.min() > 1e-3, "each new row began as the mean of the others"


def check_counts(run: Path) -> None:
    """The plan on the laptop says what the trainer found."""
    sizes = plan(load_job(run)).sizes
    (said,) = (event for event in events(run) if event["event"] == "plan")
    assert sizes is not None
    assert (sizes.parameters, sizes.trained) == (said["parameters"], said["trained"])


def embeddings(model: Any) -> torch.Tensor:
    """The input embeddings that a model computes with."""
    found: torch.Tensor = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).detach()
    return found


def outputs(run: Path, base: Path, rows: int) -> list[Any]:
    """The output of a run as plain PEFT and transformers load it, and the merged model."""
    if load_job(run).method.makes_model:
        return [AutoModelForCausalLM.from_pretrained(run / "output")]
    in_4_bits = quantised.load_options("nf4", True, torch.float32) if load_job(run).method.quantises else {}
    longer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **in_4_bits)
    longer.resize_token_embeddings(rows)
    for _, layer in quantised.four_bit_layers(longer):
        layer.support_avx512bf16_for_cpu = False  # else an evaluation computes in bf16 on some CPUs
    return [
        PeftModel.from_pretrained(longer, run / "output"),
        AutoModelForCausalLM.from_pretrained(run / "output" / "merged"),
    ]
