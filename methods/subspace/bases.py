"""The bases of all matrices: chosen when they are due, each on one rank, and kept on every rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.base import Fragments, Piece, StatePieces, Tensors, gradient, part_of
from methods.options.subspace import Galore
from methods.subspace.exchange import Exchange
from methods.subspace.matrix import Matrix, exact_basis, fast_basis, generator, random_basis
from methods.subspace.projector import Fp32Projector, Int4Projector, Projector, RefreshSchedule


class Bases:
    """One basis per matrix, equal on all ranks."""

    def __init__(
        self, options: Galore, seed: int, matrices: Sequence[Matrix], exchange: Exchange, device: torch.device
    ) -> None:
        self._options = options
        self._seed = seed
        self._device = device
        self._matrices = matrices
        self._exchange = exchange
        self._projectors: list[Projector] = []
        for matrix in matrices:
            projector = _projector(matrix, options.is_lazy, device)
            self._projectors.append(projector)
        sides = [matrix.side for matrix in matrices]
        every = options.refresh_every
        self._refresh_schedule = RefreshSchedule(every, options.is_lazy, sides, device)

    def __getitem__(self, index: int) -> Tensor:
        """The basis of a matrix, in R^{S x R}."""
        projector = self._projectors[index]
        return projector.get()

    def refresh(self, step: int, fragments: Fragments) -> None:
        """Choose the bases that are due after so many steps, from the gradients in the fragments; a collective."""
        due = self._refresh_schedule.due(step)
        if self._options.variant == "apollo":
            for index in due:
                matrix = self._matrices[index]
                basis_SR = self._drawn(step, matrix)
                self._keep(index, basis_SR)
            return
        world_size = self._exchange.world_size
        count = len(due)
        for first in range(0, count, world_size):
            last = first + world_size
            turn = due[first:last]
            self._choose(turn, step, fragments)

    def pieces(self) -> StatePieces:
        """The bases, and the directions that lazy refreshing goes by."""
        names = [matrix.name for matrix in self._matrices]
        pieces: list[Piece] = []
        for name, projector in zip(names, self._projectors, strict=True):
            pieces += projector.pieces(name)
        directions = self._refresh_schedule.pieces(names)
        pieces += directions
        return pieces

    def state(self) -> Tensors:
        """What the schedule of refreshes goes by, equal on every rank."""
        return self._refresh_schedule.state()

    def load_state(self, state: Tensors) -> None:
        """Go on with the schedule of refreshes that `state` gave."""
        self._refresh_schedule.load_state(state)

    def _choose(self, turn: list[int], step: int, fragments: Fragments) -> None:
        """Choose the bases of up to as many matrices as there are ranks; each rank owns one of the matrices."""
        grads = []
        for owner, index in enumerate(turn):
            matrix = self._matrices[index]
            grad_MN = self._reduced(matrix, owner, fragments)
            grads.append(grad_MN)
        bases = []
        for owner, index in enumerate(turn):
            matrix = self._matrices[index]
            basis_SR = self._chosen(step, matrix, grads[owner])
            bases.append(basis_SR)
        for owner, index in enumerate(turn):
            basis_SR = bases[owner]
            self._exchange.broadcast_from(owner, basis_SR)
            self._keep(index, basis_SR)

    def _keep(self, index: int, basis_SR: Tensor) -> None:
        """Note that a matrix has a new basis, and store it."""
        self._refresh_schedule.note(index, basis_SR)
        projector = self._projectors[index]
        projector.set(basis_SR)

    def _reduced(self, matrix: Matrix, owner: int, fragments: Fragments) -> Tensor | None:
        """The whole gradient of a matrix, on its owner alone."""
        rows = matrix.rows
        columns = matrix.columns
        size = rows * columns
        grad = torch.zeros(size, device=self._device)
        fragment = fragments.get(matrix.name)
        if fragment is not None:
            held = part_of(grad, fragment)
            held.copy_(gradient(fragment))
        exchange = self._exchange
        exchange.reduce_to(owner, grad)
        if owner != exchange.rank:
            return None
        return grad.view(rows, columns)

    def _chosen(self, step: int, matrix: Matrix, grad_MN: Tensor | None) -> Tensor:
        """The basis on the owner; elsewhere memory for it."""
        rank = matrix.rank
        if grad_MN is None:
            return torch.empty(matrix.side, rank, device=self._device)
        if self._options.refresh == "fast":
            sketcher = generator(self._seed, step, matrix.name)
            basis_SR = fast_basis(grad_MN, rank, sketcher)
        else:
            basis_SR = exact_basis(grad_MN, rank)
        return basis_SR.contiguous()  # what is broadcast is memory, and LAPACK's is column by column

    def _drawn(self, step: int, matrix: Matrix) -> Tensor:
        """A random basis, which every rank draws for itself."""
        rank = matrix.rank
        drawer = generator(self._seed, step, matrix.name)
        basis_SR = random_basis(matrix.side, rank, drawer)
        return basis_SR.to(self._device)


def _projector(matrix: Matrix, in_4_bits: bool, device: torch.device) -> Projector:
    """Memory of zeros for the basis of a matrix."""
    side = matrix.side
    rank = matrix.rank
    if in_4_bits:
        return Int4Projector(side, rank, device)
    return Fp32Projector(side, rank, device)
