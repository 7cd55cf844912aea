"""A base as it lies on disk or in the cache, read without torch: its config, and the shapes of its weights.

Names of dimensions: V vocabulary.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

from methods.options.base import element_count, four_bit_bytes
from methods.parts.targets import Linears, is_linear
from orchestrator.errors import InputError
from orchestrator.planning import llama, quantised
from orchestrator.planning.llama import Config
from orchestrator.planning.safetensors import Shapes, StoredTensor, TensorShape, read_header, weight_files
from runfolder.job import Base

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ADAPTER_CONFIG = "adapter_config.json"
TRANSPOSED = {"gpt2", "openai-gpt"}  # bases whose linear layers hold their weight as [in, out]
# Weights with a row for each token: embeddings, though not those of positions, and the head with its bias.
_VOCABULARY = re.compile(r"(^|\.)(?!\w*position)(\w*embed(d?ings?|_tokens|_in|_out)|wte|lm_head)\.(weight|bias)$")
_LAYER_COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
)  # names in config.json of how many layers there are
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Model:
    """A base: its config.json, and the folder that it lies in (None for one that is still on the hub)."""

    config: Config
    folder: Path | None = None
    scratch: bool = False
    embedding_rows: int | None = None  # of the embeddings, where the job has them made longer

    @property
    def hidden_size(self) -> int | None:
        """The width that a default learning rate goes by; None when its config.json does not say."""
        hidden_size: int | None = self.config.get("hidden_size")
        return hidden_size

    @property
    def embeddings(self) -> int | None:
        """How many token ids it has an embedding for; None when its config.json does not say."""
        if self.embedding_rows:
            return self.embedding_rows
        text_config = self.config.get("text_config")
        config = text_config if isinstance(text_config, dict) else self.config
        vocab_size = config.get("vocab_size")
        return vocab_size if isinstance(vocab_size, int) else None

    @cached_property
    def shapes(self) -> Shapes:
        """Parameter name -> shape, the embeddings as long as the job wants them; {} when unknown."""
        shapes = dict(self.base_shapes)
        if self.embedding_rows is None:
            return shapes
        V = replace(self, embedding_rows=None).embeddings
        for name, shape in self.base_shapes.items():
            if _VOCABULARY.search(name) and shape[0] == V:
                shapes[name] = (self.embedding_rows, *shape[1:])
        return shapes

    @property
    def added(self) -> int:
        """How many weights the job has added to embeddings and head."""
        of_base = parameter_count(self.base_shapes)
        return parameter_count(self.shapes) - of_base

    @cached_property
    def base_shapes(self) -> Shapes:
        """As the base comes: from the weights where there are some, else from the config."""
        if self.tensors:
            return self._shapes_in_files()
        if self.config.get("model_type") not in llama.LLAMA_LIKE:
            return {}
        try:
            return llama.llama_shapes(self.config)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"base: its config.json gives no shapes ({reason})") from None

    def _shapes_in_files(self) -> Shapes:
        """The shapes of the weights in its files that a model of its config.json reads."""
        tensors = dict(self.tensors)
        for name in self.unread:
            del tensors[name]
        if self.in_4_bits:
            return quantised.unpacked_shapes(tensors)
        shapes: Shapes = {}
        for name, tensor in tensors.items():
            shapes[name] = tensor.shape
        return shapes

    @cached_property
    def unread(self) -> set[str]:
        """The tensors of layers that its config.json does not have, which no model of that config reads."""
        unread: set[str] = set()
        layers = self._layer_count()
        if layers is None:
            return unread
        for name in self.tensors:
            match = _LAYER.search(name)
            if match and int(match[1]) >= layers:
                unread.add(name)
        return unread

    def _layer_count(self) -> int | None:
        """How many layers its config.json says that it has; None when it does not say."""
        for key in _LAYER_COUNT_KEYS:
            layers = self.config.get(key)
            if isinstance(layers, int):
                return layers
        return None

    @property
    def linears(self) -> Linears:
        """Module name -> (out, in) of every linear layer except the output head."""
        # bitsandbytes keeps every weight as [out, in].
        kind = self.config.get("model_type")
        is_transposed = kind in TRANSPOSED and not self.in_4_bits
        linears: dict[str, tuple[int, int]] = {}
        for name, shape in self.shapes.items():
            if not is_linear(name, shape):
                continue
            rows, columns = shape
            if is_transposed:
                rows, columns = columns, rows
            module = name.removesuffix(".weight")
            linears[module] = (rows, columns)
        return linears

    @property
    def other_shapes(self) -> Shapes:
        """The shape of every other weight, by parameter name."""
        others: Shapes = {}
        for name, shape in self.shapes.items():
            if not is_linear(name, shape):
                others[name] = shape
        return others

    @property
    def in_4_bits(self) -> bool:
        """Whether its linear layers are in 4 bits already, by bitsandbytes."""
        if self.scratch:
            return False
        return quantised.method(self.config) == quantised.FOUR_BITS

    def frozen_bytes(self, element: int) -> tuple[int, int]:
        """Bytes of a base that is in 4 bits already: what ZeRO 3 shares, of `element` bytes each, and the packed."""
        matrices = quantised.packed_linears(self.config, self.linears)
        settings = self.config["quantization_config"]
        double = bool(settings.get("bnb_4bit_use_double_quant"))
        unpacked = parameter_count(self.shapes) - element_count(matrices)
        shared = unpacked * element
        held = four_bit_bytes(matrices, double)
        return shared, held

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor in the files of its weights, by name."""
        tensors: dict[str, StoredTensor] = {}
        if self.folder is None or self.scratch:
            return tensors
        for file in weight_files(self.folder):
            for tensor in read_header(file):
                tensors[tensor.name] = tensor
        return tensors


def locate(base: Base) -> Model | None:
    """The base in its folder, or in the local cache of the hub; None when it is a hub id that is not there."""
    folder = folder_of_base(base)
    if folder is None:
        return None
    config = _read_config(folder / "config.json")
    return Model(config, folder, base.init == "scratch")


def folder_of_base(base: Base) -> Path | None:
    """The folder that a base names, or where the local cache of the hub has it; None when it is not there."""
    folder = Path(base.model)
    return folder if folder.is_dir() else _cached_snapshot(base)


def parameter_count(shapes: Mapping[str, TensorShape]) -> int:
    """The number of parameters that have these shapes."""
    sizes = map(prod, shapes.values())
    return sum(sizes)


def _read_config(path: Path) -> Config:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a base has a config.json") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise InputError(f"{path}: found {kind}; allowed: an object")
    return config


def _cached_snapshot(base: Base) -> Path | None:
    """The snapshot of a hub id in the local cache, by revision, if it shows what it is a snapshot of."""
    if not HUB_ID.fullmatch(base.model):
        return None
    folder_name = f"models--{base.model.replace('/', '--')}"
    repository = _hub_cache() / folder_name
    commit = _cached_commit(repository, base.revision)
    if not commit:
        return None
    snapshot = repository / "snapshots" / commit
    for name in ("config.json", ADAPTER_CONFIG):
        if (snapshot / name).exists():
            return snapshot
    return None


def _hub_cache() -> Path:
    """Where the library of the hub keeps what it fetched."""
    default_home = Path.home() / ".cache" / "huggingface"
    home = Path(os.environ.get("HF_HOME", default_home))
    cache = os.environ.get("HF_HUB_CACHE", home / "hub")
    return Path(cache)


def _cached_commit(repository: Path, revision: str | None) -> str:
    """The commit that a revision (None: main) stands for in a repository of the cache; "" where that is unknown."""
    reference = repository / "refs" / (revision or "main")
    if reference.is_file():
        return reference.read_text().strip()
    return revision or ""
