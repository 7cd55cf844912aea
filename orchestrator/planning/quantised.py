"""Bases that are quantised already: by what, and the true shapes of weights in 4 bits, read without torch.

bitsandbytes stores a matrix of [out, in] weights as bytes of two weights each, and what it needs to restore them
beside: `X.weight.absmax` and the like, and `X.weight.quant_state.bitsandbytes__nf4`, whose bytes are JSON that holds
the matrix's own shape.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from methods.parts.targets import Linears
from orchestrator.errors import InputError
from orchestrator.planning.safetensors import Shapes, StoredTensor, TensorShape

FOUR_BITS = "bitsandbytes, 4 bits"
_UNKNOWN_METHOD = "an unknown method"
_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__\w+$")
_BESIDE = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")


def method(config: Mapping[str, Any]) -> str | None:
    """What a base was quantised by, as its config.json says; None for one that is not quantised."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        return _UNKNOWN_METHOD
    by_default = _UNKNOWN_METHOD
    if "load_in_4bit" in settings:
        by_default = "bitsandbytes"
    name = str(settings.get("quant_method") or by_default)
    if name != "bitsandbytes":
        return name
    if settings.get("load_in_4bit"):
        return FOUR_BITS
    return "bitsandbytes, 8 bits"


def are_packed(names: Iterable[str]) -> bool:
    """Whether any of a base's tensors is in 4 bits."""
    matches = map(_STATE.match, names)
    return any(matches)


def unpacked_shapes(tensors: Mapping[str, StoredTensor]) -> Shapes:
    """The shape of every weight in files of a base in 4 bits: what the packed ones stand for, and of the others."""
    unpacked: Shapes = {}
    for name, tensor in tensors.items():
        match = _STATE.match(name)
        if match:
            unpacked[match["weight"]] = _shape_in_state(tensor)
    stored: Shapes = {}
    for name, tensor in tensors.items():
        if not _is_beside(name, unpacked):
            stored[name] = tensor.shape
    return stored | unpacked


def packed_linears(config: Mapping[str, Any], linears: Linears) -> Linears:
    """Those of a base's linear layers that are in 4 bits: all but the ones that its config.json leaves out."""
    settings = config["quantization_config"]
    left_out = settings.get("llm_int8_skip_modules") or ()
    matrices = {}
    for name, shape in linears.items():
        is_left_out = any(part in name for part in left_out)
        if not is_left_out:
            matrices[name] = shape
    return matrices


def _is_beside(name: str, packed: Iterable[str]) -> bool:
    """Whether a tensor only says how one of the packed weights is restored."""
    weight = _BESIDE.sub("", name)
    if weight == name:
        return False
    return weight in packed


def _shape_in_state(state: StoredTensor) -> TensorShape:
    """The shape of a weight, as its quantisation state holds it."""
    with state.file.open("rb") as stream:
        stream.seek(state.begin)
        text = stream.read(state.size)
    try:
        shape = json.loads(text)["shape"]
        return tuple(map(int, shape))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{state.file}: {state.name} does not say the shape of its weight") from None
