"""What stands in for operations in a dry run: those that read values, and those that hold more on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.amp import custom_bwd, custom_fwd
from torch.nn.functional import scaled_dot_product_attention

from trainer.dry_run.kernels import unread_losses

PositionIds = npt.NDArray[Any]  # [B, T] of a micro-batch


class _KeptInput(torch.autograd.Function):
    """A linear layer's product as DeepSpeed has it at stage 3: it keeps its input though the weight is frozen.

    It keeps what it is given, before autocast: deepspeed/runtime/zero/linear.py.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(value, weight)
        product = value.matmul(weight.t())
        return product if bias is None else product + bias

    @staticmethod
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        value, weight = ctx.saved_tensors
        to_value, to_weight, to_bias = ctx.needs_input_grad
        slope_NO = slope.flatten(0, -2)
        of_weight = None
        if to_weight:
            value_NI = value.flatten(0, -2)
            of_weight = slope_NO.t().matmul(value_NI)
        of_bias = slope_NO.sum(0) if to_bias else None
        return slope.matmul(weight) if to_value else None, of_weight, of_bias


def _keeping_linear(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    apply: Any = _KeptInput.apply
    return apply(value, weight, bias)


@contextmanager
def stand_ins(position_BT: PositionIds, stage: int) -> Iterator[None]:
    """Within it, a model runs on a micro-batch with these positions, at a ZeRO stage."""
    with ExitStack() as patched:
        if stage == 3:
            patched.enter_context(patch("torch.nn.functional.linear", _keeping_linear))
        patched.enter_context(patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        patched.enter_context(patch("trainer.kernels.head.chunk_losses", unread_losses))
        patched.enter_context(_known_positions(position_BT))
        patched.enter_context(_one_refresh())
        steps_BT = np.diff(position_BT, axis=-1)
        if (steps_BT == 1).all():  # transformers makes the mask of packed rows where it cannot see that none are
            patched.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda _: None))
        yield


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Attention whose boolean mask becomes a bias that takes no memory: a CPU keeps one for each layer."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        shape = attn_mask.shape
        single = query.new_empty(1)
        attn_mask = single.expand(shape)
    return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)


@contextmanager
def _known_positions(position_BT: PositionIds) -> Iterator[None]:
    """Within it, shifted attention cuts rows by these positions, as it has to see them."""
    from methods.parts.shifted_attention import TokenRuns

    cut = TokenRuns.cut

    def known(_: Tensor, group: int, shift: int) -> TokenRuns:
        with unset_fake_temporarily():
            positions = torch.from_numpy(position_BT)
            runs = cut(positions, group, shift)
        shape = runs.cell_N.shape
        cells = torch.empty(shape, dtype=torch.long)
        return TokenRuns(cells, runs.count, runs.longest)

    with patch.object(TokenRuns, "cut", known):
        yield


@contextmanager
def _one_refresh() -> Iterator[None]:
    """Within it, GaLore's bases are chosen in the first step, whatever the gradients."""
    from methods.subspace import matrix
    from methods.subspace.projector import RefreshSchedule

    def due(schedule: RefreshSchedule, step: int) -> list[int]:
        count = len(schedule._intervals)
        return [] if step else list(range(count))

    def leading(gram: Tensor, rank: int) -> Tensor:
        _, vectors = torch.linalg.eigh(gram)
        leading_vectors: Tensor = vectors[:, -rank:]
        return leading_vectors.contiguous()

    with (
        patch.object(RefreshSchedule, "due", due),
        patch.object(RefreshSchedule, "note", lambda *_: None),
        patch.object(matrix, "_leading", leading),
    ):
        yield
