"""The bases of all matrices: chosen when they are due, each on one rank, and kept on every rank."""

from collections.abc import Mapping, Sequence

import torch

from methods.base import Fragment, Piece, gradient
from methods.options.subspace import Galore
from methods.subspace.exchange import Exchange
from methods.subspace.matrix import Matrix, exact_basis, fast_basis, generator, random_basis
from methods.subspace.projector import Calendar, Fp32Projector, Int4Projector, Projector


class Bases:
    """One basis per matrix, equal on all ranks."""

    def __init__(
        self, options: Galore, seed: int, matrices: Sequence[Matrix], exchange: Exchange, device: torch.device
    ) -> None:
        self._options, self._seed, self._device = options, seed, device
        self._matrices, self._exchange = matrices, exchange
        lazy = options.variant == "q-galore"
        kind = Int4Projector if lazy else Fp32Projector
        self._projectors: list[Projector] = [kind(m.side, m.rank, device) for m in matrices]
        self._calendar = Calendar(options.refresh_every, lazy, [m.side for m in matrices], device)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The basis of a matrix, in R^{S x R}."""
        return self._projectors[index].get()

    def refresh(self, step: int, fragments: Mapping[str, Fragment]) -> None:
        """Choose the bases that are due after so many steps, from the gradients in the fragments; a collective."""
        due = self._calendar.due(step)
        if self._options.variant == "apollo":
            for index in due:
                self._keep(index, self._drawn(step, self._matrices[index]))
            return
        world = self._exchange.world
        for first in range(0, len(due), world):
            turn = list(enumerate(due[first : first + world]))  # each rank owns one matrix at a time
            grads = [self._collect(self._matrices[i], owner, fragments) for owner, i in turn]
            bases = [self._chosen(step, self._matrices[i], grads[owner]) for owner, i in turn]
            for owner, i in turn:
                self._exchange.spread(bases[owner], owner)
                self._keep(i, bases[owner])

    def pieces(self) -> list[Piece]:
        """The bases, and the directions that lazy refreshing goes by."""
        bases = [p for m, kept in zip(self._matrices, self._projectors, strict=True) for p in kept.pieces(m.name)]
        return bases + self._calendar.pieces([matrix.name for matrix in self._matrices])

    def state(self) -> dict[str, torch.Tensor]:
        """When bases are due, if that changes."""
        return self._calendar.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take that back."""
        self._calendar.load_state(state)

    def _keep(self, index: int, basis_SR: torch.Tensor) -> None:
        self._calendar.note(index, basis_SR)
        self._projectors[index].set(basis_SR)

    def _collect(self, matrix: Matrix, owner: int, fragments: Mapping[str, Fragment]) -> torch.Tensor | None:
        """The whole gradient of a matrix, on its owner alone."""
        grad = torch.zeros(matrix.rows * matrix.columns, device=self._device)
        fragment = fragments.get(matrix.name)
        if fragment is not None:
            grad[fragment.start : fragment.stop] = gradient(fragment)
        self._exchange.collect(grad, owner)
        return grad.view(matrix.rows, matrix.columns) if owner == self._exchange.rank else None

    def _chosen(self, step: int, matrix: Matrix, grad_MN: torch.Tensor | None) -> torch.Tensor:
        """The basis on the owner; elsewhere a place for it."""
        if grad_MN is None:
            return torch.empty(matrix.side, matrix.rank, device=self._device)
        if self._options.refresh == "fast":
            chosen = fast_basis(grad_MN, matrix.rank, generator(self._seed, step, matrix.name))
        else:
            chosen = exact_basis(grad_MN, matrix.rank)
        return chosen.contiguous()  # what is broadcast is memory, and LAPACK's is column by column

    def _drawn(self, step: int, matrix: Matrix) -> torch.Tensor:
        """A random basis, which every rank draws for itself."""
        drawn = random_basis(matrix.side, matrix.rank, generator(self._seed, step, matrix.name))
        return drawn.to(self._device)
