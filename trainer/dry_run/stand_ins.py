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
from torch.nn.functional import scaled_dot_product_attention

from trainer.dry_run.kernels import unread_losses

PositionIds = npt.NDArray[Any]  # [B, T] of a micro-batch


@contextmanager
def stand_ins(position_BT: PositionIds) -> Iterator[None]:
    """Within it, a model runs on a micro-batch with these positions."""
    with ExitStack() as patched:
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
