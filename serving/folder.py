"""An adapter's folder: its config and its weights, read once, checked, and named by their digest.

Only safetensors is read: a pickle can run code.
"""

import hashlib
import json
import re
from collections.abc import Iterable
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
TensorsInFile = dict[str, Tensor]
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


class Folder:
    """The config and the weights of one adapter; what is taken from it must be all there is."""

    def __init__(self, path: Path, config: bytes, tensors: TensorsInFile, digest: str) -> None:
        """The adapter that the text of a folder's config describes, with these weights; raises AdapterRefused."""
        self.path = path
        self.config_path, self.weights_path = _find_files(path)
        self.digest = digest
        self.config = _parse_config(self.config_path, config)
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise AdapterRefused(f"{self.weights_path}: found values in {name} that are not finite")
        self._tensors = tensors
        self._taken: set[str] = set()

    @classmethod
    def read(cls, path: Path, limit: int) -> "Folder":
        """Read a folder; raises AdapterRefused where it holds no adapter, a broken one, or over `limit` bytes."""
        config_path, weights_path = _find_files(path)
        size = weights_path.stat().st_size
        if size > limit:
            raise AdapterRefused(f"{weights_path}: found {size} bytes; allowed: at most {limit}")
        weights = weights_path.read_bytes()
        config = config_path.read_bytes()
        digest = _digest_of_parts(path, weights, config)
        tensors = _parse_tensors(weights_path, weights)
        return cls(path, config, tensors, digest)

    @classmethod
    def renewed(cls, path: Path, tensors: TensorsInFile) -> "Folder":
        """The adapter of a folder, with tensors in memory in the place of those in its file."""
        config_path, _ = _find_files(path)
        config = config_path.read_bytes()
        digest = _digest_of_tensors(path, tensors, config)
        return cls(path, config, tensors, digest)

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return sorted(self._tensors)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in fp32, whose shape must be as given (None: any size)."""
        if name not in self._tensors:
            raise AdapterRefused(f"{self.weights_path}: found no tensor {name}, which its config asks for")
        tensor = self._tensors[name]
        if not fits(tensor.shape, shape):
            actual = as_product(tensor.shape)
            allowed = as_product(shape)
            raise AdapterRefused(
                f"{self.weights_path}: found {name} of shape {actual}; allowed on this base: {allowed}"
            )
        self._taken.add(name)
        return tensor.float()

    def finish(self) -> None:
        """Raise AdapterRefused where tensors are left that nobody has taken."""
        not_taken = self._tensors.keys() - self._taken
        left = sorted(not_taken)
        if not left:
            return
        names = left[0]
        more = len(left) - 1
        if more:
            names += f" and {more} more"
        raise AdapterRefused(f"{self.weights_path}: found {names}, which has no place on this base")

    def refuse(self, key: str, allowed: str) -> AdapterRefused:
        """The error for a value of the config."""
        value = self.config.get(key)
        field = f"{self.config_path}: {key}"
        message = f"{field}: found {value!r}; allowed: {allowed}"
        return AdapterRefused(message)

    def only(self, *known: str) -> None:
        """Raise AdapterRefused where the config says something else that could change what is computed."""
        harmless = HARMLESS.union(known)
        for key, value in self.config.items():
            if value and key not in harmless:
                raise self.refuse(key, "nothing, or null")


# What a config says of how an adapter was made or found, and what its tensors' names say again.
HARMLESS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "vera_dropout",
    )
)


def adapter_digest(path: Path) -> str:
    """The digest that the adapter in a folder is known by; raises AdapterRefused where there is none."""
    config_path, weights_path = _find_files(path)
    weights = weights_path.read_bytes()
    config = config_path.read_bytes()
    return _digest_of_parts(path, weights, config)


def _digest_of_parts(path: Path, weights: bytes, config: bytes) -> str:
    """The sha256 of an adapter's weights and config, and of the config that it wants its base to have."""
    digest = hashlib.sha256(weights)
    return _with_configs(path, digest, config)


def _digest_of_tensors(path: Path, tensors: TensorsInFile, config: bytes) -> str:
    """The same of tensors in memory: of their names and their values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        values = tensor.flatten()
        raw = values.view(torch.uint8)
        digest.update(raw.numpy().data)
    return _with_configs(path, digest, config)


def _with_configs(path: Path, digest: Any, config: bytes) -> str:
    """A digest of weights, with their config and the one of the base in their folder."""
    digest.update(config)
    base_config = path / "config.json"
    if base_config.exists():
        digest.update(base_config.read_bytes())
    return str(digest.hexdigest())


def fits(actual: torch.Size, allowed: tuple[int | None, ...]) -> bool:
    """Whether a tensor has the shape that is allowed (None: any size)."""
    if len(actual) != len(allowed):
        return False
    for size, wanted in zip(actual, allowed, strict=True):
        if wanted is None:
            continue
        if wanted != size:
            return False
    return True


def as_product(shape: Iterable[int | None]) -> str:
    """A shape as people write it, like 8 x any."""
    sizes = []
    for size in shape:
        if size is None:
            sizes.append("any")
        else:
            sizes.append(str(size))
    return " x ".join(sizes)


def _find_files(path: Path) -> tuple[Path, Path]:
    """The config and the weights of a folder; raises AdapterRefused where one of them is missing."""
    for config_name, weights_name in FILES.items():
        config = path / config_name
        weights = path / weights_name
        if not config.is_file():
            continue
        if weights.is_file():
            return config, weights
        found = _instead_of_weights(path)
        raise AdapterRefused(f"{path}: found {found}; allowed: {weights_name}")
    known = " or ".join(FILES)
    raise AdapterRefused(f"{path}: found no {known}")


def _instead_of_weights(path: Path) -> str:
    """What a folder without readable weights holds in their place."""
    for name in PICKLES:
        if (path / name).exists():
            return f"{name}, a pickle, which could run code"
    return "no weights"


def _parse_config(path: Path, text: bytes) -> dict[str, Any]:
    """The config in a file's text; raises AdapterRefused where it is not a JSON object."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise AdapterRefused(f"{path}: found no JSON: {error}") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise AdapterRefused(f"{path}: found {kind}; allowed: an object")
    return config


def _parse_tensors(path: Path, weights: bytes) -> TensorsInFile:
    """The tensors in a file's bytes; raises AdapterRefused where it is broken."""
    try:
        tensors: TensorsInFile = load(weights)
    except SafetensorError as error:
        raise AdapterRefused(f"{path}: found a broken or truncated file: {error}") from error
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; their sum says so at once where it is, and may be infinite where they are not."""
    total = tensor.sum()
    if bool(torch.isfinite(total)):
        return True
    finite = torch.isfinite(tensor)
    return bool(finite.all())


def pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """What a PEFT config says of one module: the first pattern that its name matches as a whole or after a dot."""
    if not patterns:
        return default
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
