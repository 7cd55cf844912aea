"""Where a basis is kept between refreshes, in fp32 or in 4 bits, and when it is refreshed.

Q-GaLore, Zhang et al. 2024, arXiv 2407.08296: sections 3.1 (uniform codes), 3.3 (bases in 4 bits) and 3.2 (a matrix
whose leading direction stays is refreshed half as often).
"""

from typing import Protocol

import torch
from torch.nn.functional import cosine_similarity, pad

from methods.base import Piece
from methods.subspace.matrix import BLOCK

LEVELS = 15  # largest 4-bit code
SIMILAR = 0.4  # mean cosine from which an interval doubles
REMEMBERED = 5  # cosines in that mean


class Projector(Protocol):
    """What both kinds have."""

    def get(self) -> torch.Tensor:
        """The basis in R^{S x R}, fp32."""
        ...

    def set(self, basis_SR: torch.Tensor) -> None:
        """Keep a basis."""
        ...

    def pieces(self, name: str) -> list[Piece]:
        """What a checkpoint holds of it; every rank has it whole."""
        ...


class Fp32Projector:
    """The basis as it is."""

    def __init__(self, side: int, rank: int, device: torch.device) -> None:
        self._basis_SR = torch.zeros(side, rank, device=device)

    def get(self) -> torch.Tensor:
        """The basis."""
        return self._basis_SR

    def set(self, basis_SR: torch.Tensor) -> None:
        """Keep a basis."""
        self._basis_SR.copy_(basis_SR)

    def pieces(self, name: str) -> list[Piece]:
        """The basis."""
        return [Piece(f"{name}.basis", 0, {"basis": self._basis_SR.view(-1)}, True)]


class Int4Projector:
    """p ~ s (code - z) in blocks of 256, s = (max - min) / 15, z = -round(min / s); two codes to a byte."""

    def __init__(self, side: int, rank: int, device: torch.device) -> None:
        self._side, self._rank = side, rank
        blocks = -(-side * rank // BLOCK)
        self._codes = torch.zeros(blocks * BLOCK // 2, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(blocks, device=device)
        self._zeros = torch.zeros(blocks, device=device)

    def get(self) -> torch.Tensor:
        """The basis that the codes stand for."""
        codes = torch.stack([self._codes & LEVELS, self._codes >> 4], 1).view(-1, BLOCK)
        values = self._scales[:, None] * (codes - self._zeros[:, None])
        return values.view(-1)[: self._side * self._rank].view(self._side, self._rank)

    def set(self, basis_SR: torch.Tensor) -> None:
        """Round a basis to codes."""
        values = pad(basis_SR.reshape(-1), (0, 2 * len(self._codes) - basis_SR.numel())).view(-1, BLOCK)
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        scales = (high - low).clamp(min=1e-5) / LEVELS
        zeros = (-torch.round(low / scales)).clamp(0, LEVELS)
        codes = (torch.round(values / scales) + zeros).clamp(0, LEVELS).to(torch.uint8).view(-1, 2)
        self._codes.copy_(codes[:, 0] | codes[:, 1] << 4)
        self._scales.copy_(scales[:, 0])
        self._zeros.copy_(zeros[:, 0])

    def pieces(self, name: str) -> list[Piece]:
        """Pairs of codes, and by block their scale and zero point."""
        blocks = {"scale": self._scales, "zero": self._zeros}
        return [
            Piece(f"{name}.basis", 0, {"codes": self._codes}, True),
            Piece(f"{name}.basis.blocks", 0, blocks, True),
        ]


class Calendar:
    """When each matrix is refreshed: every so many steps, and if lazy, half as often while its direction stays.

    A gradient of zeros, as that of an expert without tokens, gives no basis; then every step looks again until there
    is one. The sign of a direction is free, so similarity is the cosine's magnitude (the authors' code takes it as it
    is).
    """

    def __init__(self, every: int, lazy: bool, sides: list[int], device: torch.device) -> None:
        self._lazy = lazy
        self._intervals = torch.full((len(sides),), every)
        self._empty = torch.zeros(len(sides), dtype=torch.bool)
        self._cosines = torch.full((len(sides), REMEMBERED), torch.nan, dtype=torch.float64)
        self._directions = [torch.zeros(side if lazy else 0, device=device) for side in sides]

    def due(self, step: int) -> list[int]:
        """The matrices whose basis is chosen at this step."""
        intervals, empty = self._intervals.tolist(), self._empty.tolist()
        return [i for i, interval in enumerate(intervals) if empty[i] or step % interval == 0]

    def note(self, index: int, basis_SR: torch.Tensor) -> None:
        """A matrix has a new basis."""
        self._empty[index] = not basis_SR.any()
        if not self._lazy or self._empty[index]:
            return
        old, new = self._directions[index], basis_SR[:, 0]
        if old.any():
            cosines = self._cosines[index]
            cosines[:-1] = cosines[1:].clone()
            cosines[-1] = cosine_similarity(old.double(), new.double(), dim=0).abs()
            if cosines.mean() >= SIMILAR:  # NaN until enough are known
                self._intervals[index] *= 2
        old.copy_(new)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it, but for the directions."""
        lazy = {"intervals": self._intervals, "cosines": self._cosines} if self._lazy else {}
        return {"empty": self._empty, **lazy}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take that back."""
        self._empty.copy_(state["empty"])
        if self._lazy:
            self._intervals.copy_(state["intervals"])
            self._cosines.copy_(state["cosines"])

    def pieces(self, names: list[str]) -> list[Piece]:
        """The leading direction of every matrix at its last refresh."""
        pairs = zip(names, self._directions, strict=True) if self._lazy else ()
        return [Piece(f"{name}.direction", 0, {"direction": vector}, True) for name, vector in pairs]
