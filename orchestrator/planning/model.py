"""A base as it lies on disk or in the cache, read without torch: its config, and the shapes of its weights.

Names of dimensions: V vocabulary, H hidden size, F feed-forward size, Q and K sizes of the query and key projections.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from methods.options.base import packed, size
from methods.parts.targets import is_linear
from orchestrator.errors import InputError
from orchestrator.planning import quantised
from runfolder.job import Base

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ADAPTER = "adapter_config.json"
# Bases whose shapes follow from their config: the Llama family.
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3"}
TRANSPOSED = {"gpt2", "openai-gpt"}  # bases whose linear layers hold their weight as [in, out]
# Weights with a row for each token: embeddings, though not those of positions, and the head with its bias.
_VOCABULARY = re.compile(r"(^|\.)(?!\w*position)(\w*embed(d?ings?|_tokens|_in|_out)|wte|lm_head)\.(weight|bias)$")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")  # names in config.json of how many layers there are
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_LARGEST_HEADER = 100_000_000  # as safetensors itself limits it


@dataclass(frozen=True)
class Model:
    """A base: its config.json, and the folder that it lies in (None for one that is still on the hub)."""

    config: dict[str, Any]
    folder: Path | None = None
    scratch: bool = False
    rows: int | None = None  # of the embeddings, where the job has them made longer

    @property
    def embeddings(self) -> int | None:
        """How many token ids it has an embedding for; None when its config.json does not say."""
        text = self.config.get("text_config")
        found = self.rows or (text if isinstance(text, dict) else self.config).get("vocab_size")
        return found if isinstance(found, int) else None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, the embeddings as long as the job wants them; {} when unknown."""
        longer = dict(self.own_shapes)
        if self.rows is not None:
            V = replace(self, rows=None).embeddings
            for name, shape in self.own_shapes.items():
                if _VOCABULARY.search(name) and shape[0] == V:
                    longer[name] = (self.rows, *shape[1:])
        return longer

    @property
    def added(self) -> int:
        """How many weights the job has added to embeddings and head."""
        return count(self.shapes) - count(self.own_shapes)

    @cached_property
    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """As the base comes: from the weights where there are some, else from the config."""
        if self.tensors:
            read = {name: tensor for name, tensor in self.tensors.items() if name not in self.unread}
            return quantised.shapes(read) if self.in_4_bits else {name: found.shape for name, found in read.items()}
        if self.config.get("model_type") not in LLAMA_LIKE:
            return {}
        try:
            return dict(_llama(self.config))
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise InputError(f"base: its config.json gives no shapes ({type(error).__name__}: {error})") from None

    @cached_property
    def unread(self) -> set[str]:
        """The tensors of layers that its config.json does not have, which no model of that config reads."""
        layers = next((found for key in _LAYERS if isinstance(found := self.config.get(key), int)), None)
        numbers = {name: int(match[1]) for name in self.tensors if (match := _LAYER.search(name))}
        return {name for name, number in numbers.items() if layers is not None and number >= layers}

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name -> (out, in) of every linear layer except the output head."""
        matrices = {name: shape for name, shape in self.shapes.items() if is_linear(name, shape)}
        # bitsandbytes keeps every weight as [out, in].
        transposed = self.config.get("model_type") in TRANSPOSED and not self.in_4_bits
        order = -1 if transposed else 1
        return {
            name.removesuffix(".weight"): (shape[::order][0], shape[::order][1]) for name, shape in matrices.items()
        }

    @property
    def others(self) -> dict[str, tuple[int, ...]]:
        """Every other weight by parameter name."""
        return {name: shape for name, shape in self.shapes.items() if not is_linear(name, shape)}

    @property
    def in_4_bits(self) -> bool:
        """Whether its linear layers are in 4 bits already, by bitsandbytes."""
        return not self.scratch and quantised.method(self.config) == quantised.FOUR_BITS

    def frozen_bytes(self, element: int) -> tuple[int, int]:
        """Bytes of a base that is in 4 bits already: what ZeRO 3 shares, of `element` bytes each, and the packed."""
        matrices = quantised.packed(self.config, self.linears)
        double = bool(self.config["quantization_config"].get("bnb_4bit_use_double_quant"))
        return (count(self.shapes) - size(matrices)) * element, packed(matrices, double)

    @cached_property
    def tensors(self) -> dict[str, quantised.Tensor]:
        """Every tensor in the files of its weights, by name."""
        files = weight_files(self.folder) if self.folder and not self.scratch else []
        return {tensor.name: tensor for file in files for tensor in read_header(file)}


def locate(base: Base) -> Model | None:
    """The base in its folder, or in the local cache of the hub; None when it is a hub id that is not there."""
    found = folder_of(base)
    return Model(_config(found / "config.json"), found, base.init == "scratch") if found else None


def folder_of(base: Base) -> Path | None:
    """The folder that a base names, or where the local cache of the hub has it; None when it is not there."""
    folder = Path(base.model)
    return folder if folder.is_dir() else _cached(base)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads; raises InputError when one that the index names is not there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single] if single.exists() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index}: not an index of safetensors files") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder / missing[0]}: missing; {index.name} names {len(names)} files, {len(missing)} lack"
        )
    return [folder / name for name in names]


def read_header(path: Path) -> Iterator[quantised.Tensor]:
    """Every tensor in a safetensors file, without its values; raises InputError when it is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise InputError(f"{path}: not a whole safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in tensors.values()]
            found = [_tensor(path, 8 + length, name, entry) for name, entry in tensors.items()]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{path}: its safetensors header cannot be read") from None
    end = max(ends, default=0)
    if size != 8 + length + end:
        raise InputError(f"{path}: found {size} bytes, its header says {8 + length + end}: damaged or cut short")
    yield from found


def _tensor(path: Path, data: int, name: str, entry: dict[str, Any]) -> quantised.Tensor:
    """A tensor by its entry in the header of a file whose data begins at the byte `data`."""
    begin, end = map(int, entry["data_offsets"])
    return quantised.Tensor(name, tuple(map(int, entry["shape"])), path, data + begin, end - begin)


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of parameters."""
    return sum(map(prod, shapes.values()))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a base has a config.json") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: found {type(config).__name__}; allowed: an object")
    return config


def _cached(base: Base) -> Path | None:
    """The snapshot of a hub id in the local cache, by revision, if it shows what it is a snapshot of."""
    if not HUB_ID.fullmatch(base.model):
        return None
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    repository = cache / f"models--{base.model.replace('/', '--')}"
    reference = repository / "refs" / (base.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else base.revision or ""
    snapshot = repository / "snapshots" / commit
    shows = any((snapshot / name).exists() for name in ("config.json", ADAPTER))
    return snapshot if commit and shows else None


def _llama(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameter names and shapes of a Llama-like model, from its config."""
    V, H = config["vocab_size"], config["hidden_size"]
    yield "model.embed_tokens.weight", (V, H)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _llama_layer(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (H,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (V, H)


def _llama_layer(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    H, F = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or H // heads
    Q, K = heads * head, (config.get("num_key_value_heads") or heads) * head
    kind = config["model_type"]
    bias_o = kind in ("llama", "qwen3") and bool(config.get("attention_bias"))
    bias_qkv = bias_o or kind == "qwen2"
    bias_mlp = kind == "llama" and bool(config.get("mlp_bias"))
    linears = [
        ("self_attn.q_proj", (Q, H), bias_qkv),
        ("self_attn.k_proj", (K, H), bias_qkv),
        ("self_attn.v_proj", (K, H), bias_qkv),
        ("self_attn.o_proj", (H, Q), bias_o),
        ("mlp.gate_proj", (F, H), bias_mlp),
        ("mlp.up_proj", (F, H), bias_mlp),
        ("mlp.down_proj", (H, F), bias_mlp),
    ]
    for name, shape, bias in linears:
        yield f"{name}.weight", shape
        if bias:
            yield f"{name}.bias", shape[:1]
    for norm in ("q_norm", "k_norm") if kind == "qwen3" else ():
        yield f"self_attn.{norm}.weight", (head,)
    yield "input_layernorm.weight", (H,)
    yield "post_attention_layernorm.weight", (H,)
