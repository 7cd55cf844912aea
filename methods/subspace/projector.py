"""Where a basis is kept between refreshes, in fp32 or in 4 bits, and when it is refreshed.

Q-GaLore, Zhang et al. 2024, arXiv 2407.08296: sections 3.1 (uniform codes), 3.3 (bases in 4 bits) and 3.2 (a matrix
whose leading direction stays is refreshed half as often).
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from methods.base import StatePieces, Tensors, replicated_piece
from methods.subspace.matrix import BLOCK, ceil_div

LEVELS = 15  # largest 4-bit code
LEAST_SPAN = 1e-5  # of a block: where all its entries are one, the scale is not zero
SIMILAR = 0.4  # mean cosine from which an interval doubles
REMEMBERED = 5  # cosines in that mean


class Projector(Protocol):
    """What memory for a basis can do, in fp32 and in 4 bits."""

    def get(self) -> Tensor:
        """The basis in R^{S x R}, in fp32."""
        ...

    def set(self, basis_SR: Tensor) -> None:
        """Store a basis in R^{S x R} in place of the last."""
        ...

    def pieces(self, name: str) -> StatePieces:
        """What a checkpoint holds of it; every rank has it whole."""
        ...


class Fp32Projector:
    """Memory for a basis in fp32, as it is."""

    def __init__(self, side: int, rank: int, device: torch.device) -> None:
        basis_SR = torch.zeros(side, rank, device=device)
        self._basis_SR = basis_SR

    def get(self) -> Tensor:
        """The basis in R^{S x R}, in fp32."""
        return self._basis_SR

    def set(self, basis_SR: Tensor) -> None:
        """Store a basis in R^{S x R} in place of the last."""
        self._basis_SR.copy_(basis_SR)

    def pieces(self, name: str) -> StatePieces:
        """The basis, flattened row by row, as one piece."""
        elements = self._basis_SR.view(-1)
        piece = replicated_piece(f"{name}.basis", {"basis": elements})
        return [piece]


class Int4Projector:
    """p ~ s (code - z) in blocks of 256, s = (max - min) / 15, z = -round(min / s); two codes to a byte."""

    def __init__(self, side: int, rank: int, device: torch.device) -> None:
        self._side = side
        self._rank = rank
        size = side * rank
        blocks = ceil_div(size, BLOCK)
        padded = blocks * BLOCK
        pairs = padded // 2
        self._codes = torch.zeros(pairs, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(blocks, device=device)
        self._zeros = torch.zeros(blocks, device=device)

    def get(self) -> Tensor:
        """The basis in R^{S x R} that the codes stand for, in fp32."""
        side = self._side
        rank = self._rank
        even = self._codes & LEVELS
        odd = self._codes >> 4
        pairs = torch.stack([even, odd], 1)
        codes = pairs.view(-1, BLOCK)
        zeros = self._zeros[:, None]
        scales = self._scales[:, None]
        levels = codes - zeros
        values = scales * levels
        elements = values.view(-1)
        size = side * rank
        unpadded = elements[:size]
        return unpadded.view(side, rank)

    def set(self, basis_SR: Tensor) -> None:
        """Round a basis in R^{S x R} to codes, block by block, and store them."""
        elements = basis_SR.reshape(-1)
        pairs = len(self._codes)
        padding = 2 * pairs - len(elements)
        elements = pad(elements, (0, padding))
        values = elements.view(-1, BLOCK)
        low = values.amin(1, keepdim=True)
        high = values.amax(1, keepdim=True)
        span = high - low
        span = span.clamp(min=LEAST_SPAN)
        scale = span / LEVELS
        zero = low / scale
        zero = -torch.round(zero)
        zero = zero.clamp(0, LEVELS)
        levels = values / scale
        levels = torch.round(levels)
        levels = levels + zero
        levels = levels.clamp(0, LEVELS)
        codes = levels.to(torch.uint8)
        self._store(codes, scale, zero)

    def _store(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Pack codes two to a byte; scale and zero point are [blocks, 1]."""
        pairs = codes.view(-1, 2)
        even, odd = pairs.T
        high = odd << 4
        packed = even | high
        self._codes.copy_(packed)
        scales = scale[:, 0]
        zeros = zero[:, 0]
        self._scales.copy_(scales)
        self._zeros.copy_(zeros)

    def pieces(self, name: str) -> StatePieces:
        """Pairs of codes, and by block their scale and zero point."""
        blocks = {"scale": self._scales, "zero": self._zeros}
        by_pair = replicated_piece(f"{name}.basis", {"codes": self._codes})
        by_block = replicated_piece(f"{name}.basis.blocks", blocks)
        return [by_pair, by_block]


class RefreshSchedule:
    """When each matrix is refreshed: every so many steps, and if lazy, half as often while its direction stays.

    A gradient of zeros, as that of an expert without tokens, gives no basis; then every step looks again until there
    is one. The sign of a direction is free, so similarity is the cosine's magnitude (the authors' code takes it as it
    is).
    """

    def __init__(self, every: int, lazy: bool, sides: list[int], device: torch.device) -> None:
        count = len(sides)
        unknown = torch.nan
        self._lazy = lazy
        self._intervals = torch.full((count,), every)
        self._empty = torch.zeros(count, dtype=torch.bool)
        self._cosines = torch.full((count, REMEMBERED), unknown, dtype=torch.float64)
        self._directions = []
        if not lazy:
            return
        for side in sides:
            direction = torch.zeros(side, device=device)
            self._directions.append(direction)

    def due(self, step: int) -> list[int]:
        """The matrices whose basis is chosen at this step."""
        intervals = self._intervals.tolist()
        empty = self._empty.tolist()
        due = []
        for index, interval in enumerate(intervals):
            since_refresh = step % interval
            if since_refresh == 0 or empty[index]:
                due.append(index)
        return due

    def note(self, index: int, basis_SR: Tensor) -> None:
        """Know that a matrix has a new basis; a lazy schedule may double the matrix's interval."""
        has_basis = bool(basis_SR.any())
        self._empty[index] = not has_basis
        if not self._lazy or not has_basis:
            return
        direction = self._directions[index]
        new_direction = basis_SR[:, 0]
        if direction.any():
            old = direction.double()
            new = new_direction.double()
            cosine = cosine_similarity(old, new, dim=0)
            magnitude = cosine.abs()
            self._note_cosine(index, magnitude)
        direction.copy_(new_direction)

    def _note_cosine(self, index: int, cosine: Tensor) -> None:
        """Forget the oldest of a matrix's cosines for a new one, and double its interval where they are large."""
        cosines = self._cosines[index]
        last = cosines[1:]
        cosines[:-1] = last.clone()
        cosines[-1] = cosine
        mean = cosines.mean()  # NaN until enough are known
        if mean >= SIMILAR:
            self._intervals[index] *= 2

    def state(self) -> Tensors:
        """What a checkpoint must hold of it, but for the directions."""
        state = {"empty": self._empty}
        if self._lazy:
            state["intervals"] = self._intervals
            state["cosines"] = self._cosines
        return state

    def load_state(self, state: Tensors) -> None:
        """Go on with the intervals and cosines that `state` gave."""
        empty = state["empty"]
        self._empty.copy_(empty)
        if self._lazy:
            intervals = state["intervals"]
            cosines = state["cosines"]
            self._intervals.copy_(intervals)
            self._cosines.copy_(cosines)

    def pieces(self, names: list[str]) -> StatePieces:
        """The leading direction of every matrix at its last refresh; none where the schedule is not lazy."""
        if not self._lazy:
            return []
        pieces = []
        for name, direction in zip(names, self._directions, strict=True):
            piece = replicated_piece(f"{name}.direction", {"direction": direction})
            pieces.append(piece)
        return pieces
