"""An adapter's folder: its config and its weights, read once, checked, and named by their digest.

Only safetensors is read: a pickle can run code.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from serving.error import AdapterRefused

FILES = {  # config -> weights
    "adapter_config.json": "adapter_model.safetensors",
    "bottleneck_config.json": "bottleneck.safetensors",
}
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


class Folder:
    """The files of one adapter; what is taken from it must be all there is."""

    def __init__(self, path: Path, limit: int) -> None:
        """Read a folder; raises AdapterRefused where it holds no adapter, a broken one, or over `limit` bytes."""
        self.path = path
        self.config_path, self.weights_path = _files(path)
        if (size := self.weights_path.stat().st_size) > limit:
            raise AdapterRefused(f"{self.weights_path}: found {size} bytes; allowed: at most {limit}")
        raw, text = self.weights_path.read_bytes(), self.config_path.read_bytes()
        digest = hashlib.sha256(raw)
        digest.update(text)
        if (base := path / "config.json").exists():
            digest.update(base.read_bytes())
        self.digest = digest.hexdigest()
        self.config = _config(self.config_path, text)
        self._tensors = _tensors(self.weights_path, raw)
        self._taken: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return sorted(self._tensors)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in fp32, whose shape must be as given (None: any size)."""
        if name not in self._tensors:
            raise AdapterRefused(f"{self.weights_path}: found no tensor {name}, which its config asks for")
        found = self._tensors[name]
        if len(shape) != found.dim() or any(s not in (None, f) for s, f in zip(shape, found.shape, strict=False)):
            wanted = " x ".join("any" if s is None else str(s) for s in shape)
            raise AdapterRefused(
                f"{self.weights_path}: found {name} of shape {' x '.join(map(str, found.shape))}; allowed on this "
                f"base: {wanted}"
            )
        self._taken.add(name)
        return found.float()

    def finish(self) -> None:
        """Raise AdapterRefused where tensors are left that nobody has taken."""
        if left := sorted(self._tensors.keys() - self._taken):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise AdapterRefused(f"{self.weights_path}: found {left[0]}{more}, which has no place on this base")

    def refuse(self, key: str, allowed: str) -> AdapterRefused:
        """The error for a value of the config."""
        return AdapterRefused(f"{self.config_path}: {key}: found {self.config.get(key)!r}; allowed: {allowed}")

    def only(self, *known: str) -> None:
        """Raise AdapterRefused where the config says something else that could change what is computed."""
        for key, value in self.config.items():
            if value and key not in known and key not in HARMLESS:
                raise AdapterRefused(f"{self.config_path}: {key}: found {value!r}; allowed: nothing, or null")


# What a config says of how an adapter was made or found, and what its tensors' names say again.
HARMLESS = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
        "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
        "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
        "runtime_config", "target_modules", "task_type", "vera_dropout",
    )
)  # fmt: skip


def _files(path: Path) -> tuple[Path, Path]:
    for config, weights in FILES.items():
        if (path / config).is_file():
            if (path / weights).is_file():
                return path / config, path / weights
            pickles = [name for name in PICKLES if (path / name).exists()]
            found = f"{pickles[0]}, a pickle, which could run code" if pickles else "no weights"
            raise AdapterRefused(f"{path}: found {found}; allowed: {weights}")
    if (path / "config.json").is_file():
        raise AdapterRefused(
            f"{path}: found a whole model; allowed: an adapter. A model that was trained in full is a base of its own"
        )
    raise AdapterRefused(f"{path}: found no {' or '.join(FILES)}")


def _config(path: Path, text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise AdapterRefused(f"{path}: found no JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterRefused(f"{path}: found {type(config).__name__}; allowed: an object")
    return config


def _tensors(path: Path, raw: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(raw)
    except SafetensorError as error:
        raise AdapterRefused(f"{path}: found a broken or truncated file: {error}") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterRefused(f"{path}: found values in {name} that are not finite")
    return tensors


def pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """What a PEFT config says of one module: the first pattern that its name matches as a whole or after a dot."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
