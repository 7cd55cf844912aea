"""Tokenizers with more ids than their base has embeddings, from files alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import CONFIG, make_base, make_job, write_tokenizer

from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from orchestrator.planning.model import Model
from orchestrator.planning.plan import Plan, plan
from orchestrator.planning.vocabulary import token_ids, tokens_without_embedding


def model_of(kind: str) -> Any:
    """A small model of the tokenizers library."""
    from tokenizers import models

    pieces = ["<unk>", "a", "b", "ab"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    return {
        "bpe": lambda: models.BPE(ids, [("a", "b")], unk_token="<unk>"),
        "unigram": lambda: models.Unigram([(piece, -1.0) for piece in pieces], 0),
        "wordpiece": lambda: models.WordPiece(ids, unk_token="<unk>"),
        "wordlevel": lambda: models.WordLevel(ids, unk_token="<unk>"),
    }[kind]()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "wordlevel"])
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(model_of(kind))
    core.add_special_tokens(["<s>", "</s>"])
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    whole.add_tokens(["<tool>"])
    whole.save_pretrained(tmp_path)
    assert token_ids(tmp_path) == whole.get_vocab()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # Many tokenizers name a token for padding that no file gives an id.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert token_ids(tmp_path) == loaded.get_vocab()
    assert tokens_without_embedding(Model({"vocab_size": 7}, tmp_path)) == {"<pad>": 7}
    assert tokens_without_embedding(Model({"text_config": {"vocab_size": 6}}, tmp_path)) == {"<tool>": 6, "<pad>": 7}
    assert tokens_without_embedding(Model({}, tmp_path)) == {}


def test_older_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 2}))
    settings = {"added_tokens_decoder": {"3": {"content": "<y>"}}, "additional_special_tokens": ["<x>", "<z>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": {"content": "<e>"}}))
    assert token_ids(tmp_path) == {"a": 0, "b": 1, "<x>": 2, "<y>": 3, "<e>": 4, "<z>": 5}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json: not JSON"):
        token_ids(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base with two tokens more than its 96 embeddings."""
    make_base(tmp_path / "base")
    write_tokenizer(tmp_path / "base", *(f"t{i}" for i in range(2, 98)))
    return tmp_path


def planned(folder: Path, resize: bool, **changes: Any) -> Plan:
    return plan(read_job(make_job(folder, base={"model": "base", "resize_embeddings": resize}, **changes))[0])


def test_more_ids_than_embeddings_are_told_or_added(folder: Path) -> None:
    plain, resized = planned(folder, False), planned(folder, True)
    (warning,) = plain.warnings
    beyond = "the base has 96 embeddings, its tokenizer 2 tokens beyond them, like 't96' (id 96)"
    assert warning.endswith(f"{beyond}; base.resize_embeddings adds them")
    assert resized.warnings == ()
    assert plain.sizes is not None and resized.sizes is not None
    both = 2 * 2 * CONFIG["hidden_size"]  # two rows of the embedding, two of the head
    assert resized.sizes.trained == plain.sizes.trained + both
    assert (
        resized.sizes.parameters == plain.sizes.parameters + 2 * both
    )  # the base's rows, and those that are trained
    full = planned(folder, True, method="full").sizes
    assert full is not None
    assert full.trained == full.parameters == plain.sizes.parameters - plain.sizes.trained + both


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "ia3"}, "method ia3, which does not train new embeddings; allowed: one of full, lora, rslora"),
        (
            {"method": {"kind": "full", "freeze": ["*embed*"]}},
            "method.freeze: model.embed_tokens.weight would be frozen",
        ),
        (
            {"method": {"kind": "lora", "target": ["q_proj", "lm_head"]}},
            "method.target: found 'lm_head'; base.resize",
        ),
        ({"method": "lora", "sharding": {"zero": 3}}, "allowed: sharding.zero 0, 1 or 2, or method full or galore"),
    ],
    ids=["method", "frozen", "adapted", "stage"],
)
def test_what_cannot_train_new_embeddings(folder: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as error:
        planned(folder, True, **changes)
    (line,) = str(error.value).splitlines()
    assert expected in line
