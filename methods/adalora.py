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

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear, pad

from methods.base import Fragment, Setup, Tensors, View, part_of
from methods.options.low_rank import AdaLora
from methods.parts.orthogonality import Orthogonality
from methods.parts.peft_adapter import ADAPTER, PeftAdapter
from methods.parts.ranks import largest
from methods.parts.sensitivity import average_sensitivities, forget_sensitivity, sensitivity_scores

RANK_STEP = 8  # tensor cores take multiples of it
RANK_OFFSET = 1e-5  # that PEFT adds to the rank in the update's scale


class AdaLoraTuning(PeftAdapter[AdaLora]):
    """Low-rank updates that share a budget of ranks; M modules of initial rank R."""

    config_is_fixed = False  # it has the ranks that are left

    def __init__(self, options: AdaLora, setup: Setup) -> None:
        super().__init__(options, setup)
        steps = setup.steps
        warmup = round(options.warmup * steps)
        last_step = steps - 1
        self._begin = min(warmup, last_step)
        final = round(options.final * steps)
        longest_final = last_step - self._begin
        final = min(final, longest_final)
        self._end = steps - final
        self._done = 0  # steps
        self._kept_MR = torch.empty(0, 0, dtype=torch.bool)
        self._modules: dict[str, int] = {}  # by name, the row of a module in kept_MR
        self._orthogonality: Orthogonality | None = None  # from the first step on
        self._masks: list[Tensor] | None = None  # what kept_MR says of each E that this rank holds

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Ranks, scale and the schedule of cuts, in steps."""
        options = self.options
        steps = self.setup.steps
        final = steps - self._end
        return peft.AdaLoraConfig(
            init_r=options.initial_rank,
            target_r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets,
            tinit=self._begin,
            tfinal=final,
            deltaT=options.every,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orthogonality,
            total_step=steps,
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
                row = len(self._modules)
                self._modules[name] = row
        is_new_run = self._kept_MR.numel() == 0
        if is_new_run:
            modules = len(self._modules)
            rank = self.options.initial_rank
            self._kept_MR = torch.ones(modules, rank, dtype=torch.bool)
        return adapted

    def speed_up(self, model: Module, undo: ExitStack, sharded: bool = False) -> None:  # noqa: ARG002
        """Write updates as two products, as LoRA has them, which then share passes over memory."""
        for module in model.modules():
            if type(module) is SVDLinear:
                undo.callback(setattr, module, "__class__", SVDLinear)
                module.__class__ = TwoProducts

    def penalty(self, view: View) -> None:
        """Add the gradient of the orthogonality term to those of all A and B."""
        gamma = self.options.orthogonality
        if gamma == 0:
            return
        if self._orthogonality is None:
            names = []
            for module in self._modules:
                names.append(f"{module}.lora_A.{ADAPTER}")
                names.append(f"{module}.lora_B.{ADAPTER}")
            self._orthogonality = Orthogonality(view, names)
        factors = 2 * len(self._modules)
        self._orthogonality.add_gradients(gamma / factors, _device(view))

    def after_step(self, view: View) -> None:
        """Average the sensitivities; choose ranks when it is time, and keep to the last choice afterwards."""
        self._done += 1
        done = self._done
        if done < self._end:
            self._average(view)
        cuts = self._cuts(done)
        if cuts:
            scores_MR = self._scores(view)
            count = self.budget(done)
            kept_MR = largest(scores_MR, count)
            self._kept_MR = kept_MR.cpu()
            self._masks = None
        if cuts or done > self._end:
            self._mask(view)
        if done == self._end:
            for fragment in view.fragments():
                state = view.state(fragment)
                forget_sensitivity(state)

    def budget(self, step: int) -> int:
        """Triplets that are kept over all modules after a step, from 1."""
        modules = len(self._modules)
        first = modules * self.options.initial_rank
        last = modules * self.options.rank
        duration = self._end - self._begin
        passed = step - self._begin
        progress = passed / duration
        left = 1 - progress
        left = max(0.0, left)
        left = min(1.0, left)
        surplus = first - last
        kept_surplus = surplus * left**3
        kept = kept_surplus + last
        return int(kept)

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
        kept_rows = self._kept_MR.tolist()
        for name, row in self._modules.items():
            module = name.removeprefix("base_model.model.")
            factor = f"{module}.lora_E.{ADAPTER}"
            pattern[factor] = kept_rows[row]
        config = model.peft_config[ADAPTER]
        config.rank_pattern = pattern
        super().export(model, weights, folder)

    def _cuts(self, step: int) -> bool:
        """Whether triplets are chosen after a step, from 1."""
        if step == self._end:
            return True
        if step <= self._begin or step > self._end:
            return False
        since_last = step % self.options.every
        return since_last == 0

    def _factors(self, view: View) -> Iterator[tuple[Fragment, int, str]]:
        """What this rank holds of A, B and E: their module's row, and which they are; an objective may train more."""
        for fragment in view.fragments():
            name = fragment.name
            module, factor = _split(name)
            row = self._modules.get(module)
            if row is not None:
                yield fragment, row, factor

    def _average(self, view: View) -> None:
        """Take the sensitivities of this step into their averages."""
        options = self.options
        parameters = []
        states = []
        for fragment, _, _ in self._factors(view):
            parameters.append(fragment.parameter)
            states.append(view.state(fragment))
        average_sensitivities(parameters, states, options.beta1, options.beta2)

    def _scores(self, view: View) -> Tensor:
        """The score of every triplet [M, R], in fp64, the same on every rank."""
        device = _device(view)
        shape = self._kept_MR.shape
        scores_MR = torch.zeros(shape, dtype=torch.float64, device=device)
        for fragment, row, factor in self._factors(view):
            state = view.state(fragment)
            held_scores = sensitivity_scores(state)
            if held_scores is None:  # a run of one step: nothing was averaged before its cut
                continue
            scores = _zeros_around(held_scores, fragment, view)
            scores_MR[row] += _mean_by_rank(scores, factor)
        if not view.replicated:
            dist.all_reduce(scores_MR)
        return scores_MR

    def _mask(self, view: View) -> None:
        """Set E to zero in the triplets that are not kept."""
        held = []
        for fragment, row, factor in self._factors(view):
            if factor == "E":
                held.append((fragment, row))
        if self._masks is None:
            # Kept, as a copy to a GPU waits for all that it has to do.
            device = _device(view)
            kept_MR = self._kept_MR.to(device, torch.float32)
            self._masks = []
            for fragment, row in held:
                mask = part_of(kept_MR[row], fragment)
                self._masks.append(mask)
        if held:
            values = [fragment.parameter.data for fragment, _ in held]
            torch._foreach_mul_(values, self._masks)


class TwoProducts(SVDLinear):  # type: ignore[misc]
    """PEFT's module as W x + s (B diag(E)) (A x), with zeros in the factors up to a rank that is fast to multiply."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's module gives, but for rounding."""
        if self.disable_adapters or self.merged:
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        result: Tensor = self.base_layer(x, *args, **kwargs)
        a_RI = self.lora_A[ADAPTER]
        rank = len(a_RI)
        missing = -rank % RANK_STEP
        scale = self.scaling[ADAPTER] / (rank + RANK_OFFSET)
        value_R1 = self.lora_E[ADAPTER]
        wide_OR = self.lora_B[ADAPTER] * value_R1.T
        dropout = self.lora_dropout[ADAPTER]
        below_a = (0, 0, 0, missing)
        beside_b = (0, missing)
        narrow = linear(dropout(x), pad(a_RI, below_a))
        update = linear(narrow, pad(wide_OR, beside_b))
        adapted: Tensor = result + update * scale
        return adapted


def _split(name: str) -> tuple[str, str]:
    """The module of a trained parameter, and which of A, B and E it is."""
    suffix = f".{ADAPTER}"
    without = name.removesuffix(suffix)
    module, _, factor = without.rpartition(".lora_")
    return module, factor


def _zeros_around(held: Tensor, fragment: Fragment, view: View) -> Tensor:
    """What this rank holds of a parameter, fp64, in the parameter's shape, with zeros for the rest."""
    shape = view.shape(fragment.name)
    elements = shape.numel()
    flat = torch.zeros(elements, dtype=torch.float64, device=_device(view))
    part = part_of(flat, fragment)
    part.copy_(held)
    return flat.view(shape)


def _mean_by_rank(scores: Tensor, factor: str) -> Tensor:
    """The mean score of every row of A and E, or of every column of B: [R]."""
    if factor == "B":
        return scores.mean(0)
    return scores.mean(1)


def _device(view: View) -> torch.device:
    """The device of the model, which has at least one parameter."""
    parameter = next(view.model.parameters())
    return parameter.device
