"""The embeddings of a base and the ids of its tokenizer, from their files, without torch or transformers.

A tokenizer may have fewer ids than the base has embeddings, which are padded as a rule; one with more has ids that
the base cannot read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.planning.model import Model

# Keys of tokenizer_config.json and special_tokens_map.json that name tokens.
_SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)


def outside(model: Model) -> dict[str, int]:
    """Token -> id of what the tokenizer in a base's folder has and the base has no embedding for, by id.

    Empty where the folder or the ids cannot be known from here: a base on the hub, or a tokenizer in a binary file
    alone.
    """
    rows = model.embeddings
    if model.folder is None or rows is None:
        return {}
    found = {token: id_ for token, id_ in token_ids(model.folder).items() if id_ >= rows}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def resized(model: Model) -> Model:
    """The base with an embedding for every id of its tokenizer, as far as the ids are known from here."""
    new = outside(model)
    return replace(model, rows=1 + max(new.values())) if new else model


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id of the tokenizer in a folder: its vocabulary, the tokens that were added, and the special ones."""
    settings = _json(folder / "tokenizer_config.json")
    known = dict(_vocabulary(folder))
    known |= {token: int(id_) for token, id_ in _json(folder / "added_tokens.json").items()}
    for id_, token in settings.get("added_tokens_decoder", {}).items():
        known.setdefault(_content(token), int(id_))
    named = [*_named(settings), *_named(_json(folder / "special_tokens_map.json"))]
    for token in named if known else ():
        known.setdefault(token, max(known.values()) + 1)  # transformers adds what has no id yet
    return known


def _vocabulary(folder: Path) -> Iterator[tuple[str, int]]:
    """The pairs of token and id in the first of the files that a tokenizer is read from."""
    if (folder / "tokenizer.json").exists():
        whole = _json(folder / "tokenizer.json")
        vocabulary = (whole.get("model") or {}).get("vocab") or {}
        # Unigram has a list of pairs (token, score).
        if isinstance(vocabulary, list):
            vocabulary = {str(pair[0]): id_ for id_, pair in enumerate(vocabulary)}
        yield from vocabulary.items()
        yield from ((token["content"], token["id"]) for token in whole.get("added_tokens") or ())
    elif (folder / "vocab.json").exists():
        yield from _json(folder / "vocab.json").items()
    elif (folder / "vocab.txt").exists():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        yield from ((token, id_) for id_, token in enumerate(lines))


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that settings name."""
    for key in _SPECIAL:
        value = settings.get(key) or ()
        several = value.values() if key == "extra_special_tokens" and isinstance(value, Mapping) else value
        for token in several if isinstance(several, list) or key == "extra_special_tokens" else [value]:
            if token:
                yield _content(token)


def _content(token: Any) -> str:
    """The text of a token, which files have as a string or with its properties."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _json(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}; allowed: an object")
    return found
