"""The embeddings of a base and the ids of its tokenizer, from their files, without torch or transformers.

A tokenizer may have fewer ids than the base has embeddings, which are padded as a rule; one with more has ids that
the base cannot read.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.planning.model import Model

# Keys of tokenizer_config.json and special_tokens_map.json that name tokens.
_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)

Settings = dict[str, Any]  # an object in a file of JSON


def tokens_without_embedding(model: Model) -> dict[str, int]:
    """Token -> id of what the tokenizer in a base's folder has and the base has no embedding for, by id.

    Empty where the folder or the ids cannot be known from here: a base on the hub, or a tokenizer in a binary file
    alone.
    """
    embeddings = model.embeddings
    if model.folder is None or embeddings is None:
        return {}
    beyond = []
    for token, id_ in token_ids(model.folder).items():
        if id_ >= embeddings:
            beyond.append((token, id_))
    beyond.sort(key=itemgetter(1))
    return dict(beyond)


def resized(model: Model) -> Model:
    """The base with an embedding for every id of its tokenizer, as far as the ids are known from here."""
    new = tokens_without_embedding(model)
    if not new:
        return model
    largest = max(new.values())
    return replace(model, embedding_rows=1 + largest)


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id of the tokenizer in a folder: its vocabulary, the tokens that were added, and the special ones."""
    settings = _read_object(folder / "tokenizer_config.json")
    ids = dict(_vocabulary(folder))
    added = _read_object(folder / "added_tokens.json")
    for token, id_ in added.items():
        ids[token] = int(id_)
    decoder = settings.get("added_tokens_decoder", {})
    for id_, token in decoder.items():
        ids.setdefault(_token_text(token), int(id_))
    special = list(_named_special_tokens(settings))
    special_settings = _read_object(folder / "special_tokens_map.json")
    special += _named_special_tokens(special_settings)
    if not ids:
        return ids
    for token in special:
        next_id = max(ids.values()) + 1
        ids.setdefault(token, next_id)  # transformers adds what has no id yet
    return ids


def _vocabulary(folder: Path) -> Iterator[tuple[str, int]]:
    """The pairs of token and id in the first of the files that a tokenizer is read from."""
    if (folder / "tokenizer.json").exists():
        tokenizer = _read_object(folder / "tokenizer.json")
        yield from _of_tokenizer_json(tokenizer)
    elif (folder / "vocab.json").exists():
        vocabulary = _read_object(folder / "vocab.json")
        yield from vocabulary.items()
    elif (folder / "vocab.txt").exists():
        text = (folder / "vocab.txt").read_text(encoding="utf-8")
        for id_, token in enumerate(text.splitlines()):
            yield token, id_


def _of_tokenizer_json(tokenizer: Settings) -> Iterator[tuple[str, int]]:
    """The pairs of token and id in tokenizer.json: of its vocabulary, and of the tokens that were added to it."""
    model = tokenizer.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # of Unigram: pairs (token, score), whose place is the id
        for id_, pair in enumerate(vocabulary):
            yield str(pair[0]), id_
    else:
        yield from vocabulary.items()
    for token in tokenizer.get("added_tokens") or ():
        yield token["content"], token["id"]


def _named_special_tokens(settings: Settings) -> Iterator[str]:
    """The special tokens that settings name."""
    for key in _SPECIAL:
        for token in _named(key, settings):
            if token:
                yield _token_text(token)


def _named(key: str, settings: Settings) -> Iterable[Any]:
    """The tokens, and perhaps empty values, that a key of settings names: one or several."""
    value: Any = settings.get(key) or ()
    if key != "extra_special_tokens":
        return value if isinstance(value, list) else [value]
    tokens: Iterable[Any] = value
    if isinstance(value, Mapping):
        tokens = value.values()
    return tokens


def _token_text(token: Any) -> str:
    """The text of a token, which files have as a string or with its properties."""
    if isinstance(token, Mapping):
        token = token["content"]
    return str(token)


def _read_object(path: Path) -> Settings:
    """An object in a file; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"{path}: found {kind}; allowed: an object")
    return content
