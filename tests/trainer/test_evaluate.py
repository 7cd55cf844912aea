"""Generation in evaluation: which prompts go together and how far, where answers end, the same on any workers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from finished_runs import events
from llamas import random_llama
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from trainer.export import results
from trainer.generation import PROMPTS_AT_ONCE, TOKENS_AT_ONCE, PromptGroup, groups, rounds

POSITIONS = 64


def test_groups_are_bounded_by_tokens_and_rows() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 4000) for _ in range(500)]
    made = groups(lengths, 256, None)
    assert sorted(number for group in made for number in group.prompts) == list(range(500))
    for group in made:
        longest = max(lengths[number] for number in group.prompts)
        assert len(group.prompts) * (longest + group.new_tokens) <= TOKENS_AT_ONCE
        assert len(group.prompts) <= PROMPTS_AT_ONCE
    assert [group.prompts for group in groups([30_000, 20_000], 8, None)] == [(1,), (0,)]


def test_no_prompt_goes_beyond_the_positions_of_the_base() -> None:
    made = groups([10, 500, 512, 400, 600, 500], 256, 512)
    assert made == [PromptGroup((0,), 256), PromptGroup((3,), 112), PromptGroup((1, 5), 12)]


def test_a_round_has_one_limit() -> None:
    made = groups([*range(1, 70), 500, 500, 400], 256, 512)
    for workers in (1, 2, 3):
        dealt = list(rounds(made, workers))
        assert [group for each in dealt for group in each] == made
        assert all(len({group.new_tokens for group in each}) == 1 for each in dealt)


@pytest.fixture
def narrow_base(tiny_base: Path, tmp_path: Path) -> Path:
    """A random GPT-2, whose positions are learnt: to go beyond them is an IndexError."""
    import torch

    folder = tmp_path / "narrow"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder)
    special = {f"{name}_token_id": tokenizer.convert_tokens_to_ids("!") for name in ("bos", "eos")}
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, **special, initializer_range=0.5)).save_pretrained(folder)
    # What a base may ask for, and what is no greedy choice.
    GenerationConfig(no_repeat_ngram_size=2, suppress_tokens=[5, 6], min_new_tokens=3).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Rows whose prompts have from 2 to 80 tokens: more than one group."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": " 7" * count, "completion": " 8"} for count in (80, 66, 64, 61, 60, 60, 55, *range(2, 36))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_do_not_depend_on_workers_and_long_prompts_are_counted(
    new_run: Any, launch: Any, narrow_base: Path, prompts: Path
) -> None:
    runs = {
        (world, zero, kind): new_run(
            f"{kind}-{world}-{zero}",
            base=str(narrow_base),
            method={"kind": kind, **({"tokens": 4} if kind == "prompt" else {"rank": 4})},
            data={"eval": str(prompts), "seq_len": POSITIONS, "too_long": "cut"},
            train={"steps": 1, "lr": 1e-9},
            sharding={"zero": zero},
            evaluation={"max_new_tokens": 6, "before": False},
        )
        for world, zero, kind in ((1, 0, "lora"), (2, 3, "lora"), (1, 0, "prompt"), (2, 0, "prompt"))
    }
    for (world, _, _), run in runs.items():
        launch(world, run)
    for kind, without in (("lora", 3), ("prompt", 6)):
        found = [run for key, run in runs.items() if key[2] == kind]
        said = [[event for event in events(run) if event["event"] == "prompts_limited"] for run in found]
        assert all(event["without_room"] == without for each in said for event in each)
        assert all(len(each) == 1 and each[0]["with_less_room"] > 0 for each in said)
        samples = [[e["written"] for e in events(run) if e["event"] == "sample"] for run in found]
        assert all(each == samples[0] for each in samples) and any(samples[0])
        assert len({results(run)["eval_exact_match"] for run in found}) == 1


def test_padding_on_the_left_changes_no_answer(new_run: Any, launch: Any, narrow_base: Path, tmp_path: Path) -> None:
    """What the trainer writes of prompts in one group is what plain transformers writes of each alone."""
    path = tmp_path / "few.jsonl"
    rows = [{"prompt": " 7" * count + " +", "completion": " 8"} for count in (3, 9, 20, 31, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = new_run("padded", base=str(narrow_base), data={"eval": str(path)}, train={"steps": 1, "lr": 1e-9})
    launch(1, run)
    tokenizer = AutoTokenizer.from_pretrained(narrow_base)
    model = GPT2LMHeadModel.from_pretrained(narrow_base)
    ends = [tokenizer.eos_token_id, model.config.eos_token_id]
    for sample in [event for event in events(run) if event["event"] == "sample"][:5]:
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, do_sample=False)
        out = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=POSITIONS - ids.shape[1])
        written = out[0, ids.shape[1] :].tolist()
        written = written[:-1] if written[-1] in ends else written
        assert sample["written"] == tokenizer.decode(written, skip_special_tokens=True)
        assert "!" not in sample["written"]


def test_an_answer_ends_where_the_tokenizer_says_also_if_the_base_says_otherwise(
    new_run: Any, launch: Any, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "other-end"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(base)
    other = tokenizer.convert_tokens_to_ids("!")
    random_llama(
        vocab_size=len(tokenizer), initializer_range=0.02, eos_token_id=other, pad_token_id=0
    ).save_pretrained(base)
    data = tmp_path / "sort.jsonl"
    data.write_text(json.dumps({"prompt": "Sort: red cat dog", "completion": " cat dog red"}) + "\n")
    run = new_run(
        "ends",
        base=str(base),
        method={"kind": "full"},
        data={"train": str(data), "eval": str(data)},
        train={"steps": 80, "batch_tokens": 64},
        evaluation={"max_new_tokens": 24},
    )
    launch(1, run)
    assert results(run)["eval_loss"] < 0.05
    assert results(run)["eval_exact_match"] == 1.0
