"""A reward model as transformers and PEFT load it: `AutoModelForSequenceClassification` with one label."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from runfolder.files import read_json, write_json
from trainer.objectives.base import Weights

HEAD = "score.weight"
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MODULE = "score"


def class_of(config: Any) -> str:
    """The name of transformers' class that scores with a base of this config; raises ValueError where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    name = NAMES.get(config.model_type)
    if name is None:
        raise ValueError(
            f"objective reward: transformers has no model that scores sequences for a base of type {config.model_type}"
        )
    return str(name)


def padding_token(tokenizer: Any, ends: tuple[int, ...], config: Any) -> int:
    """The id of a token that no answer ends with, as transformers scores the last token that is no padding.

    It is the tokenizer's own padding where that is none of those that end an answer. Raises ValueError where there is
    none to take.
    """
    text_config = config.get_text_config()
    special = sorted(tokenizer.added_tokens_decoder)
    preferred = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    last = [tokenizer.bos_token_id]  # always in front, so never what is scored
    for token in (*preferred, *special, *last):
        if token is None or token in ends or token >= text_config.vocab_size:
            continue
        if token in last and token not in preferred:
            continue
        return int(token)
    for token in last:
        if token is not None and token not in ends:
            return int(token)
    raise ValueError(
        "objective reward: the base's tokenizer has no special token but those that end an answer, and padding by such "
        "a one would hide where answers end; allowed: a tokenizer with a pad token of its own"
    )


def complete_folder(config: Any, weights: Weights, folder: Path) -> None:
    """Make an exported folder that of a model, or of an adapter, that scores sequences."""
    config_file = folder / "config.json"
    if (folder / _ADAPTER).exists():
        _add_head(weights, folder)
        config.save_pretrained(folder)
    described = read_json(config_file)
    write_json(config_file, described | {"architectures": [class_of(config)]})
    (folder / "generation_config.json").unlink(missing_ok=True)


def _add_head(weights: Weights, folder: Path) -> None:
    """Put the head beside an adapter's weights, under the name that PEFT gives it."""
    heads = [weight for name, weight in weights.items() if name.endswith(HEAD)]
    adapter = load_file(folder / _ADAPTER)
    described = read_json(folder / _ADAPTER_CONFIG)
    described["task_type"] = "SEQ_CLS"
    name = f"base_model.{HEAD}"
    if "prompt_embeddings" not in adapter:
        name = f"base_model.model.{HEAD}"
        saved = described.get("modules_to_save") or []
        described["modules_to_save"] = [*saved, _MODULE]
    adapter[name] = heads[0].contiguous()
    save_file(adapter, folder / _ADAPTER, metadata={"format": "pt"})
    write_json(folder / _ADAPTER_CONFIG, described)
