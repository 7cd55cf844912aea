"""Every method's output passes the check at the end of its run: plain PEFT and transformers load what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from campaign import KINDS, METHODS, TRAIN, assert_output_passed, merges
from llamas import random_llama
from safetensors import safe_open
from transformers import AutoTokenizer

from runfolder.chain import last_attempt
from trainer.omissions import omissions

VARIANTS: dict[str, dict[str, Any]] = {
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
    "embedding": {"kind": "lora", "rank": 4, "target": ["embed_tokens", "q_proj"]},
    "quantised relora": {"kind": "relora", "rank": 4, "quantised": True},
}
STAGES = {"fp32": (0, 3), "bf16": (1, 2)}
ALL = [*METHODS, *VARIANTS]
CASES = [
    pytest.param("fp32", list(VARIANTS), id="variants"),  # the methods themselves: test_matrix.py has a sample
    *(pytest.param(p, ALL, id=f"{p}-all", marks=pytest.mark.matrix) for p in STAGES),
]


@pytest.mark.parametrize(("precision", "names"), CASES)
def test_every_method_passes(new_run: Any, launch: Any, names: list[str], precision: str) -> None:
    runs = {
        name: new_run(
            name,
            method=method,
            train={"steps": 3, "precision": precision, **TRAIN[method["kind"]]},
            sharding={"zero": STAGES[precision][number % 2]},
            output={"merge": merges(method["kind"])},
        )
        for number, (name, method) in enumerate({**METHODS, **VARIANTS}.items())
        if name in names
    }
    launch(2, *runs.values())
    for name, run in runs.items():
        assert_output_passed({**METHODS, **VARIANTS}[name]["kind"], run)


TIED: dict[str, dict[str, Any]] = {  # on a base whose head is its embedding, and whether the output's still is
    "embedding": {"method": VARIANTS["embedding"], "sharding": {"zero": 3}},
    "rslora": {"method": {"kind": "rslora", "rank": 4, "target": ["embed_tokens"]}, "sharding": {"zero": 0}},
    "lora": {"method": METHODS["lora"], "sharding": {"zero": 2}},
    "longlora": {"method": METHODS["longlora"], "sharding": {"zero": 3}},
    "full": {"method": METHODS["full"], "sharding": {"zero": 3}},
    "galore": {"method": METHODS["galore"], "sharding": {"zero": 0}},
    "relora": {"method": METHODS["relora"], "sharding": {"zero": 3}},
}


def test_a_head_stays_tied_unless_an_adapter_parts_it(
    new_run: Any, launch: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "tied"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(base)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    random_llama(vocab_size=len(tokenizer), tie_word_embeddings=True, **ids).save_pretrained(base)
    common = {"base": str(base), "train": {"steps": 3, "lr": 1e-2}, "output": {"merge": True}}
    runs = {name: new_run(name, **common, **parts) for name, parts in TIED.items()}
    launch(2, *runs.values())
    for name, run in runs.items():
        assert omissions(last_attempt(run)) == [], name
        model = run / "output" if KINDS[TIED[name]["method"]["kind"]].makes_model else run / "output" / "merged"
        tied = name not in ("embedding", "rslora")
        assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] == tied, name
        with safe_open(model / "model.safetensors", framework="pt") as weights:
            assert ("lm_head.weight" in weights.keys()) != tied, name  # noqa: SIM118 (safe_open is no mapping)
