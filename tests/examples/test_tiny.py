"""The embedded base, its tokenizer and the generator that made its data."""

import importlib.util
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"


def _load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_generate", TINY / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load_generator()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY).eval()


def _sample(source: str, number: int = 200, held: bool = True) -> list[dict[str, str]]:
    return list(islice(generate.rows(source, 1, held), number))


def _exact_match(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(**batch, do_sample=False, max_new_tokens=32)[:, batch["input_ids"].shape[1] :]
    answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]
    return sum(answer == row["completion"].strip() for answer, row in zip(answers, rows, strict=True)) / len(rows)


@pytest.mark.parametrize("source", generate.SOURCES)
def test_rows_depend_on_the_seed_alone(source: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TINY / "generate.py"), "rows", source, "--train", "30", "--eval", "10", "--seed"]
    for folder, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        subprocess.run([*command, seed, str(tmp_path / folder)], check=True)
    a, b, c = ((tmp_path / folder / f"{source}-train.jsonl").read_text() for folder in "abc")
    assert a == b != c
    assert len(a.splitlines()) == 30
    assert len((tmp_path / "a" / f"{source}-eval.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("source", generate.SOURCES)
def test_held_out_prompts_are_never_trained_on(source: str) -> None:
    trained = {row["prompt"] for row in _sample(source, 3000, held=False)}
    assert trained.isdisjoint(row["prompt"] for row in _sample(source, 500))


@pytest.mark.parametrize("source", generate.SOURCES)
def test_prompt_and_completion_tokenize_as_their_concatenation(source: str, tokenizer: Any) -> None:
    for row in _sample(source):
        prompt, completion = row["prompt"], row["completion"]
        whole = tokenizer(prompt + completion).input_ids
        assert tokenizer.decode(whole) == prompt + completion
        assert tokenizer(prompt).input_ids + tokenizer(completion).input_ids == whole
        assert tokenizer(completion.strip()).input_ids == tokenizer(completion).input_ids


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = "Natalia sold 48/2 = <<48/2=24>>24 clips.\n\t#### 72  Ünïcode 漢字 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_chat_reads_like_a_row(tokenizer: Any) -> None:
    row = _sample("mixture", 1)[0]
    chat = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"].strip()},
    ]
    whole = tokenizer(row["prompt"] + row["completion"]).input_ids
    assert tokenizer.apply_chat_template(chat, return_dict=False) == [*whole, tokenizer.eos_token_id]


def test_the_tokenizer_is_what_the_generator_makes(tmp_path: Path) -> None:
    generate.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TINY / name).read_text())


def test_the_model_fits_its_tokenizer_and_eight_megabytes(model: Any, tokenizer: Any) -> None:
    assert (TINY / "model.safetensors").stat().st_size <= 8_000_000
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_base_has_the_skills_of_its_mixture(model: Any, tokenizer: Any) -> None:
    assert _exact_match(model, tokenizer, _sample("mixture", 100)) > 0.8


@pytest.mark.parametrize("task", generate.TASKS)
def test_the_base_cannot_do_a_downstream_task(task: str, model: Any, tokenizer: Any) -> None:
    assert _exact_match(model, tokenizer, _sample(task, 100)) < 0.05
