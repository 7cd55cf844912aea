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
from torch import nn

from methods.base import Setup, View
from methods.options.low_rank import AdaLora
from methods.parts.peft_adapter import ADAPTER, PeftAdapter
from methods.parts.ranks import largest

IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"  # as the optimizer's state names them


class AdaLoraTuning(PeftAdapter[AdaLora]):
    """Low-rank updates that share a budget of ranks; M modules of initial rank R."""

    def __init__(self, options: AdaLora, setup: Setup) -> None:
        super().__init__(options, setup)
        self._begin = min(round(options.warmup * setup.steps), setup.steps - 1)
        self._end = setup.steps - min(round(options.final * setup.steps), setup.steps - 1 - self._begin)
        self._done = 0
        self._kept_MR = torch.empty(0, 0, dtype=torch.bool)
        self._modules: dict[str, int] = {}

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

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base and add adapters of the initial rank."""
        adapted = super().attach(model)
        for name, parameter in adapted.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)  # PEFT lets them be trained over a base in bf16
        names = [name for name, module in adapted.named_modules() if isinstance(module, AdaLoraLayer)]
        self._modules = {name: number for number, name in enumerate(names)}
        if not self._kept_MR.numel():
            self._kept_MR = torch.ones(len(names), self.options.initial_rank, dtype=torch.bool)
        return adapted

    def penalty(self, view: View) -> None:
        """Add the gradient of the orthogonality term."""
        if self.options.orthogonality == 0:
            return
        names = [f"{module}.lora_{factor}.{ADAPTER}" for module in self._modules for factor in "AB"]
        factors = _assembled(view, names)
        for fragment in view.fragments():
            if fragment.name in factors and fragment.parameter.grad is not None:
                slope = _slope(factors[fragment.name], _split(fragment.name)[1])
                own = slope.reshape(-1)[fragment.start : fragment.stop]
                fragment.parameter.grad.add_(own, alpha=self.options.orthogonality / len(names))

    def after_step(self, view: View) -> None:
        """Average the sensitivities; choose ranks when it is time, and keep to the last choice afterwards."""
        self._done += 1
        if self._done < self._end:
            self._average(view)
        if self._cuts(self._done):
            self._kept_MR = largest(self._scores(view), self.budget(self._done)).cpu()
        if self._cuts(self._done) or self._done > self._end:
            self._mask(view)
        if self._done == self._end:
            for fragment in view.fragments():
                view.state(fragment).pop(IMPORTANCE, None)
                view.state(fragment).pop(UNCERTAINTY, None)

    def budget(self, step: int) -> int:
        """Triplets that are kept over all modules after a step, from 1."""
        first, last = (len(self._modules) * rank for rank in (self.options.initial_rank, self.options.rank))
        left = 1 - (step - self._begin) / (self._end - self._begin)
        return int((first - last) * min(1.0, max(0.0, left)) ** 3 + last)

    def state(self) -> dict[str, torch.Tensor]:
        """Steps done, and the triplets of the last choice."""
        return {"step": torch.tensor(self._done), "kept": self._kept_MR}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take them back."""
        self._done, self._kept_MR = int(state["step"]), state["kept"]

    def export(self, model: peft.PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the adapter without the triplets that were cut."""
        kept = zip(self._modules, self._kept_MR.tolist(), strict=True)
        pattern = {f"{name.removeprefix('base_model.model.')}.lora_E.{ADAPTER}": row for name, row in kept}
        model.peft_config[ADAPTER].rank_pattern = pattern
        super().export(model, weights, folder)

    def _cuts(self, step: int) -> bool:
        return step == self._end or (self._begin < step < self._end and step % self.options.every == 0)

    def _average(self, view: View) -> None:
        options = self.options
        for fragment in view.fragments():
            state, weight, grad = view.state(fragment), fragment.parameter.data, fragment.parameter.grad
            sensitivity = (weight * grad).abs() if grad is not None else torch.zeros_like(weight)
            mean = state.setdefault(IMPORTANCE, torch.zeros_like(weight))
            spread = state.setdefault(UNCERTAINTY, torch.zeros_like(weight))
            mean.mul_(options.beta1).add_(sensitivity, alpha=1 - options.beta1)
            spread.mul_(options.beta2).add_((sensitivity - mean).abs(), alpha=1 - options.beta2)

    def _scores(self, view: View) -> torch.Tensor:
        """The score of every triplet [M, R], in fp64, the same on every rank."""
        scores_MR = torch.zeros(self._kept_MR.shape, dtype=torch.float64, device=_device(view))
        for fragment in view.fragments():
            state = view.state(fragment)
            if IMPORTANCE not in state:  # a run of one step: nothing was averaged before its cut
                continue
            module, factor = _split(fragment.name)
            shape = view.shape(fragment.name)
            whole = torch.zeros(shape.numel(), dtype=torch.float64, device=scores_MR.device)
            whole[fragment.start : fragment.stop] = state[IMPORTANCE].double() * state[UNCERTAINTY].double()
            scores_MR[self._modules[module]] += whole.view(shape).mean(0 if factor == "B" else 1)
        if not view.replicated:
            dist.all_reduce(scores_MR)
        return scores_MR

    def _mask(self, view: View) -> None:
        for fragment in view.fragments():
            module, factor = _split(fragment.name)
            if factor == "E":
                kept = self._kept_MR[self._modules[module], fragment.start : fragment.stop]
                fragment.parameter.data.mul_(kept.to(fragment.parameter.device))


def _split(name: str) -> tuple[str, str]:
    """The module of a trained parameter, and which of A, B and E it is."""
    module, _, factor = name.removesuffix(f".{ADAPTER}").rpartition(".lora_")
    return module, factor


def _device(view: View) -> torch.device:
    return next(view.model.parameters()).device


def _assembled(view: View, names: list[str]) -> dict[str, torch.Tensor]:
    """The masters of these parameters, whole; one collective, as a model has hundreds of small factors."""
    sizes = [view.shape(name).numel() for name in names]
    flat = torch.zeros(sum(sizes), device=_device(view))
    wholes = dict(zip(names, flat.split(sizes), strict=True))
    for fragment in view.fragments():
        if fragment.name in wholes:
            wholes[fragment.name][fragment.start : fragment.stop] = fragment.parameter.data
    if not view.replicated:
        dist.all_reduce(flat)
    return {name: whole.view(view.shape(name)) for name, whole in wholes.items()}


def _slope(factor: torch.Tensor, kind: str) -> torch.Tensor:
    """The gradient 2 (P P^T - I) P / ||P P^T - I||_F of the norm, for A = P or B = P^T."""
    p_RN = factor.T if kind == "B" else factor
    excess_RR = p_RN @ p_RN.T - torch.eye(len(p_RN), device=factor.device)
    norm = excess_RR.norm().clamp_min(torch.finfo(factor.dtype).tiny)
    slope_RN: torch.Tensor = 2 * excess_RR @ p_RN / norm
    return slope_RN.T if kind == "B" else slope_RN
