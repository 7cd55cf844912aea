"""AdaLoRA: W + (alpha / r) B diag(E) A with ranks cut by importance (Zhang et al. 2023, arXiv 2303.10512, section 3).

A in R^{r x in}, B in R^{out x r}, E in R^r; r is the initial rank. With P = A or B^T, the loss gets the term
gamma / N sum ||P P^T - I||_F over the N factors, as PEFT has it (the paper squares the norm); the reported loss is
without it. The sensitivity of a weight w is |w dL/dw|, I its average over steps (beta1), U the average of
|sensitivity - I| (beta2), and a triplet (row i of A, column i of B, E_i) scores s(E_i) + mean s(A_i) + mean s(B_i)
with s = I U. After `warmup`, E is set to zero every few steps in all but the b best triplets of all modules, where b
falls to the budget by a cubic; a triplet that was cut trains on and may come back, until `final` fixes the choice.

Modules, file format and numbers are PEFT's. Term, scores and cuts are ours, as PEFT's fail at ZeRO 3 and are lost on
resume: the averages are state of the optimizer, so checkpoints hold and reshard them. As in PEFT, sensitivities take
the weight after the optimizer's step and the gradient as it was clipped.
"""

from pathlib import Path

import peft
import torch
import torch.distributed as dist
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor
from torch.nn import Module, Parameter

from methods.base import Setup, Tensors, View, part_of
from methods.options.low_rank import AdaLora
from methods.parts.peft_adapter import ADAPTER, PeftAdapter
from methods.parts.ranks import largest

IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"  # as the optimizer's state names them


class AdaLoraTuning(PeftAdapter[AdaLora]):
    """Low-rank updates that share a budget of ranks; M modules of initial rank R."""

    def __init__(self, options: AdaLora, setup: Setup) -> None:
        super().__init__(options, setup)
        steps = setup.steps
        warmup = round(options.warmup * steps)
        self._begin = min(warmup, steps - 1)
        final = round(options.final * steps)
        longest_final = steps - 1 - self._begin
        self._end = steps - min(final, longest_final)
        self._done = 0  # steps
        self._kept_MR = torch.empty(0, 0, dtype=torch.bool)
        self._modules: dict[str, int] = {}  # by name, the row of a module in kept_MR

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Ranks, scale and the schedule of cuts, in steps."""
        options = self.options
        return peft.AdaLoraConfig(
            init_r=options.initial_rank,
            target_r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets,
            tinit=self._begin,
            tfinal=self.setup.steps - self._end,
            deltaT=options.every,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orthogonality,
            total_step=self.setup.steps,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: Module) -> Module:
        """Freeze the base, and add adapters of the initial rank."""
        adapted = super().attach(model)
        for name, parameter in adapted.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)  # PEFT lets them be trained over a base in bf16
        self._modules = {}
        for name, module in adapted.named_modules():
            if isinstance(module, AdaLoraLayer):
                self._modules[name] = len(self._modules)
        if not self._kept_MR.numel():
            count = len(self._modules)
            self._kept_MR = torch.ones(count, self.options.initial_rank, dtype=torch.bool)
        return adapted

    def penalty(self, view: View) -> None:
        """Add the gradient of the orthogonality term."""
        if self.options.orthogonality == 0:
            return
        names = []
        for module in self._modules:
            names.append(f"{module}.lora_A.{ADAPTER}")
            names.append(f"{module}.lora_B.{ADAPTER}")
        factors = _assembled(view, names)
        weight = self.options.orthogonality / len(names)
        for fragment in view.fragments():
            grad = fragment.parameter.grad
            if fragment.name not in factors or grad is None:
                continue
            _, kind = _split(fragment.name)
            slope = _penalty_gradient(factors[fragment.name], kind)
            held = part_of(slope.reshape(-1), fragment)
            grad.add_(held, alpha=weight)

    def after_step(self, view: View) -> None:
        """Average the sensitivities; choose ranks when it is time, and keep to the last choice afterwards."""
        self._done += 1
        if self._done < self._end:
            self._average(view)
        if self._cuts(self._done):
            scores_MR = self._scores(view)
            count = self.budget(self._done)
            kept_MR = largest(scores_MR, count)
            self._kept_MR = kept_MR.cpu()
        if self._cuts(self._done) or self._done > self._end:
            self._mask(view)
        if self._done == self._end:
            for fragment in view.fragments():
                state = view.state(fragment)
                state.pop(IMPORTANCE, None)
                state.pop(UNCERTAINTY, None)

    def budget(self, step: int) -> int:
        """Triplets that are kept over all modules after a step, from 1."""
        modules = len(self._modules)
        first = modules * self.options.initial_rank
        last = modules * self.options.rank
        duration = self._end - self._begin
        passed = step - self._begin
        left = 1 - passed / duration
        left = max(0.0, left)
        left = min(1.0, left)
        excess = (first - last) * left**3
        return int(excess + last)

    def state(self) -> Tensors:
        """Steps done, and the triplets of the last choice."""
        step = torch.tensor(self._done)
        return {"step": step, "kept": self._kept_MR}

    def load_state(self, state: Tensors) -> None:
        """Take back the steps done and the triplets of the last choice."""
        self._done = int(state["step"])
        self._kept_MR = state["kept"]

    def export(self, model: peft.PeftModel, weights: Tensors, folder: Path) -> None:
        """Write the adapter without the triplets that were cut."""
        pattern = {}
        rows = self._kept_MR.tolist()
        for name, row in zip(self._modules, rows, strict=True):
            module = name.removeprefix("base_model.model.")
            factor = f"{module}.lora_E.{ADAPTER}"
            pattern[factor] = row
        config = model.peft_config[ADAPTER]
        config.rank_pattern = pattern
        super().export(model, weights, folder)

    def _cuts(self, step: int) -> bool:
        """Whether triplets are chosen after a step, from 1."""
        if step == self._end:
            return True
        return self._begin < step < self._end and step % self.options.every == 0

    def _average(self, view: View) -> None:
        """Take the sensitivities of this step into their averages."""
        beta1 = self.options.beta1
        beta2 = self.options.beta2
        for fragment in view.fragments():
            state = view.state(fragment)
            weight = fragment.parameter.data
            sensitivity = _sensitivity(fragment.parameter)
            importance = state.setdefault(IMPORTANCE, torch.zeros_like(weight))
            uncertainty = state.setdefault(UNCERTAINTY, torch.zeros_like(weight))
            importance.mul_(beta1)
            importance.add_(sensitivity, alpha=1 - beta1)
            deviation = (sensitivity - importance).abs()
            uncertainty.mul_(beta2)
            uncertainty.add_(deviation, alpha=1 - beta2)

    def _scores(self, view: View) -> Tensor:
        """The score of every triplet [M, R], in fp64, the same on every rank."""
        device = _device(view)
        scores_MR = torch.zeros(self._kept_MR.shape, dtype=torch.float64, device=device)
        for fragment in view.fragments():
            state = view.state(fragment)
            if IMPORTANCE not in state:  # a run of one step: nothing was averaged before its cut
                continue
            shape = view.shape(fragment.name)
            whole = torch.zeros(shape.numel(), dtype=torch.float64, device=device)
            importance = state[IMPORTANCE].double()
            uncertainty = state[UNCERTAINTY].double()
            held = part_of(whole, fragment)
            held.copy_(importance * uncertainty)
            scores = whole.view(shape)
            module, factor = _split(fragment.name)
            row = self._modules[module]
            scores_MR[row] += _mean_by_rank(scores, factor)
        if not view.replicated:
            dist.all_reduce(scores_MR)
        return scores_MR

    def _mask(self, view: View) -> None:
        """Set E to zero in the triplets that are not kept."""
        for fragment in view.fragments():
            module, factor = _split(fragment.name)
            if factor == "E":
                row = self._modules[module]
                kept = part_of(self._kept_MR[row], fragment)
                values = fragment.parameter.data
                values.mul_(kept.to(values.device))


def _split(name: str) -> tuple[str, str]:
    """The module of a trained parameter, and which of A, B and E it is."""
    suffix = f".{ADAPTER}"
    without = name.removesuffix(suffix)
    module, _, factor = without.rpartition(".lora_")
    return module, factor


def _sensitivity(parameter: Parameter) -> Tensor:
    """|w dL/dw| of every weight w; zero where there is no gradient."""
    weight = parameter.data
    if parameter.grad is None:
        return torch.zeros_like(weight)
    product = weight * parameter.grad
    return product.abs()


def _mean_by_rank(scores: Tensor, factor: str) -> Tensor:
    """The mean score of every row of A and E, or of every column of B: [R]."""
    if factor == "B":
        return scores.mean(0)
    return scores.mean(1)


def _device(view: View) -> torch.device:
    """The device of the model, which has at least one parameter."""
    parameter = next(view.model.parameters())
    return parameter.device


def _assembled(view: View, names: list[str]) -> Tensors:
    """The masters of these parameters, whole; one collective, as a model has hundreds of small factors."""
    shapes = [view.shape(name) for name in names]
    sizes = [shape.numel() for shape in shapes]
    total = sum(sizes)
    device = _device(view)
    flat = torch.zeros(total, device=device)
    parts = flat.split(sizes)
    parts_by_name = dict(zip(names, parts, strict=True))
    for fragment in view.fragments():
        part = parts_by_name.get(fragment.name)
        if part is not None:
            held = part_of(part, fragment)
            held.copy_(fragment.parameter.data)
    if not view.replicated:
        dist.all_reduce(flat)
    wholes: Tensors = {}
    for name, part, shape in zip(names, parts, shapes, strict=True):
        wholes[name] = part.view(shape)
    return wholes


def _penalty_gradient(factor: Tensor, kind: str) -> Tensor:
    """The gradient 2 (P P^T - I) P / ||P P^T - I||_F of the norm, for A = P or B = P^T."""
    if kind == "B":
        slope_RN = _penalty_gradient(factor.T, "A")
        return slope_RN.T
    gram_RR = factor @ factor.T
    identity_RR = torch.eye(len(factor), device=factor.device)
    excess_RR = gram_RR - identity_RR
    tiny = torch.finfo(factor.dtype).tiny
    norm = excess_RR.norm()
    norm = norm.clamp_min(tiny)
    slope: Tensor = 2 * excess_RR @ factor / norm
    return slope
