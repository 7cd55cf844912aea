"""The mathematics of GaLore: a matrix's low-rank gradient, the way back, and the basis that both use.

The basis P in R^{S x R} has orthonormal columns and lies on the shorter side of G in R^{M x N}:
M >= N: the low-rank gradient is G P in R^{M x R} ("right"); else P^T G in R^{R x N} ("left").
Zhao et al. 2024, arXiv 2403.03507, section 4.1 and algorithm 2. Projecting is linear in G, so a rank that holds some
elements of G gives its share of the low-rank gradient, and shares add up.

Singular vectors count up to the numerical rank: those whose value is above 2^-16 of the largest, 128 times fp32's
rounding. The others are directions of rounding errors, which differ between layouts, and along which Adam would make
steps as long as along any. The basis has zeros in their place, so nothing moves there until the next refresh. (In
bf16 gradients have larger rounding errors than that, and layouts agree to 5e-3 only.)

Shapes: M rows, N columns, R rank, S = min(M, N), L = max(M, N), F elements of a fragment.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from methods.parts.ranks import rounded

BLOCK = 256  # elements; low-rank matrices start at its multiples, so that 8-bit blocks are the same in every layout
NOISE = 2.0**-16  # singular values below this share of the largest are rounding errors
OVERSAMPLING = 8  # directions that a sketch has beyond the rank (Halko et al. 2011, section 4.2)


@dataclass(frozen=True)
class Matrix:
    """A matrix that is trained in a subspace, and where its low-rank gradient starts in the flat vector of all."""

    name: str
    rows: int
    columns: int
    rank: int
    offset: int

    @property
    def right(self) -> bool:
        """Whether the basis is multiplied from the right."""
        return self.rows >= self.columns

    @property
    def side(self) -> int:
        """S, the length of a basis vector."""
        return min(self.rows, self.columns)

    @property
    def low_shape(self) -> tuple[int, int]:
        """Shape of the low-rank gradient."""
        return (self.rows, self.rank) if self.right else (self.rank, self.columns)

    @property
    def size(self) -> int:
        """Elements of the low-rank gradient."""
        return math.prod(self.low_shape)

    @property
    def padded(self) -> int:
        """The same, up to whole blocks."""
        return -(-self.size // BLOCK) * BLOCK

    def low(self, flat: torch.Tensor) -> torch.Tensor:
        """This matrix's part of the flat vector of all, in its low shape."""
        return flat[self.offset : self.offset + self.size].view(self.low_shape)


def lay_out(shapes: Mapping[str, tuple[int, int]], rank: int) -> list[Matrix]:
    """The matrices one after another; all have more rows and columns than the rank."""
    matrices: list[Matrix] = []
    offset = 0
    for name, (rows, columns) in shapes.items():
        matrices.append(Matrix(name, rows, columns, rank, offset))
        offset += matrices[-1].padded
    return matrices


def whole_rows(part_F: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, int]:
    """Elements [start, start + F) of a flattened matrix as whole rows, zeros around them; and the first row."""
    first, stop = start // width, start + part_F.numel()
    last = -(-stop // width)
    if start % width == 0 and stop % width == 0:
        return part_F.view(-1, width), first
    rows = part_F.new_zeros(last - first, width)
    rows.view(-1)[start - first * width : stop - first * width] = part_F
    return rows, first


def project(matrix: Matrix, basis_SR: torch.Tensor, grad_F: torch.Tensor, start: int, low: torch.Tensor) -> None:
    """Add to the low-rank gradient what elements [start, start + F) of the gradient contribute."""
    rows, first = whole_rows(grad_F, start, matrix.columns)
    if matrix.right:
        low[first : first + len(rows)].addmm_(rows, basis_SR)
    else:
        low.addmm_(basis_SR[first : first + len(rows)].T, rows)


def lift(matrix: Matrix, basis_SR: torch.Tensor, low: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of the flattened matrix that a low-rank one stands for."""
    first, last = start // matrix.columns, -(-stop // matrix.columns)
    rows = low[first:last] @ basis_SR.T if matrix.right else basis_SR[first:last] @ low
    return rows.reshape(-1)[start - first * matrix.columns : stop - first * matrix.columns]


def exact_basis(grad_MN: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading singular vectors of the shorter side, from the Gram matrix in fp64; NaN for a NaN gradient.

    fp64 makes the square harmless: what fp32 gradients say of singular values is far above its rounding.
    """
    wide_SL = (grad_MN.T if grad_MN.shape[0] >= grad_MN.shape[1] else grad_MN).double()
    return _leading(wide_SL @ wide_SL.T, rank).to(grad_MN.dtype)


def fast_basis(grad_MN: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Nearly the same by a random sketch with two power iterations (Halko et al. 2011, algorithms 4.4 and 5.1)."""
    wide_SL = grad_MN.T if grad_MN.shape[0] >= grad_MN.shape[1] else grad_MN
    side, length = wide_SL.shape
    sketch = torch.randn(length, min(rank + OVERSAMPLING, side), generator=generator).to(grad_MN)
    range_SK = torch.linalg.qr(wide_SL @ sketch).Q
    for _ in range(2):
        range_SK = torch.linalg.qr(wide_SL @ torch.linalg.qr(wide_SL.T @ range_SK).Q).Q
    small_KL = (range_SK.T @ wide_SL).double()
    return canonical(range_SK @ _leading(small_KL @ small_KL.T, rank).to(grad_MN.dtype))


def random_basis(side: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian with variance 1 / R (APOLLO, arXiv 2412.05270, algorithm 1)."""
    return torch.randn(side, rank, generator=generator) / math.sqrt(rank)


def canonical(basis_SR: torch.Tensor) -> torch.Tensor:
    """The same vectors with their largest entry positive: the sign of a singular vector is free.

    Of entries that are equal but for rounding errors the first counts.
    """
    largest = rounded(basis_SR.abs()).argmax(0, keepdim=True)
    return basis_SR * torch.where(basis_SR.gather(0, largest) < 0, -1.0, 1.0).to(basis_SR.dtype)


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """Random numbers that depend on these three alone, not on layout or device."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors of the largest eigenvalues, which are squared singular values, largest first; zeros for noise."""
    if not gram.isfinite().all():
        return gram.new_full((len(gram), rank), math.nan)
    values, vectors = torch.linalg.eigh(gram)
    leading = canonical(vectors[:, -rank:].flip(1))
    is_signal: torch.Tensor = values[-rank:].flip(0) > NOISE**2 * values[-1]
    return leading * is_signal
