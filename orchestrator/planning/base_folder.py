"""What a folder holds that a job names as its base, and what it lacks. Needs no torch."""

import json
from dataclasses import replace
from pathlib import Path

from orchestrator.planning.llama import LLAMA_LIKE
from orchestrator.planning.model import ADAPTER_CONFIG, Model
from orchestrator.planning.safetensors import Shapes, weight_files

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Weights that are not read: a pickle can run code as it is loaded, the others are of other libraries.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.safetensors")
_NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "adapter_model.bin", "adapter_model.safetensors"}


def without_config(folder: Path) -> str:
    """What a folder is that has no config.json."""
    if (folder / ADAPTER_CONFIG).exists():
        return _an_adapter(folder)
    for inside in ("merged", "output", "output/merged"):
        if (folder / inside / "config.json").exists():
            return f"no config.json; there is one in {inside} in it"
    weights = _other_weights(folder)
    if not weights:
        return "no config.json; a base has one"
    names = _first_of(weights)
    if _suffixes(weights) == {".gguf"}:
        return _gguf_alone(names)
    return f"found weights ({names}) without config.json; take the whole folder of the base"


def _gguf_alone(names: str) -> str:
    """What to do about a folder that has its weights as GGUF and in no other format."""
    return f"found only GGUF ({names}), which is not read; take the base that it was made from"


def _an_adapter(folder: Path) -> str:
    """What to do about an adapter that is given as base."""
    base = _base_of_adapter(folder)
    named_base = f"its base ({base})" if base else "its base"
    fix = f"name {named_base}, or the model merged from both (output.merge)"
    merged = folder / "merged"
    if (merged / "config.json").exists():
        fix = f"name {named_base}, or the merged model in {merged}"
    return f"found an adapter ({ADAPTER_CONFIG}) and no base; {fix}"


def _base_of_adapter(folder: Path) -> object:
    """The base that an adapter names; None where it names none."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        return config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds what makes tokens of text."""
    files = set()
    for name in TOKENIZERS:
        files.add(folder / name)
    return any(map(Path.is_file, files))


def has_config_alone(folder: Path) -> bool:
    """Whether a folder holds what a base looks like, and no weights of any library, nor an adapter."""
    for name in (ADAPTER_CONFIG, "model.safetensors.index.json"):
        if (folder / name).exists():
            return False
    return not _other_weights(folder)


def lacks(model: Model, folder: Path) -> str | None:
    """What a user's own folder lacks of all that is loaded; a cached snapshot is completed by the trainer."""
    if not model.scratch and not weight_files(folder):
        return _without_weights(folder)
    if not has_tokenizer(folder):
        names = ", ".join(TOKENIZERS)
        return f"no tokenizer; allowed: one of {names}"
    if model.scratch or model.in_4_bits:
        return None
    return _unlike_config(model)


def _without_weights(folder: Path) -> str:
    """What a folder with config.json holds instead of the weights that are read."""
    if (folder / ADAPTER_CONFIG).exists():
        return _an_adapter(folder)
    weights = _other_weights(folder)
    if not weights:
        hint = " and no tokenizer"
        if has_tokenizer(folder):
            hint = "; say base.init: scratch to start from random weights"
        return f"no model.safetensors (nor its index){hint}"
    names = _first_of(weights)
    suffixes = _suffixes(weights)
    if suffixes == {".gguf"}:
        return _gguf_alone(names)
    if suffixes == {".safetensors"}:
        return f"found {names}, but neither model.safetensors nor model.safetensors.index.json, which names the files"
    are_of_torch = any(path.name.startswith("pytorch_model") for path in weights)
    if not are_of_torch:
        return f"found weights as {names}; only safetensors are read: take the base in transformers' own format"
    convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    return f"found weights as {names}; only safetensors are read: convert them, if you trust them, by {convert}"


def _other_weights(folder: Path) -> list[Path]:
    """The weights in a folder, of any library and by any name, that are no adapter's and no optimizer's."""
    weights: set[Path] = set()
    for pattern in _OTHER_WEIGHTS:
        weights.update(folder.glob(pattern))
    for name in _NO_WEIGHTS:
        weights.discard(folder / name)
    return sorted(weights)


def _suffixes(files: list[Path]) -> set[str]:
    return {path.suffix for path in files}


def _first_of(files: list[Path]) -> str:
    """The first of the files by name, and how many more there are."""
    name = files[0].name
    if len(files) == 1:
        return name
    return f"{name} and {len(files) - 1} more"


def _unlike_config(model: Model) -> str | None:
    """How the weights of a folder differ from what its config.json says, where that is known."""
    if model.config["model_type"] not in LLAMA_LIKE:
        return None
    wanted = replace(model, scratch=True).shapes
    held = _with_whole_names(model.shapes, wanted)
    lacking = [name for name in wanted if name not in held]
    if lacking:
        others = len(lacking) - 1
        more = f"and {others} more of the {len(wanted)} of such a config.json"
        return f"its weights lack {lacking[0]}, {more}"
    for name, shape in wanted.items():
        held_shape = held[name]
        if held_shape != shape:
            weights = f"{name} {list(held_shape)}"
            return f"its weights have {weights}; config.json says {list(shape)}"
    return None


def _with_whole_names(shapes: Shapes, wanted: Shapes) -> Shapes:
    """The shapes by the names that the class with the head has: saved without it, they lack the first part."""
    held: Shapes = {}
    for name, shape in shapes.items():
        whole = name if name in wanted else f"model.{name}"
        held[whole] = shape
    return held
