"""GaLore: every weight is trained, and AdamW's moments of a matrix live in a low-rank subspace of its gradient.

W <- W - lr * scale * P N(P^T G),  N = AdamW's normalised step,  P = leading left singular vectors of G every T steps
(mirrored for a tall matrix). Zhao et al. 2024, arXiv 2403.03507, algorithm 2; the moments are kept when P changes, as
there. The other weights have plain AdamW, and so has a matrix whose shorter side is at most the rank. Singular
vectors whose values are rounding errors are left out of P (matrix.py).

Variants: `q-galore` keeps P in 4 bits and refreshes lazily (weights stay fp32 masters), `apollo` scales the full
gradient by channels of a random subspace.

Under ZeRO a rank holds some elements of G. Projecting is linear, so ranks add up their low-rank shares instead of
gradients: all low-rank gradients are one flat vector, of which each rank keeps the moments of an even slice (at ZeRO
0 of all). At a refresh each matrix is collected on one rank, which finds the basis and spreads it; ranks work on
different matrices at a time. At ZeRO 0 no full gradient of a target is reduced between refreshes.

A code of q-galore that lies on the edge of two may fall to either side where layouts sum in another order; so its
curves agree over layouts until that happens (the norm has been seen to differ by 1e-6, and to come back).

The gradient norm, and so clipping, is that of the low-rank gradients and the other weights' gradients (`apollo`: of
the full gradients): ||P^T G|| <= ||G||, and ||G|| is not known between refreshes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from methods.base import Fragment, Method, Piece, Setup, View, gradient
from methods.options.subspace import Galore
from methods.parts.weights import shapes
from methods.subspace.apollo import Scaler
from methods.subspace.bases import Bases
from methods.subspace.exchange import Exchange
from methods.subspace.matrix import Matrix, lay_out, lift, project
from methods.subspace.moments import Adam, Adam8Bit, Moments, correction

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GaloreTuning(Method[Galore]):
    """Full fine-tuning with the optimizer's state in subspaces."""

    def __init__(self, options: Galore, setup: Setup) -> None:
        super().__init__(options, setup)
        self.reduces = options.variant != "apollo"
        self.exchange: Exchange
        self._low = torch.empty(0)
        self._matrices: list[Matrix] = []
        self._step = 0
        self._loaded: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module) -> nn.Module:
        """Make every weight fp32 and trained, and remember the shapes."""
        linears, others = shapes(model, self.setup.gather)
        projected = self.options.projected(linears, others)
        self._matrices = lay_out({f"{name}.weight": shape for name, shape in projected.items()}, self.options.rank)
        return model.float().requires_grad_(True)

    def optimizer(self, view: View, lr: float, **adam: Any) -> torch.optim.Optimizer:
        """AdamW of the other weights; the targets' state is made here too, so that a checkpoint can fill it."""
        names = {matrix.name for matrix in self._matrices}
        self._targets = {fragment.name: fragment for fragment in view.fragments() if fragment.name in names}
        self._others = [fragment.parameter for fragment in view.fragments() if fragment.name not in names]
        self._adam = torch.optim.AdamW([{"params": self._others}], lr=lr, **adam)
        self._allocate(next(view.model.parameters()).device, view.replicated)
        return self._adam

    def gradients(self, view: View) -> list[torch.Tensor]:  # noqa: ARG002
        """This rank's slice of the low-rank gradients, and the other weights' gradients; apollo: all gradients."""
        others = [parameter.grad for parameter in self._others if parameter.grad is not None]
        if not self.reduces:
            return [*(gradient(fragment) for fragment in self._live().values()), *others]
        self._low = self._project()
        for grad in others:
            self.exchange.sum_shares(grad)
        return [self._low, *others]

    def before_step(self, view: View) -> None:  # noqa: ARG002
        """Move the targets; the optimizer's own step then moves the others."""
        low = self._low if self.reduces else self._project()
        self._low = low.new_empty(0)  # not kept through the next forward pass
        self._step += 1
        if not self._matrices:  # the rank is as large as any of them
            return
        step = self._moments.normalise(low, self._step)
        lr, decay = (self._adam.param_groups[0][key] for key in ("lr", "weight_decay"))
        for name, direction in self._directions(low, step):
            weight = self._targets[name].parameter.data
            weight.sub_(direction, alpha=lr * self.options.scale)
            weight.mul_(1 - lr * decay)  # after the step, as the authors do

    def pieces(self) -> Sequence[Piece]:
        """The moments of this rank's slice, and the bases."""
        own = self.exchange.own
        pieces = self._bases.pieces()
        for matrix in self._matrices:
            begin, stop = max(own.start, matrix.offset), min(own.stop, matrix.offset + matrix.padded)
            if begin < stop:
                part = slice(begin - own.start, stop - own.start)
                start, whole = begin - matrix.offset, self.exchange.replicated
                pieces += self._moments.pieces(matrix.name, start, part, whole)
        return pieces

    def state(self) -> dict[str, torch.Tensor]:
        """The number of steps, and what the variants go by."""
        norms = {} if self.reduces else {"norms": self._scaler.norms}
        return {"steps": torch.tensor(self._step), **norms, **self._bases.state()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back the number of steps; the rest waits until there is a place for it."""
        self._step = int(state["steps"])
        self._loaded = state

    def export(self, model: "PreTrainedModel", weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the model as `from_pretrained` loads it."""
        model.save_pretrained(folder, state_dict=weights)

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself: there is nothing to merge."""
        return model

    def _allocate(self, device: torch.device, replicated: bool) -> None:
        """Make the state of this rank's slice."""
        length = sum(matrix.padded for matrix in self._matrices)
        self.exchange = Exchange(length, replicated, partial=replicated and self.reduces)
        size = self.exchange.own.stop - self.exchange.own.start
        kind = Adam8Bit if self.options.optimizer == "adamw8bit" else Adam
        self._moments: Moments = kind(size, self._adam.defaults["betas"], self._adam.defaults["eps"], device)
        self._bases = Bases(self.options, self.setup.seed, self._matrices, self.exchange, device)
        self._scaler = Scaler(self._matrices, self.exchange, device)
        if self._loaded:
            self._bases.load_state(self._loaded)
            self._scaler.norms.copy_(self._loaded.get("norms", self._scaler.norms))

    def _live(self) -> dict[str, Fragment]:
        """The targets' fragments that have a gradient."""
        return {name: f for name, f in self._targets.items() if f.parameter.grad is not None}

    def _project(self) -> torch.Tensor:
        """This rank's slice of the low-rank gradients, in bases that are new where that is due."""
        live = self._live()
        self._bases.refresh(self._step, live)
        flat = torch.zeros(self.exchange.length, device=self._scaler.norms.device)
        for index, matrix in enumerate(self._matrices):
            if fragment := live.get(matrix.name):
                project(matrix, self._bases[index], gradient(fragment), fragment.start, matrix.low(flat))
        return self.exchange.reduce(flat)

    def _directions(self, low: torch.Tensor, step: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What the targets' fragments move against."""
        if not self.reduces:
            corrected = correction(self._adam.defaults["betas"], self._step)
            yield from self._scaler.directions(low, step, self._live(), corrected).items()
            return
        flat = self.exchange.gather(step)
        for index, matrix in enumerate(self._matrices):
            if fragment := self._targets.get(matrix.name):
                direction = lift(matrix, self._bases[index], matrix.low(flat), fragment.start, fragment.stop)
                yield matrix.name, direction
