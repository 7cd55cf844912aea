"""A base in 4 bits, by bitsandbytes: how it is loaded, kept from DeepSpeed, and read back.

Every rank holds the whole 4-bit base at every ZeRO stage: its packed bytes cannot be partitioned as a parameter of
DeepSpeed, nor is there much to gain. bitsandbytes is imported when a quantised base is really used.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from methods.base import Gather, Keywords, Tensors
from methods.parts.weights import shapes


def load_options(quant: str, double: bool, dtype: torch.dtype) -> Keywords:
    """Let `from_pretrained` quantise every linear layer but the head, tensor by tensor as it reads them."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def four_bit_layers(model: Module) -> Iterator[tuple[str, Any]]:
    """The layers whose weight is in 4 bits, by name."""
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def require(model: Module, gather: Gather) -> None:
    """Raise ValueError where bitsandbytes left a linear layer of a base as it was."""
    in_4_bits = {name for name, _ in four_bit_layers(model)}
    linears, _ = shapes(model, gather)
    for name in linears:
        if name not in in_4_bits:
            layer = model.get_submodule(name)
            kind = type(layer).__name__
            raise ValueError(f"method: bitsandbytes cannot keep {name}, a {kind}, in 4 bits; nearest: lora")


def register_as_buffers(model: Module) -> None:
    """Make buffers of the 4-bit weights: they move with the model, and no ZeRO stage partitions or trains them.

    Those that are hidden already stay so.
    """
    for _, layer in four_bit_layers(model):
        if "weight" in layer._parameters:
            weight = layer._parameters.pop("weight")
            layer.register_buffer("weight", weight, persistent=False)
    disable_cpu_repacking(model)


def disable_cpu_repacking(model: Module) -> None:
    """Let 4-bit layers compute in the dtype they are told: on some CPUs an evaluation repacks the weight in bf16."""
    for _, layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def cast_others(model: Module, dtype: torch.dtype) -> None:
    """Give what is not in 4 bits this dtype; a base that comes in 4 bits has the rest as it was saved."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def transposed(layer: Any) -> bool:
    """Whether the 16-bit base has this layer's weight as [in, out], like GPT-2; in 4 bits all are [out, in]."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Conv1D):
        return True
    source = getattr(layer, "source_cls", None)  # what transformers replaced by a layer in 4 bits
    return source is Conv1D


def oriented(layer: Any, weight: Tensor) -> Tensor:
    """A weight of a layer turned from the way that the 16-bit base has it to [out, in], or back."""
    if transposed(layer):
        return weight.T
    return weight


def dequantised(weight: Any) -> Tensor:
    """What a 4-bit weight stands for, fp32 [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def state(layer: Any) -> Tensors:
    """All that a 4-bit weight with double quantisation is made of, as the layer holds it."""
    constants = layer.weight.quant_state
    return {
        "packed": layer.weight.data.view(-1),
        "absmax": constants.absmax,
        "group_absmax": constants.state2.absmax,
        "offset": constants.offset.view(1),
    }


def add(layer: Any, update: Tensor) -> float:
    """Put an update [out, in] into a layer's weight by quantising the sum; gives the error's norm over the update's.

    Rank 0 says how the sum is rounded, so that all ranks hold the same bytes.
    """
    from bitsandbytes.functional import quantize_4bit

    weight = layer.weight
    target = dequantised(weight) + update
    quant_type = weight.quant_state.quant_type
    packed, constants = quantize_4bit(target, quant_type=quant_type, compress_statistics=True)
    new_values = (packed.view(-1), constants.absmax, constants.state2.absmax, constants.offset)
    old_values = state(layer).values()
    for old, new in zip(old_values, new_values, strict=True):
        if dist.is_initialized():
            dist.broadcast(new, 0)
        old.copy_(new)
    error = dequantised(weight) - target
    ratio = error.norm() / update.norm()
    return float(ratio)


def twin(model: Any) -> Any:
    """The same architecture without quantisation and without weights, to save others under its config."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = model.generation_config
    return plain


def quantisation_error(weight: Tensor, quant: str, double: bool) -> Tensor:
    """What quantisation takes from a weight [out, in], fp32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, constants = quantize_4bit(weight.contiguous(), quant_type=quant, compress_statistics=double)
    in_16_bits = dequantize_4bit(packed, constants)
    return weight.float() - in_16_bits.float()


def originals(config: Any) -> Callable[[str], Tensor]:
    """A reader of the weights, as the base of this config has them on disk, one at a time."""
    from safetensors import safe_open

    files = _files(config)

    def read(name: str) -> Tensor:
        """Read the weight of this name; raises ValueError where no file has it."""
        if name not in files:
            raise ValueError(f"{config._name_or_path}: its safetensors files have no {name}, which this start needs")
        with safe_open(files[name], framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(name)
        return value

    return read


def _files(config: Any) -> dict[str, str]:
    """The safetensors file of every weight by name, for a folder or a hub id that from_pretrained has loaded."""
    from safetensors import safe_open

    index = _cached_path(config, "model.safetensors.index.json")
    single = _cached_path(config, "model.safetensors")
    if index is not None:
        return _files_of_index(config, Path(index))
    if single is None:
        return {}
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _files_of_index(config: Any, index: Path) -> dict[str, str]:
    """The file of every weight by name, for a base that has several."""
    content = json.loads(index.read_text())
    file_names = content["weight_map"]
    paths = {}
    for file_name in set(file_names.values()):
        path = _cached_path(config, file_name)
        paths[file_name] = path or ""
    files = {}
    for weight, file_name in file_names.items():
        files[weight] = paths[file_name]
    return files


def _cached_path(config: Any, file_name: str) -> str | None:
    """Where a file of the base lies on this machine; None where the base has no such file."""
    from transformers.utils import cached_file

    path: str | None = cached_file(
        config._name_or_path,
        file_name,
        revision=getattr(config, "_commit_hash", None),
        _raise_exceptions_for_missing_entries=False,
    )
    return path
