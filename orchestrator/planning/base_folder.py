"""What a folder holds that a job names as its base, and what it lacks. Needs no torch."""

import json
from dataclasses import replace
from pathlib import Path

from orchestrator.planning.model import ADAPTER, LLAMA_LIKE, Model, weight_files

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Weights that are not read: a pickle can run code as it is loaded, the others are of other libraries.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.safetensors")
_NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "adapter_model.bin", "adapter_model.safetensors"}


def without_config(folder: Path) -> str:
    """What a folder is that has no config.json."""
    if (folder / ADAPTER).exists():
        return _an_adapter(folder)
    for inside in ("merged", "output", "output/merged"):
        if (folder / inside / "config.json").exists():
            return f"no config.json; there is one in {inside} in it"
    found = _named(_other_weights(folder))
    if not found:
        return "no config.json; a base has one"
    if all(path.suffix == ".gguf" for path in _other_weights(folder)):
        return f"found only GGUF ({found}), which is not read; take the base that it was made from"
    return f"found weights ({found}) without config.json; take the whole folder of the base"


def _an_adapter(folder: Path) -> str:
    """What to do about an adapter that is given as base."""
    try:
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    own = f"its base ({base})" if base else "its base"
    mend = f"name {own}, or the model merged from both (output.merge)"
    if (folder / "merged" / "config.json").exists():
        mend = f"name {own}, or the merged model in {folder / 'merged'}"
    return f"found an adapter ({ADAPTER}) and no base; {mend}"


def lacks(model: Model, folder: Path) -> str | None:
    """What a user's own folder lacks of all that is loaded; a cached snapshot is completed by the trainer."""
    tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    if not model.scratch and not weight_files(folder):
        return _without_weights(folder, tokenizer)
    if not tokenizer:
        return f"no tokenizer; allowed: one of {', '.join(TOKENIZERS)}"
    return None if model.scratch or model.in_4_bits else _unlike(model)


def _without_weights(folder: Path, tokenizer: bool) -> str:
    """What a folder with config.json holds instead of the weights that are read."""
    if (folder / ADAPTER).exists():
        return _an_adapter(folder)
    other = _other_weights(folder)
    found = _named(other)
    if not found:
        hint = "; say base.init: scratch to start from random weights" if tokenizer else " and no tokenizer"
        return f"no model.safetensors (nor its index){hint}"
    suffixes = {path.suffix for path in other}
    if suffixes == {".gguf"}:
        return f"found only GGUF ({found}), which is not read; take the base that it was made from"
    if suffixes == {".safetensors"}:
        return f"found {found}, but neither model.safetensors nor model.safetensors.index.json, which names the files"
    if not any(path.name.startswith("pytorch_model") for path in other):
        return f"found weights as {found}; only safetensors are read: take the base in transformers' own format"
    convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    return f"found weights as {found}; only safetensors are read: convert them, if you trust them, by {convert}"


def _other_weights(folder: Path) -> list[Path]:
    """The weights in a folder, of any library and by any name, that are no adapter's and no optimizer's."""
    found = {path for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name not in _NO_WEIGHTS)


def _named(files: list[Path]) -> str:
    """The first of the files by name, and how many more there are."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0].name}{more}" if files else ""


def _unlike(model: Model) -> str | None:
    """How the weights of a folder differ from what its config.json says, where that is known."""
    if model.config["model_type"] not in LLAMA_LIKE:
        return None
    wanted = replace(model, scratch=True).shapes
    # Saved without the head's class, the names lack the first part.
    held = {name if name in wanted else f"model.{name}": shape for name, shape in model.shapes.items()}
    lacking = [name for name in wanted if name not in held]
    if lacking:
        return (
            f"its weights lack {lacking[0]}, and {len(lacking) - 1} more of the {len(wanted)} of such a config.json"
        )
    for name, shape in wanted.items():
        if held[name] != shape:
            return f"its weights have {name} {list(held[name])}; config.json says {list(shape)}"
    return None
