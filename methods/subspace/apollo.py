"""APOLLO: the full gradient, each channel scaled as AdamW scales it in a random subspace.

Zhu et al. 2024, arXiv 2412.05270, algorithm 1: with R the low-rank gradient and N AdamW's step for it, channel j of G
is scaled by s_j = ||N_j|| / ||R_j||, channels lying along the longer side (rows of a tall G, columns of a wide one).
The norm-growth limiter (Fira, arXiv 2410.01623) keeps a matrix's ||G s|| under 1.01 times its last one.
The option `scale` is the paper's alpha, where the authors' code takes the root of what it calls scale.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from methods.base import Fragment, Fragments, Tensors, gradient
from methods.subspace.exchange import Exchange
from methods.subspace.matrix import Matrix, overlap, whole_rows

GROWTH = 1.01
TINY = 1e-8


class Scaler:
    """The scaled gradients of one step after another; every rank knows the norms of the last."""

    def __init__(self, matrices: Sequence[Matrix], exchange: Exchange, device: torch.device) -> None:
        self._matrices = matrices
        self._exchange = exchange
        count = len(matrices)
        self.norms = torch.zeros(count, dtype=torch.float64, device=device)

    def directions(self, low: Tensor, step: Tensor, fragments: Fragments, corrected: float) -> Tensors:
        """What fragments move against, from this rank's slices of R and of N = `corrected` times AdamW's ratio."""
        scales = self._scales(low, step)
        scaled: Tensors = {}
        for index, matrix in enumerate(self._matrices):
            name = matrix.name
            fragment = fragments.get(name)
            if fragment is not None:
                scaled[name] = scale_channels(matrix, scales[index], fragment)
        limits = self._limits(scaled, corrected)
        limited: Tensors = {}
        for index, matrix in enumerate(self._matrices):
            name = matrix.name
            elements = scaled.get(name)
            if elements is not None:
                limited[name] = elements * limits[index]
        return limited

    def _scales(self, low: Tensor, step: Tensor) -> list[Tensor]:
        """s_j = ||N_j|| / ||R_j|| of every channel, matrix by matrix; a collective."""
        squares = self._channel_squares(low, step)
        count = len(self._matrices)
        scales = []
        for index in range(count):
            low_norm = squares[index].sqrt()
            step_norm = squares[count + index].sqrt()
            divisor = low_norm + TINY
            scale = step_norm / divisor
            scale = scale.float()
            scales.append(scale)
        return scales

    def _limits(self, scaled: Mapping[str, Tensor], corrected: float) -> Tensor:
        """The limiter's factor for every matrix; a matrix's first step is not limited."""
        last_norms = self.norms
        squares = torch.zeros_like(last_norms)
        for index, matrix in enumerate(self._matrices):
            elements = scaled.get(matrix.name)
            if elements is not None:
                norm = torch.linalg.vector_norm(elements, dtype=torch.float64)
                squares[index] = norm**2
        squares = self._exchange.all_reduce_slices(squares)
        norms = squares.sqrt()
        norms = norms / corrected
        divisor = last_norms + TINY
        growth = norms / divisor
        growth = growth.clamp(min=GROWTH)
        excess = growth / GROWTH
        is_known = last_norms > 0
        limits = torch.where(is_known, 1 / excess, 1.0)
        limited = norms * limits
        last_norms.copy_(limited)
        return limits.float()

    def _channel_squares(self, *slices: Tensor) -> list[Tensor]:
        """The squared norm of each channel, per matrix of one flat vector after another."""
        exchange = self._exchange
        parts = []
        for flat in slices:
            for matrix in self._matrices:
                part = _squares(matrix, exchange.owned, flat)
                parts.append(part)
        together = torch.cat(parts)
        together = exchange.all_reduce_slices(together)
        lengths = list(map(len, parts))
        reduced = together.split(lengths)
        return list(reduced)


def scale_channels(matrix: Matrix, scale: Tensor, fragment: Fragment) -> Tensor:
    """A fragment's gradient, flat, each of its channels times that channel's scale."""
    grad = gradient(fragment)
    width = matrix.columns
    rows, first = whole_rows(grad, fragment.start, width)
    if matrix.right:
        last = first + len(rows)
        scale = scale[first:last]
        scale = scale[:, None]
    scaled = rows * scale
    elements = scaled.view(-1)
    above = first * width  # elements in the rows before
    begin = fragment.start - above
    stop = fragment.stop - above
    return elements[begin:stop]


def _squares(matrix: Matrix, owned: slice, flat: Tensor) -> Tensor:
    """What this rank's slice of a flat vector gives to the squared norms of a matrix's channels."""
    channels = max(matrix.rows, matrix.columns)
    totals = flat.new_zeros(channels, dtype=torch.float64)
    offset = matrix.offset
    end = offset + matrix.size
    common = overlap(owned, offset, end)
    if not common:
        return totals
    begin = common.start - owned.start
    stop = common.stop - owned.start
    part = flat[begin:stop]
    start = common.start - offset
    _, width = matrix.low_shape
    rows, first = whole_rows(part, start, width)
    rows = rows.double()
    squares = rows**2
    if matrix.right:
        last = first + len(rows)
        totals[first:last] = squares.sum(1)
    else:
        totals += squares.sum(0)
    return totals
