"""A reward model as transformers and PEFT load it: `AutoModelForSequenceClassification` with one label."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.base import Tensors
from runfolder.files import read_json, write_json
from trainer.objectives.score_head import SCORE_WEIGHT

LOADING = (
    "It gives a prompt and answer, which ends with its end token, one number: the higher, the better.",
    "",
    "    config = AutoConfig.from_pretrained(<this folder>)",
    "    model = AutoModelForSequenceClassification.from_pretrained(<base, or this folder>, config=config)",
    "    model = PeftModel.from_pretrained(model, <this folder>)  # an adapter alone",
    "    scores = model(**tokenizer(texts, padding=True, return_tensors='pt')).logits[:, 0]",
    "",
    "Pad with the pad token of the tokenizer beside it, which never ends an answer.",
    "",
)
_ADAPTER = "adapter_model.safetensors"


def class_of(config: Any) -> str:
    """The name of transformers' class that scores with a base of this config; raises ValueError where it has none."""
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    kind = config.model_type
    name = names.get(kind)
    if name is None:
        raise ValueError(f"objective reward: transformers has no model that scores for a base of type {kind}")
    return str(name)


def padding_token(tokenizer: Any, ends: tuple[int, ...], config: Any) -> int:
    """The id of a token that no answer ends with, as transformers scores the last token that is no padding.

    The tokenizer's own padding is taken if it can be. BOS stands in front alone, so it is padding where nothing else
    is. Raises ValueError where there is nothing to take.
    """
    bos = tokenizer.bos_token_id
    special = set(tokenizer.added_tokens_decoder)
    special.discard(bos)
    in_order = sorted(special)
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    candidates += [*in_order, bos]
    known = config.get_text_config().vocab_size
    for token in candidates:
        if token is None or token >= known:
            continue
        if token not in ends:
            return int(token)
    raise ValueError(
        "objective reward: the base's tokenizer has no special token but those that end an answer, and padding by "
        "one of them would hide where answers end; allowed: a tokenizer with a pad token of its own"
    )


def complete_folder(model: Any, head: Tensor, folder: Path) -> None:
    """Make an exported folder that of a model, or of an adapter, that scores sequences."""
    config = model.config
    if (folder / _ADAPTER).exists():
        _add_head(head, folder)
        config.save_pretrained(folder)
    config_file = folder / "config.json"
    described = read_json(config_file)
    architecture = class_of(config)
    described["architectures"] = [architecture]
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        described.pop("quantization_config", None)  # the base's own weights are in 16 bits
    write_json(config_file, described)
    generation = folder / "generation_config.json"
    generation.unlink(missing_ok=True)


def _add_head(head: Tensor, folder: Path) -> None:
    """Put the head beside an adapter's weights, under the name that PEFT gives it."""
    weights = folder / _ADAPTER
    adapter: Tensors = load_file(weights)
    config_file = folder / "adapter_config.json"
    described = read_json(config_file)
    described["task_type"] = "SEQ_CLS"
    parent = "base_model"  # of a prompt's adapter, which PEFT puts around the base itself
    if "prompt_embeddings" not in adapter:
        parent = "base_model.model"
        module, _, _ = SCORE_WEIGHT.partition(".")
        saved = described.get("modules_to_save") or []
        described["modules_to_save"] = [*saved, module]
    name = f"{parent}.{SCORE_WEIGHT}"
    adapter[name] = head.contiguous()
    save_file(adapter, weights, metadata={"format": "pt"})
    write_json(config_file, described)
