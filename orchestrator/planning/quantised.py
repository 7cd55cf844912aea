"""Bases that are quantised already: by what, and the true shapes of weights in 4 bits, read without torch.

bitsandbytes stores a matrix of [out, in] weights as bytes of two weights each, and what it needs to restore them
beside: `X.weight.absmax` and the like, and `X.weight.quant_state.bitsandbytes__nf4`, whose bytes are JSON that holds
the matrix's own shape.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.parts.targets import Linears
from orchestrator.errors import InputError

FOUR_BITS = "bitsandbytes, 4 bits"
_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__\w+$")
_BESIDE = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `size` bytes from byte `begin` of a file."""

    name: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    size: int


def method(config: Mapping[str, Any]) -> str | None:
    """What a base was quantised by, as its config.json says; None for one that is not quantised."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        return "an unknown method"
    name = str(found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "an unknown method"))
    if name == "bitsandbytes":
        return FOUR_BITS if found.get("load_in_4bit") else "bitsandbytes, 8 bits"
    return name


def are_packed(names: Iterable[str]) -> bool:
    """Whether any of a base's tensors is in 4 bits."""
    return any(_STATE.match(name) for name in names)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in files of a base in 4 bits: what the packed ones stand for, and of the others."""
    packed = {match["weight"]: _shape(tensors[name]) for name in tensors if (match := _STATE.match(name))}
    stored = {name: tensor.shape for name, tensor in tensors.items() if not _is_beside(name, packed)}
    return stored | packed


def packed(config: Mapping[str, Any], linears: Linears) -> dict[str, tuple[int, int]]:
    """Those of a base's linear layers that are in 4 bits: all but the ones that its config.json leaves out."""
    left_out = config["quantization_config"].get("llm_int8_skip_modules") or ()
    return {name: shape for name, shape in linears.items() if not any(part in name for part in left_out)}


def _is_beside(name: str, packed: Iterable[str]) -> bool:
    """Whether a tensor only says how one of the packed weights is restored."""
    return _BESIDE.sub("", name) != name and _BESIDE.sub("", name) in packed


def _shape(state: Tensor) -> tuple[int, ...]:
    """The shape that a weight's quantisation state holds."""
    with state.file.open("rb") as stream:
        stream.seek(state.begin)
        text = stream.read(state.size)
    try:
        return tuple(map(int, json.loads(text)["shape"]))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{state.file}: {state.name} does not say the shape of its weight") from None
