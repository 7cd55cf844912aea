"""An adapter's files as bytes that somebody brought: checked before they are read, and read without a path of his."""

import json
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from serving.error import AdapterRefused
from serving.folder import is_finite
from serving.gateway.refusal import invalid
from serving.packed import Packed
from serving.pool import Pool

CONFIG_BYTES = 64 * 2**10
HEADER_BYTES = 4 * 2**20  # of safetensors: names, types and sizes of tensors, of which an adapter has no millions
LENGTH_BYTES = 8  # in front of it
# Patterns of a config are regular expressions. Without groups and with few repetitions they cannot take for ever.
PATTERN = re.compile(r"[A-Za-z0-9_.\\^$|*+?-]{1,200}")
MOST_REPETITIONS = 2
MOST_PATTERNS = 1000
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")
FILES_OF_KIND = {
    "adapter_config.json": "adapter_model.safetensors",
    "bottleneck_config.json": "bottleneck.safetensors",
}


@dataclass(frozen=True)
class AdapterFiles:
    """A config, and the weights that belong to it."""

    config_name: str  # one of FILES_OF_KIND
    config: bytes
    weights: bytes


def files_of_folder(folder: Path) -> AdapterFiles:
    """The files of a folder that holds an adapter; raises AdapterRefused where it holds none."""
    for config_name, weights_name in FILES_OF_KIND.items():
        config_path = folder / config_name
        if config_path.is_file():
            weights = (folder / weights_name).read_bytes()
            return AdapterFiles(config_name, config_path.read_bytes(), weights)
    raise AdapterRefused(f"{folder}: found no adapter")


def read_files(pool: Pool, files: AdapterFiles) -> Packed:
    """An adapter on the host from the bytes of its files; raises AdapterRefused, without a path of ours."""
    check_header(files.weights)
    with tempfile.TemporaryDirectory(prefix="fleetune-adapter-") as scratch:
        folder = Path(scratch)
        (folder / files.config_name).write_bytes(files.config)
        (folder / FILES_OF_KIND[files.config_name]).write_bytes(files.weights)
        packed = reading(lambda: pool.prepare(folder), f"{scratch}/")
    check_finite(packed)
    return packed


def reading(read: Callable[[], Packed], hidden: str) -> Packed:
    """What a reader of untrusted files gives; raises AdapterRefused for whatever it raises, without a path in it."""
    try:
        return read()
    except AdapterRefused as error:
        message = str(error).replace(hidden, "").replace(hidden.rstrip("/"), "adapter")
        raise AdapterRefused(message) from error
    except Exception as error:
        logging.getLogger(__name__).info("an adapter could not be read", exc_info=True)
        kind = type(error).__name__
        raise AdapterRefused(f"adapter_config.json: found values that no adapter has ({kind})") from error


def check_header(weights: bytes) -> None:
    """Raise AdapterRefused where the header of a file of safetensors is larger than any adapter's."""
    size = int.from_bytes(weights[:LENGTH_BYTES], "little")
    end = LENGTH_BYTES + size
    if end <= len(weights) and size > HEADER_BYTES:
        found = f"a header of {size} bytes"
        raise AdapterRefused(f"weights: found {found}; allowed: {HEADER_BYTES}")


def check_config(raw: bytes) -> None:
    """Raise ApiRefusal where a config is too large, or has patterns that could take for ever."""
    if len(raw) > CONFIG_BYTES:
        raise invalid(f"config: found {len(raw)} bytes; allowed: {CONFIG_BYTES}")
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise invalid("config: found no JSON") from error
    if not isinstance(config, dict):
        raise invalid("config: allowed: an object")
    for key in PATTERN_KEYS:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise invalid(f"config.{key}: allowed: an object of at most {MOST_PATTERNS}")
        for pattern in patterns:
            repetitions = sum(pattern.count(sign) for sign in "*+?")
            if not PATTERN.fullmatch(pattern) or repetitions > MOST_REPETITIONS:
                raise invalid(f"config.{key}: allowed: names of modules, and patterns without groups")


def check_finite(packed: Packed) -> None:
    """Raise AdapterRefused where numbers have become infinite in the base's type, or by their scale."""
    adapter = packed.adapter
    tensors: list[Tensor | None] = [packed.block, adapter.prefix_L2VHE, adapter.prompt_VD]
    tensors += [adapter.embed_VD, adapter.head_VD]
    for tensor in tensors:
        if tensor is not None and not is_finite(tensor):
            raise AdapterRefused("adapter: found values that are not finite in the base's type")
