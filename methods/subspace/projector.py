"""Where a basis is kept between refreshes, in fp32 or in 4 bits, and when it is refreshed.

Q-GaLore, Zhang et al. 2024, arXiv 2407.08296: sections 3.1 (uniform codes), 3.3 (bases in 4 bits) and 3.2 (a matrix
whose leading direction stays is refreshed half as often).
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from methods.base import Piece, Tensors
from methods.subspace.matrix import BLOCK, ceil_div

LEVELS = 15  # largest 4-bit code
SIMILAR = 0.4  # mean cosine from which an interval doubles
REMEMBERED = 5  # cosines in that mean


class Projector(Protocol):
    """What memory for a basis can do, in fp32 and in 4 bits."""

    def get(self) -> Tensor:
        """The basis in R^{S x R}, in fp32."""
        ...

    def set(self, basis_SR: Tensor) -> None:
        """Store a basis instead of the last."""
        ...

    def pieces(self, name: str) -> list[Piece]:
        """What a checkpoint holds of it; every rank has it whole."""
        ...


class Fp32Projector:
    """Memory for a basis as it is."""

    def __init__(self, side: int, rank: int, device: torch.device) -> None:
        basis_SR = torch.zeros(side, rank, device=device)
        self._basis_SR = basis_SR

    def get(self) -> Tensor:
        """The basis in R^{S x R}, in fp32."""
        return self._basis_SR

    def set(self, basis_SR: Tensor) -> None:
        """Store a basis instead of the last."""
        self._basis_SR.copy_(basis_SR)

    def pieces(self, name: str) -> list[Piece]:
        """The basis, flattened, as one piece."""
        elements = self._basis_SR.view(-1)
        tensors = {"basis": elements}
        piece = Piece(f"{name}.basis", 0, tensors, True)
        return [piece]


class Int4Projector:
    """p ~ s (code - z) in blocks of 256, s = (max - min) / 15, z = -round(min / s); two codes to a byte."""

    def __init__(self, side: int, rank: int, device: torch.device) -> None:
        self._side = side
        self._rank = rank
        size = side * rank
        blocks = ceil_div(size, BLOCK)
        pairs = blocks * BLOCK // 2
        self._codes = torch.zeros(pairs, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(blocks, device=device)
        self._zeros = torch.zeros(blocks, device=device)

    def get(self) -> Tensor:
        """The basis that the codes stand for."""
        even = self._codes & LEVELS
        odd = self._codes >> 4
        pairs = torch.stack([even, odd], 1)
        codes = pairs.view(-1, BLOCK)
        zeros = self._zeros[:, None]
        scales = self._scales[:, None]
        values = scales * (codes - zeros)
        elements = values.view(-1)
        size = self._side * self._rank
        unpadded = elements[:size]
        return unpadded.view(self._side, self._rank)

    def set(self, basis_SR: Tensor) -> None:
        """Round a basis to codes."""
        elements = basis_SR.reshape(-1)
        padded = 2 * len(self._codes)
        padding = padded - basis_SR.numel()
        elements = pad(elements, (0, padding))
        values = elements.view(-1, BLOCK)
        low = values.amin(1, keepdim=True)
        high = values.amax(1, keepdim=True)
        span = high - low
        span = span.clamp(min=1e-5)
        scale = span / LEVELS
        zero = -torch.round(low / scale)
        zero = zero.clamp(0, LEVELS)
        levels = torch.round(values / scale)
        levels = levels + zero
        levels = levels.clamp(0, LEVELS)
        codes = levels.to(torch.uint8)
        even, odd = codes.view(-1, 2).T
        pairs = even | odd << 4
        self._codes.copy_(pairs)
        self._scales.copy_(scale[:, 0])
        self._zeros.copy_(zero[:, 0])

    def pieces(self, name: str) -> list[Piece]:
        """Pairs of codes, and by block their scale and zero point."""
        blocks = {"scale": self._scales, "zero": self._zeros}
        pairs = {"codes": self._codes}
        by_pair = Piece(f"{name}.basis", 0, pairs, True)
        by_block = Piece(f"{name}.basis.blocks", 0, blocks, True)
        return [by_pair, by_block]


class RefreshSchedule:
    """When each matrix is refreshed: every so many steps, and if lazy, half as often while its direction stays.

    A gradient of zeros, as that of an expert without tokens, gives no basis; then every step looks again until there
    is one. The sign of a direction is free, so similarity is the cosine's magnitude (the authors' code takes it as it
    is).
    """

    def __init__(self, every: int, lazy: bool, sides: list[int], device: torch.device) -> None:
        self._lazy = lazy
        count = len(sides)
        self._intervals = torch.full((count,), every)
        self._empty = torch.zeros(count, dtype=torch.bool)
        self._cosines = torch.full((count, REMEMBERED), torch.nan, dtype=torch.float64)
        self._directions = []
        for side in sides:
            length = side
            if not lazy:
                length = 0
            direction = torch.zeros(length, device=device)
            self._directions.append(direction)

    def due(self, step: int) -> list[int]:
        """The matrices whose basis is chosen at this step."""
        intervals = self._intervals.tolist()
        empty = self._empty.tolist()
        due = []
        for index, interval in enumerate(intervals):
            if empty[index] or step % interval == 0:
                due.append(index)
        return due

    def note(self, index: int, basis_SR: Tensor) -> None:
        """Know that a matrix has a new basis; a lazy schedule may double the matrix's interval."""
        self._empty[index] = not basis_SR.any()
        if not self._lazy or self._empty[index]:
            return
        old = self._directions[index]
        new = basis_SR[:, 0]
        if old.any():
            cosine = cosine_similarity(old.double(), new.double(), dim=0)
            magnitude = cosine.abs()
            self._note_cosine(index, magnitude)
        old.copy_(new)

    def _note_cosine(self, index: int, cosine: Tensor) -> None:
        """Forget the oldest of a matrix's cosines for a new one, and double its interval where they are large."""
        cosines = self._cosines[index]
        cosines[:-1] = cosines[1:].clone()
        cosines[-1] = cosine
        if cosines.mean() >= SIMILAR:  # NaN until enough are known
            self._intervals[index] *= 2

    def state(self) -> Tensors:
        """What a checkpoint must hold of it, but for the directions."""
        state = {"empty": self._empty}
        if self._lazy:
            state["intervals"] = self._intervals
            state["cosines"] = self._cosines
        return state

    def load_state(self, state: Tensors) -> None:
        """Take back what `state` gave."""
        self._empty.copy_(state["empty"])
        if self._lazy:
            self._intervals.copy_(state["intervals"])
            self._cosines.copy_(state["cosines"])

    def pieces(self, names: list[str]) -> list[Piece]:
        """The leading direction of every matrix at its last refresh."""
        if not self._lazy:
            return []
        pieces = []
        for name, vector in zip(names, self._directions, strict=True):
            piece = Piece(f"{name}.direction", 0, {"direction": vector}, True)
            pieces.append(piece)
        return pieces
