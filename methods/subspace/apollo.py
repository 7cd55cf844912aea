"""APOLLO: the full gradient, each channel scaled as AdamW scales it in a random subspace.

Zhu et al. 2024, arXiv 2412.05270, algorithm 1: with R the low-rank gradient and N AdamW's step for it, channel j of G
is scaled by s_j = ||N_j|| / ||R_j||, channels lying along the longer side (rows of a tall G, columns of a wide one).
The norm-growth limiter (Fira, arXiv 2410.01623) keeps a matrix's ||G s|| under 1.01 times its last one.
The option `scale` is the paper's alpha, where the authors' code takes the root of what it calls scale.
"""

from collections.abc import Mapping, Sequence

import torch

from methods.base import Fragment, gradient
from methods.subspace.exchange import Exchange
from methods.subspace.matrix import Matrix, whole_rows

GROWTH = 1.01
TINY = 1e-8


class Scaler:
    """The scaled gradients of one step after another; every rank knows the norms of the last."""

    def __init__(self, matrices: Sequence[Matrix], exchange: Exchange, device: torch.device) -> None:
        self._matrices, self._exchange = matrices, exchange
        self.norms = torch.zeros(len(matrices), dtype=torch.float64, device=device)

    def directions(
        self, low: torch.Tensor, step: torch.Tensor, fragments: Mapping[str, Fragment], corrected: float
    ) -> dict[str, torch.Tensor]:
        """What goes off the fragments, from this rank's slices of R and of N = `corrected` times AdamW's ratio."""
        norms = [squares.sqrt() for squares in self._channel_squares(low, step)]
        half = len(self._matrices)
        scales = [(n / (r + TINY)).float() for r, n in zip(norms[:half], norms[half:], strict=True)]
        scaled = {
            matrix.name: scale_channels(matrix, scale, fragments[matrix.name])
            for matrix, scale in zip(self._matrices, scales, strict=True)
            if matrix.name in fragments
        }
        limits = self._limits(scaled, corrected)
        return {m.name: scaled[m.name] * limits[i] for i, m in enumerate(self._matrices) if m.name in scaled}

    def _limits(self, scaled: Mapping[str, torch.Tensor], corrected: float) -> torch.Tensor:
        """The limiter's factor for every matrix; a matrix's first step is not limited."""
        squares = torch.zeros_like(self.norms)
        for i, matrix in enumerate(self._matrices):
            if matrix.name in scaled:
                squares[i] = torch.linalg.vector_norm(scaled[matrix.name], dtype=torch.float64) ** 2
        norms = self._exchange.sum_slices(squares).sqrt() / corrected
        growth = (norms / (self.norms + TINY)).clamp(min=GROWTH) / GROWTH
        limits = torch.where(self.norms > 0, 1 / growth, 1.0)
        self.norms.copy_(norms * limits)
        return limits.float()

    def _channel_squares(self, *slices: torch.Tensor) -> list[torch.Tensor]:
        """The squared norm of each channel, per matrix of one flat vector after another."""
        parts = [_squares(matrix, self._exchange.own, flat) for flat in slices for matrix in self._matrices]
        together = self._exchange.sum_slices(torch.cat(parts))
        return list(together.split([len(part) for part in parts]))


def scale_channels(matrix: Matrix, scale: torch.Tensor, fragment: Fragment) -> torch.Tensor:
    """A fragment's gradient with its channels scaled."""
    rows, first = whole_rows(gradient(fragment), fragment.start, matrix.columns)
    scaled = rows * (scale[first : first + len(rows), None] if matrix.right else scale)
    begin = fragment.start - first * matrix.columns
    return scaled.view(-1)[begin : begin + fragment.stop - fragment.start]


def _squares(matrix: Matrix, own: slice, flat: torch.Tensor) -> torch.Tensor:
    """What this rank's slice of a flat vector gives to the squared norms of a matrix's channels."""
    out = flat.new_zeros(matrix.rows if matrix.right else matrix.columns, dtype=torch.float64)
    begin, stop = max(own.start, matrix.offset), min(own.stop, matrix.offset + matrix.size)
    if begin < stop:
        part = flat[begin - own.start : stop - own.start]
        rows, first = whole_rows(part, begin - matrix.offset, matrix.low_shape[1])
        squares = rows.double() ** 2
        if matrix.right:
            out[first : first + len(rows)] = squares.sum(1)
        else:
            out += squares.sum(0)
    return out
