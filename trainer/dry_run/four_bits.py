"""A base in 4 bits for a dry run: what bitsandbytes holds and makes on a GPU, without bitsandbytes.

A layer keeps packed weights and their constants. For a product, forward and backward, the weight is made whole in the
dtype of its input, as long as that takes; the input is not kept (bitsandbytes/autograd/_functions.py). PEFT gives
adapters of such layers their input as it is where autocast is on, and copies what the layer gave
(peft/tuners/lora/bnb.py).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from methods.options.base import BaseConfig, four_bit_bytes
from methods.options.low_rank import Lora
from runfolder.job import Job

OF_ADAPTERS = "lora_"  # in the names of what PEFT adds
LIKE_LORA = ("rank", "alpha", "dropout", "target", "exclude")  # options of QLoRA that LoRA has too


def is_in_4_bits(job: Job, config: BaseConfig) -> bool:
    """Whether a job's base has its linear layers in 4 bits."""
    has_them_quantised = "quantization_config" in config
    return has_them_quantised or job.method.quantises


def in_16_bits(job: Job, config: BaseConfig) -> tuple[Job, BaseConfig]:
    """The job and its base's config.json without quantisation, to be put in 4 bits by `hold_in_4_bits`."""
    plain = dict(config)
    plain.pop("quantization_config", None)
    if not job.method.quantises:
        return job, plain
    options = job.method.model_dump()
    shared = {}
    for name in LIKE_LORA:
        shared[name] = options[name]
    method = Lora.model_validate(shared)
    with_lora = job.model_copy(update={"method": method})
    return with_lora, plain


def hold_in_4_bits(model: nn.Module, job: Job, config: BaseConfig) -> int:
    """Put the linear layers of a model on no device in 4 bits; gives the bytes that they have then."""
    settings = config.get("quantization_config") or {}
    of_method = getattr(job.method, "double_quant", False)
    double = settings.get("bnb_4bit_use_double_quant", of_method)
    left_out = settings.get("llm_int8_skip_modules") or ()
    held = 0
    for name, layer in _layers(model):
        if any(part in name for part in left_out):
            continue
        shape = (layer.out_features, layer.in_features)
        size = four_bit_bytes({name: shape}, double)
        layer.weight = None  # type: ignore[assignment]
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        layer.register_buffer("packed", packed, persistent=False)
        layer.__class__ = PackedLinear  # a method of a class, as layers share one compilation
        held += size
    casts = "cast_input_dtype_enabled"
    for module in model.modules():
        if getattr(module, casts, False):
            setattr(module, casts, False)
    return held


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a base that are frozen, but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head or OF_ADAPTERS in name:
            continue
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            yield name, module


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed."""

    packed: Tensor  # bytes of the weight and its constants

    def forward(self, value: Tensor) -> Tensor:
        """What the layer gives for an input."""
        apply: Any = _PackedProduct.apply
        product: Tensor = apply(value, self.packed, self.out_features, self.in_features)
        if self.bias is not None:
            product = product + self.bias
        return product.clone()


class _PackedProduct(torch.autograd.Function):
    """A product with a weight that is made whole for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, packed: Tensor, rows: int, columns: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = (rows, columns)
        weight_OI = dequantise(packed, rows, columns, value.dtype, again=False)
        return value.matmul(weight_OI.t())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        rows, columns = ctx.shape
        weight_OI = dequantise(packed, rows, columns, slope.dtype, again=True)
        return slope.matmul(weight_OI), None, None, None


@torch.library.custom_op("fleetune_dry_run::dequantise", mutates_args=())
def dequantise(packed: Tensor, rows: int, columns: int, dtype: torch.dtype, again: bool) -> Tensor:  # noqa: ARG001
    """A weight made whole from its packed bytes, without its values.

    `again` is for the backward pass: a compiler that saw the same call twice would keep what the first one gave.
    """
    shape = (rows, columns)
    return torch.empty(shape, dtype=dtype, device=packed.device)


@dequantise.register_fake
def _fake_dequantise(packed: Tensor, rows: int, columns: int, dtype: torch.dtype, again: bool) -> Tensor:  # noqa: ARG001
    shape = (rows, columns)
    return torch.empty(shape, dtype=dtype, device=packed.device)
