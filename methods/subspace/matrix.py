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
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.parts.ranks import rounded
from methods.parts.targets import Linears, MatrixShape

RowBlock = tuple[Tensor, int]  # whole rows of a matrix, and the number of the first of them

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
        """S, the length of a basis vector: the shorter side."""
        return min(self.rows, self.columns)

    @property
    def low_shape(self) -> MatrixShape:
        """Shape of the low-rank gradient: [M, R] or [R, N]."""
        if self.right:
            return (self.rows, self.rank)
        return (self.rank, self.columns)

    @property
    def size(self) -> int:
        """Number of elements of the low-rank gradient, L x R."""
        return math.prod(self.low_shape)

    @property
    def padded(self) -> int:
        """Elements of the low-rank gradient, up to whole blocks."""
        blocks = ceil_div(self.size, BLOCK)
        return blocks * BLOCK

    def low(self, flat: Tensor) -> Tensor:
        """This matrix's part of the flat vector of all, in its low shape."""
        stop = self.offset + self.size
        part = flat[self.offset : stop]
        return part.view(self.low_shape)


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient of two integers, rounded up."""
    return -(-dividend // divisor)


def overlap(owned: slice, start: int, stop: int) -> range:
    """The places of [start, stop) that lie in a slice too; empty where there are none."""
    first = max(owned.start, start)
    last = min(owned.stop, stop)
    return range(first, last)


def lay_out(shapes: Linears, rank: int) -> list[Matrix]:
    """The matrices of these names and shapes one after another; all have more rows and columns than the rank."""
    matrices: list[Matrix] = []
    offset = 0
    for name, shape in shapes.items():
        rows, columns = shape
        matrix = Matrix(name, rows, columns, rank, offset)
        matrices.append(matrix)
        offset += matrix.padded
    return matrices


def whole_rows(part_F: Tensor, start: int, width: int) -> RowBlock:
    """Elements [start, start + F) of a flattened matrix as whole rows, zeros around them; and the first row."""
    stop = start + part_F.numel()
    first = start // width
    last = ceil_div(stop, width)
    above = first * width  # elements in the rows before
    count = last - first
    elements_of_rows = count * width
    if elements_of_rows == part_F.numel():
        rows = part_F.view(-1, width)
        return rows, first
    rows = part_F.new_zeros(count, width)
    elements = rows.view(-1)
    begin = start - above
    end = stop - above
    elements[begin:end] = part_F
    return rows, first


def project(matrix: Matrix, basis_SR: Tensor, grad_F: Tensor, start: int, low: Tensor) -> None:
    """Add to the low-rank gradient what elements [start, start + F) of the gradient contribute."""
    rows, first = whole_rows(grad_F, start, matrix.columns)
    last = first + len(rows)
    if matrix.right:
        low_rows = low[first:last]
        low_rows.addmm_(rows, basis_SR)
    else:
        basis_rows = basis_SR[first:last]
        transposed = basis_rows.T
        low.addmm_(transposed, rows)


def lift(matrix: Matrix, basis_SR: Tensor, low: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened matrix that a low-rank one stands for."""
    width = matrix.columns
    first = start // width
    last = ceil_div(stop, width)
    if matrix.right:
        low_rows = low[first:last]
        rows = low_rows @ basis_SR.T
    else:
        basis_rows = basis_SR[first:last]
        rows = basis_rows @ low
    above = first * width
    elements = rows.reshape(-1)
    begin = start - above
    end = stop - above
    return elements[begin:end]


def exact_basis(grad_MN: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the shorter side, from the Gram matrix in fp64; NaN for a NaN gradient.

    fp64 makes the square harmless: what fp32 gradients say of singular values is far above its rounding.
    """
    wide_SL = _wide(grad_MN)
    wide_SL = wide_SL.double()
    gram_SS = wide_SL @ wide_SL.T
    basis_SR = _leading(gram_SS, rank)
    return basis_SR.to(grad_MN.dtype)


def fast_basis(grad_MN: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Nearly the same by a random sketch with two power iterations (Halko et al. 2011, algorithms 4.4 and 5.1).

    K directions are sketched, and the leading R of them are taken.
    """
    wide_SL = _wide(grad_MN)
    tall_LS = wide_SL.T
    side, length = wide_SL.shape
    width = rank + OVERSAMPLING
    width = min(width, side)
    sketch = torch.randn(length, width, generator=generator)
    sketch_LK = sketch.to(grad_MN)
    image_SK = wide_SL @ sketch_LK
    range_SK = _orthonormal(image_SK)
    for _ in range(2):
        image_LK = tall_LS @ range_SK
        corange_LK = _orthonormal(image_LK)
        image_SK = wide_SL @ corange_LK
        range_SK = _orthonormal(image_SK)
    small_KL = range_SK.T @ wide_SL
    small_KL = small_KL.double()
    gram_KK = small_KL @ small_KL.T
    leading_KR = _leading(gram_KK, rank)
    leading_KR = leading_KR.to(grad_MN.dtype)
    basis_SR = range_SK @ leading_KR
    return canonical(basis_SR)


def random_basis(side: int, rank: int, generator: torch.Generator) -> Tensor:
    """Gaussian with variance 1 / R (APOLLO, arXiv 2412.05270, algorithm 1)."""
    normal_SR = torch.randn(side, rank, generator=generator)
    deviation = math.sqrt(rank)
    return normal_SR / deviation


def canonical(basis_SR: Tensor) -> Tensor:
    """The same vectors with their largest entry positive: the sign of a singular vector is free.

    Of entries that are equal but for rounding errors the first counts.
    """
    magnitude_SR = basis_SR.abs()
    magnitude_SR = rounded(magnitude_SR)
    place_1R = magnitude_SR.argmax(0, keepdim=True)
    entry_1R = basis_SR.gather(0, place_1R)
    is_negative_1R = entry_1R < 0
    sign_1R = torch.where(is_negative_1R, -1.0, 1.0)
    sign_1R = sign_1R.to(basis_SR.dtype)
    return basis_SR * sign_1R


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """Random numbers that depend on these three alone, not on layout or device."""
    identity = f"{seed}/{step}/{name}"
    message = identity.encode()
    digest = hashlib.sha256(message).digest()
    first_bytes = digest[:8]
    number = int.from_bytes(first_bytes, "big")
    positive = number >> 1  # a seed has 63 bits
    generator = torch.Generator()
    return generator.manual_seed(positive)


def _wide(grad_MN: Tensor) -> Tensor:
    """The gradient [S, L], transposed if it is not wide."""
    rows, columns = grad_MN.shape
    if rows >= columns:
        return grad_MN.T
    return grad_MN


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix."""
    decomposition = torch.linalg.qr(matrix)
    orthonormal: Tensor = decomposition.Q
    return orthonormal


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, which are squared singular values, largest first; zeros for noise."""
    if not gram.isfinite().all():
        shape = (len(gram), rank)
        return gram.new_full(shape, math.nan)
    values, vectors = torch.linalg.eigh(gram)  # smallest first
    last_vectors = vectors[:, -rank:]
    leading = last_vectors.flip(1)
    leading = canonical(leading)
    last_values = values[-rank:]
    leading_values = last_values.flip(0)
    largest = values[-1]
    noise = NOISE**2 * largest
    is_signal: Tensor = leading_values > noise
    return leading * is_signal
