"""GaLore: every weight is trained, and AdamW's moments of a matrix live in a low-rank subspace of its gradient.

W <- W - lr * scale * P N(P^T G),  N = AdamW's normalised step,  P = leading left singular vectors of G every T steps
(mirrored for a tall matrix). Zhao et al. 2024, arXiv 2403.03507, algorithm 2; the moments are kept when P changes, as
there. The other weights have plain AdamW, and so has a matrix whose shorter side is at most the rank. Singular
vectors whose values are rounding errors are left out of P (matrix.py).

Variants: `q-galore` keeps P in 4 bits and refreshes lazily (weights stay fp32 masters), `apollo` scales the full
gradient by channels of a random subspace.

Under ZeRO a rank holds some elements of G. Projecting is linear, so ranks add up their low-rank shares instead of
gradients: all low-rank gradients are one flat vector, of which each rank keeps the moments of an even slice (at ZeRO
0 of all). At a refresh each gradient is reduced to one rank, which finds the basis and broadcasts it; ranks work on
different matrices at a time. At ZeRO 0 no full gradient of a target is reduced between refreshes.

A code of q-galore that lies on the edge of two may fall to either side where layouts sum in another order; so its
curves agree over layouts until that happens (the norm has been seen to differ by 1e-6, and to come back).

The gradient norm, and so clipping, is that of the low-rank gradients and the other weights' gradients (`apollo`: of
the full gradients): ||P^T G|| <= ||G||, and ||G|| is not known between refreshes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from methods.base import Fragment, Fragments, Method, Setup, StatePieces, Tensors, View, gradient
from methods.options.subspace import Galore
from methods.parts.targets import Matrices
from methods.parts.weights import shapes
from methods.subspace.apollo import Scaler
from methods.subspace.bases import Bases
from methods.subspace.exchange import Exchange
from methods.subspace.matrix import Matrix, lay_out, lift, overlap, project
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
        self._loaded: Tensors = {}

    def attach(self, model: Module) -> Module:
        """Make every weight fp32 and trained, and remember the shapes."""
        options = self.options
        gather = self.setup.gather
        linears, others = shapes(model, gather)
        projected = options.projected(linears, others)
        weights: Matrices = {}
        for name, shape in projected.items():
            weights[f"{name}.weight"] = shape
        self._matrices = lay_out(weights, options.rank)
        model.float()
        return model.requires_grad_(True)

    def optimizer(self, view: View, lr: float, **adam: Any) -> torch.optim.Optimizer:
        """AdamW of the other weights; the targets' state is made here too, so that a checkpoint can fill it."""
        names = {matrix.name for matrix in self._matrices}
        self._targets: dict[str, Fragment] = {}
        self._others: list[Parameter] = []
        for fragment in view.fragments():
            name = fragment.name
            if name in names:
                self._targets[name] = fragment
            else:
                self._others.append(fragment.parameter)
        group = {"params": self._others}
        self._adam = torch.optim.AdamW([group], lr=lr, **adam)
        parameter = next(view.model.parameters())
        self._allocate(parameter.device, view.replicated)
        return self._adam

    def gradients(self, view: View) -> list[Tensor]:  # noqa: ARG002
        """This rank's slice of the low-rank gradients, and the other weights' gradients; apollo: all gradients."""
        others = []
        for parameter in self._others:
            grad = parameter.grad
            if grad is not None:
                others.append(grad)
        if not self.reduces:
            live = self._live()
            targets = map(gradient, live.values())
            return [*targets, *others]
        self._low = self._project()
        for grad in others:
            self.exchange.all_reduce_partial(grad)
        return [self._low, *others]

    def before_step(self, view: View) -> None:  # noqa: ARG002
        """Move the targets; the optimizer's own step then moves the others."""
        low = self._low
        if not self.reduces:
            low = self._project()
        self._low = low.new_empty(0)  # not kept through the next forward pass
        self._step += 1
        if not self._matrices:  # the rank is as large as any of them
            return
        step = self._moments.normalise(low, self._step)
        group = self._adam.param_groups[0]
        lr = group["lr"]
        scaled_lr = lr * self.options.scale
        decay = lr * group["weight_decay"]
        kept = 1 - decay
        directions = self._directions(low, step)
        for name, direction in directions:
            fragment = self._targets[name]
            weight = fragment.parameter.data
            weight.sub_(direction, alpha=scaled_lr)
            weight.mul_(kept)  # after the step, as the authors do

    def pieces(self) -> StatePieces:
        """The moments of this rank's slice, and the bases."""
        exchange = self.exchange
        owned = exchange.owned
        pieces = [*self._bases.pieces()]
        for matrix in self._matrices:
            offset = matrix.offset
            end = offset + matrix.padded
            common = overlap(owned, offset, end)
            if not common:
                continue
            start = common.start - offset
            begin = common.start - owned.start
            stop = common.stop - owned.start
            part = slice(begin, stop)
            pieces += self._moments.pieces(matrix.name, start, part, exchange.replicated)
        return pieces

    def state(self) -> Tensors:
        """The number of steps, and what the variants go by."""
        steps = torch.tensor(self._step)
        state = {"steps": steps}
        if not self.reduces:
            state["norms"] = self._scaler.norms
        state |= self._bases.state()
        return state

    def load_state(self, state: Tensors) -> None:
        """Take back the number of steps; the rest waits until there is a place for it."""
        steps = state["steps"]
        self._step = int(steps)
        self._loaded = state

    def export(self, model: "PreTrainedModel", weights: Tensors, folder: Path) -> None:
        """Write the model as transformers' `from_pretrained` loads it."""
        model.save_pretrained(folder, state_dict=weights)

    def merge(self, model: Module) -> Module:
        """The model itself: there is nothing to merge."""
        return model

    def _allocate(self, device: torch.device, replicated: bool) -> None:
        """Make moments, bases and norms for this rank's slice, and fill in what was loaded."""
        matrices = self._matrices
        lengths = (matrix.padded for matrix in matrices)
        length = sum(lengths)
        grads_are_partial = replicated and self.reduces
        exchange = Exchange(length, replicated, grads_are_partial)
        self.exchange = exchange
        self._moments = self._new_moments(device)
        seed = self.setup.seed
        self._bases = Bases(self.options, seed, matrices, exchange, device)
        self._scaler = Scaler(matrices, exchange, device)
        loaded = self._loaded
        if loaded:
            self._bases.load_state(loaded)
        if "norms" in loaded:
            norms = loaded["norms"]
            self._scaler.norms.copy_(norms)

    def _new_moments(self, device: torch.device) -> Moments:
        """Moments of zero for this rank's slice, in fp32 or in 8 bits."""
        size = self.exchange.owned_length
        defaults = self._adam.defaults
        betas = defaults["betas"]
        eps = defaults["eps"]
        if self.options.optimizer == "adamw8bit":
            return Adam8Bit(size, betas, eps, device)
        return Adam(size, betas, eps, device)

    def _live(self) -> Fragments:
        """The targets' fragments that have a gradient in this step, by name."""
        live = {}
        for name, fragment in self._targets.items():
            grad = fragment.parameter.grad
            if grad is not None:
                live[name] = fragment
        return live

    def _project(self) -> Tensor:
        """This rank's slice of the low-rank gradients, in bases that are new where that is due."""
        live = self._live()
        self._bases.refresh(self._step, live)
        exchange = self.exchange
        device = self._scaler.norms.device
        flat = torch.zeros(exchange.length, device=device)
        for index, matrix in enumerate(self._matrices):
            fragment = live.get(matrix.name)
            if fragment is None:
                continue
            basis_SR = self._bases[index]
            grad = gradient(fragment)
            low = matrix.low(flat)
            project(matrix, basis_SR, grad, fragment.start, low)
        return exchange.reduce_scatter(flat)

    def _directions(self, low: Tensor, step: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What the targets' fragments move against, by name; `step` is the normalised step for `low`."""
        if not self.reduces:
            betas = self._adam.defaults["betas"]
            corrected = correction(betas, self._step)
            live = self._live()
            directions = self._scaler.directions(low, step, live, corrected)
            yield from directions.items()
            return
        flat = self.exchange.all_gather(step)
        for index, matrix in enumerate(self._matrices):
            name = matrix.name
            fragment = self._targets.get(name)
            if fragment is None:
                continue
            basis_SR = self._bases[index]
            low_step = matrix.low(flat)
            direction = lift(matrix, basis_SR, low_step, fragment.start, fragment.stop)
            yield name, direction
