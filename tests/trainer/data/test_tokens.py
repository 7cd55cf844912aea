"""Tokens: what is learned, what is cut, and a cache that many processes make together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import CHAT, tokenizer

import trainer.data.tokens
from trainer.data import shards
from trainer.data.encode import Reading
from trainer.data.files import RowError
from trainer.data.tokens import Tokens, read_prompts, tokenise

DATA = Path(__file__).parents[2] / "data"
HERE = Path(__file__).parents[2]
CUT = Reading(64, too_long="cut")


def jsonl(folder: Path, *records: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learned(tokens: Tokens, index: int, tok: Any) -> tuple[str, str]:
    """The whole text of an example, and the text of its labels."""
    example = tokens.document(index)
    return tok.decode(example.ids), tok.decode(example.ids[example.target])


def same(a: Tokens, b: Tokens) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(a.document(i).ids, b.document(i).ids)
        and np.array_equal(a.document(i).target, b.document(i).target)
        for i in range(len(a))
    )


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.data.tokens, "_SHARD_ROWS", 100)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for nine shards."""
    records = ({"prompt": f"{i} + {i} =", "completion": f" {i + i}" * (i % 40 + 1)} for i in range(900))
    return jsonl(tmp_path_factory.mktemp("large"), *records)


def test_the_loss_is_on_the_answer(tmp_path: Path) -> None:
    tok = tokenizer()
    tokens = tokenise(DATA / "questions.jsonl", tok, Reading(256), tmp_path)
    prompt = "Question: How many legs has a dog?\nAnswer:"
    assert learned(tokens, 0, tok) == (f"<s>{prompt} A dog has 4 legs.</s>", " A dog has 4 legs.</s>")
    assert learned(tokens, 2, tok)[1] == " dog 🐕</s>"
    alone = [*tok(prompt)["input_ids"], *tok(" A dog has 4 legs.", add_special_tokens=False)["input_ids"]]
    assert tokens.document(0).ids.tolist() == [*alone, tok.eos_token_id]
    assert tokens.lengths.tolist() == [len(tokens.document(i).ids) for i in range(3)]
    assert tokens.targets.tolist() == [tokens.document(i).target.sum() for i in range(3)]
    assert (tokens.truncated, tokens.dropped) == (0, 0)


def test_prompts_are_the_beginning_of_what_was_trained(tmp_path: Path) -> None:
    for name, tok in (
        ("questions", tokenizer()),
        ("questions", tokenizer(bos=False)),
        ("chat", tokenizer(chat=CHAT)),
    ):
        tokens = tokenise(DATA / f"{name}.jsonl", tok, Reading(256), tmp_path)
        asked = read_prompts(DATA / f"{name}.jsonl", tok, Reading(256))
        assert len(asked) == len(tokens)
        for i, prompt in enumerate(asked):
            example = tokens.document(i)
            assert example.ids[: len(prompt.ids)].tolist() == prompt.ids
            end = example.ids.tolist().index(tok.eos_token_id, len(prompt.ids)) + 1
            assert example.target[len(prompt.ids) : end].all()
            assert not example.target[end:].any()  # a template's newline behind the end, which nobody generates
            rest = tok.decode(example.ids[len(prompt.ids) :], skip_special_tokens=True)
            assert rest.strip() == prompt.answer


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_learned_but_for_its_first_token(tmp_path: Path, bos: bool) -> None:
    tok = tokenizer(bos=bos)
    source = jsonl(tmp_path, {"text": "a dog has legs"})
    example = tokenise(source, tok, Reading(64), tmp_path).document(0)
    assert tok.decode(example.ids) == ("<s>" if bos else "") + "a dog has legs</s>"
    assert example.target.tolist() == [False] + [True] * (len(example.ids) - 1)
    assert read_prompts(source, tok, Reading(64)) == []


def test_neither_bos_nor_eos_is_doubled(tmp_path: Path) -> None:
    tok = tokenizer()
    source = jsonl(tmp_path, {"prompt": "<s>dog:", "completion": " legs</s>"}, {"prompt": "", "completion": "dog"})
    tokens = tokenise(source, tok, Reading(64, parse_special=True), tmp_path)
    assert learned(tokens, 0, tok) == ("<s>dog: legs</s>", " legs</s>")
    assert learned(tokens, 1, tok) == ("<s>dog</s>", "dog</s>")


def test_chat_learns_the_assistant_turns_only(tmp_path: Path) -> None:
    tok = tokenizer(chat=CHAT)
    tokens = tokenise(DATA / "chat.jsonl", tok, Reading(256), tmp_path)
    first = "<s><|user|>How many legs has a dog?\n<|assistant|>4</s>\n"
    assert learned(tokens, 0, tok) == (first, "4</s>")
    whole = "<s><|system|>Be brief.\n<|user|>2 + 2?\n<|assistant|>4</s>\n<|user|>And 3 + 3?\n<|assistant|>6</s>\n"
    assert learned(tokens, 1, tok) == (whole, "4</s>6</s>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "field messages: the base's tokenizer has no chat template: give rows as prompt/completion"),
        (
            CHAT.replace("{{ bos_token }}", "{{ messages | length }}"),
            "row 1, field messages: the chat template changes",
        ),
        (
            "{{ raise_exception('no system turns') }}",
            "row 1, field messages: the chat template refuses it: no system",
        ),
    ],
)
def test_chat_templates_that_cannot_be_used(tmp_path: Path, template: str | None, message: str) -> None:
    with pytest.raises(RowError, match=message):
        tokenise(DATA / "chat.jsonl", tokenizer(chat=template), Reading(256), tmp_path)


def test_no_end_token(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(RowError, match="has no EOS token"):
        tokenise(DATA / "questions.jsonl", tok, Reading(256), tmp_path)


def test_long_examples_are_cut_and_counted(tmp_path: Path) -> None:
    tok = tokenizer(bos=False)
    records = [("a", "b"), ("a", "b" * 50), ("a" * 50, "b"), ("a" * 7, "b")]
    source = jsonl(tmp_path, *({"prompt": prompt, "completion": completion} for prompt, completion in records))
    tokens = tokenise(source, tok, Reading(8, too_long="cut"), tmp_path)
    assert [learned(tokens, i, tok) for i in range(3)] == [
        ("ab</s>", "b</s>"),
        ("a" + "b" * 7, "b" * 7),
        ("a" * 7 + "b", "b"),
    ]
    assert (len(tokens), tokens.truncated, tokens.dropped) == (3, 2, 1)
    with pytest.raises(RowError, match="no row has a label among its first 1 tokens: raise data"):
        tokenise(source, tok, Reading(1), tmp_path)


def test_the_key_follows_data_tokenizer_and_length(tmp_path: Path) -> None:
    source = jsonl(tmp_path, {"text": "a dog"})
    for tok, seq_len in ((tokenizer(), 64), (tokenizer(), 64), (tokenizer(), 32), (tokenizer(bos=False), 64)):
        tokenise(source, tok, Reading(seq_len), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3
    tokenise(jsonl(tmp_path, {"text": "a cat"}), tokenizer(), Reading(64), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_whole_cache_is_not_made_again(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenise(large, tokenizer(), CUT, tmp_path)
    assert len(first) + first.dropped == 900
    monkeypatch.setattr(shards, "_write", None)
    assert same(tokenise(large, tokenizer(), CUT, tmp_path), first)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "other", "manifest", "half manifest"])
def test_a_damaged_cache_is_mended(tmp_path: Path, large: Path, damage: str) -> None:
    first = tokenise(large, tokenizer(), CUT, tmp_path)
    expected = [first.document(i).ids.tolist() for i in range(len(first))]
    del first
    (folder,) = tmp_path.iterdir()
    shard, manifest = folder / "00003.arrow", folder / "manifest.json"
    content = shard.read_bytes()
    if damage == "flip":
        content = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    shard.unlink()  # and not changed in place, as it may still be mapped
    shard.write_bytes({"cut": content[:-100], "empty": b""}.get(damage, content))
    if damage == "gone":
        shard.unlink()
    if damage == "other":
        manifest.write_text(json.dumps({"shards": 3, "rows": 900}))
    if "manifest" in damage:
        manifest.write_text('{"shards": ' if "half" in damage else "{}")
    again = tokenise(large, tokenizer(), CUT, tmp_path)
    assert [again.document(i).ids.tolist() for i in range(len(again))] == expected
    assert json.loads(manifest.read_text()) == {"shards": 9, "rows": 900}


def test_a_dead_makers_shards_are_made_by_others(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SHARD_TIMEOUT_S", 0.2)
    tokenise(large, tokenizer(), CUT, tmp_path)
    (folder,) = tmp_path.iterdir()
    for path in [folder / "manifest.json", *folder.glob("0000[246].arrow")]:
        path.unlink()
    for number in (2, 4):
        (folder / f"0000{number}.claim").write_bytes(b"half a sh")
    assert len(tokenise(large, tokenizer(), CUT, tmp_path)) == 900
    assert len(list(folder.glob("*.arrow"))) == 9


WORKER = """
import sys, time
from pathlib import Path
# The project first: beside this test there are folders of the same names.
sys.path[:0] = [str(Path(sys.argv[1]).parent), sys.argv[1]]
from small import tokenizer
from trainer.data import shards, tokens
from trainer.data.encode import Reading
write = shards._write
def counted(draft, shard, path):
    if sys.argv[4] == "stop":
        draft.write(b"half a shard")
        draft.flush()
    print(path.name, flush=True)
    time.sleep(600 if sys.argv[4] == "stop" else 0.1)
    write(draft, shard, path)
shards._write = counted
tokens._SHARD_ROWS = 100
print(len(tokens.tokenise(sys.argv[2], tokenizer(), Reading(64, too_long="cut"), Path(sys.argv[3]))), flush=True)
"""


def start(source: Path, cache: Path, mode: str = "go") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(HERE), str(source), str(cache), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAYON_NUM_THREADS": "1"})


def test_processes_share_the_work_and_outlive_one_that_is_killed(tmp_path: Path, large: Path) -> None:
    victim = start(large, tmp_path / "shared", "stop")
    assert victim.stdout is not None
    assert victim.stdout.readline() == "00000.arrow\n"
    workers = [start(large, tmp_path / "shared") for _ in range(2)]
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    made = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [lines[-1] for lines in made] == ["900"] * 2
    names = [name for lines in made for name in lines[:-1]]
    assert set(names) == {f"0000{i}.arrow" for i in range(9)}
    assert len(names) < 2 * 9  # shared, and not all made by both
    assert same(
        tokenise(large, tokenizer(), CUT, tmp_path / "shared"),
        tokenise(large, tokenizer(), CUT, tmp_path / "one"),
    )


@pytest.mark.parametrize("count", [1500, pytest.param(7473, marks=pytest.mark.matrix)])
def test_gsm8k(count: int, tmp_path: Path, gsm8k: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(gsm8k.read_text().splitlines(keepends=True)[:count]))
    tok = tokenizer()
    tokens = tokenise(rows, tok, Reading(512, too_long="cut"), tmp_path)
    assert len(tokens) == count - tokens.dropped
    assert 0 < tokens.truncated < count
    assert tokens.lengths.max() == 512
    assert "#### 72</s>" in learned(tokens, 0, tok)[1]
