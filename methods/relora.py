"""ReLoRA: W <- W + s B A and a new start of A and B, again and again (Lialin et al. 2023, arXiv 2307.05695).

The sum of several updates of rank r has a higher rank. A restart comes after every share of the steps, once the job's
warm-up is over, if steps enough for its own warm-up remain, and in any case after the last step, so that the weights
are whole then:

1. W += s B A in fp32; A is drawn anew (Kaiming-uniform, from the seed, the step and the module's name), B is zero.
2. Optimizer's state of A and B: with `keep` 0 it starts as if they were new, bias correction included. Else the
   entries with the largest first moment, a share `keep` of a factor, keep both moments, and the step count goes on.
   (The authors' code zeroes 99.9 % at random, or prunes each moment by its own magnitude, and keeps the count both
   times. A first moment without its second is a step of lr m / eps, as A has no gradient while B is zero.)
3. Learning rate: a linear warm-up from the next step on, to where the job's one schedule will be at its end: the
   "jagged" cosine. The authors' code restarts after a first step at rate zero; here no step is lost.

As in the authors' code, embeddings, norms, biases and head are trained directly, unless `others` is off; their state
is never reset.

With `full_rank`, W itself is trained for that share of the steps (the paper's warm start, section 3), and the first
factors come with a warm-up of the learning rate, as after a restart. The set of trained weights is fixed in the
engine, so memory for gradients of W stays in use; where that is too much, tune a job of kind `full` first, and take
its output as the base.

With `quantised`, W is in 4 bits (NF4, double quantisation), and a restart quantises W + s B A anew. That loses what
is smaller than the distance of two codes, a tenth of W as a rule, so it says how much it lost. After the last step
nothing is quantised: the output is dequantised W + s B A. A weight within rounding errors of the edge between two
codes may fall to either side in another layout or on another processor; so curves agree over layouts until that
happens, and then to about 1e-5. Whatever rule rounds a number has such edges.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Module

from methods.base import (
    Fragment,
    Fragments,
    Keywords,
    Method,
    Schedule,
    Setup,
    StatePieces,
    Tensors,
    View,
    master,
    part_of,
    replicated_piece,
)
from methods.lora import LowRank
from methods.options.low_rank_merged import ReLora
from methods.parts import quantised
from methods.parts.initial import adapted, factor_names
from methods.parts.peft_adapter import ADAPTER, name_in_base
from methods.parts.restarts import RestartSchedule, keep_largest, new_start
from methods.parts.weights import shapes

NamedTensors = Iterator[tuple[str, Tensor]]


class ReLoraTuning(LowRank[ReLora]):
    """LoRA that is merged and restarted; leaves a whole model."""

    def __init__(self, options: ReLora, setup: Setup) -> None:
        super().__init__(options, setup)
        self.restarts = RestartSchedule(options, setup.steps)
        self._done = 0  # steps
        self._layers: dict[str, LoraLayer] = {}
        self._first: set[str] = set()  # what is trained in the first phase alone

    def load_options(self, config: Any) -> Keywords:
        """Have the base quantised while it is read, if asked to."""
        if self.options.quantised:
            return quantised.load_options("nf4", True, config.dtype)
        return {}

    def attach(self, model: Module) -> Module:
        """Freeze the linear layers and add adapters; the rest is trained if `others` says so."""
        options = self.options
        gather = self.setup.gather
        if options.quantised:
            quantised.require(model, gather)
        linears, others = shapes(model, gather)
        trained = []
        trained_first = []
        if options.others:
            for name in others:
                weight = model.get_parameter(name)
                trained.append(weight)
        if self.restarts.full_rank:
            for name in linears:
                weight = model.get_parameter(f"{name}.weight")
                trained_first.append(weight)
        tuned = super().attach(model)
        for weight in trained + trained_first:
            weight.requires_grad_(True)
        self._first = _names(tuned, trained_first)
        if options.quantised:
            quantised.register_as_buffers(tuned)
        layers = adapted(tuned)
        self._layers = dict(layers)
        return tuned

    def changed_frozen(self, model: Module) -> list[str]:
        """Every weight that is not trained: most change by merges, and the output holds them all."""
        frozen = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                frozen.append(name)
        return frozen

    def pieces(self) -> StatePieces:
        """The weights in 4 bits, which every rank holds."""
        if not self.options.quantised:
            return []
        pieces = []
        for name, layer in self._layers.items():
            base = layer.get_base_layer()
            state = quantised.state(base)
            for kind, value in state.items():
                piece = replicated_piece(f"{name}.{kind}", {kind: value})
                pieces.append(piece)
        return pieces

    def schedule(self, base: Schedule) -> Schedule:
        """The job's schedule with a warm-up after every restart."""
        self.restarts.base = base
        return self.restarts.rate

    def gradients(self, view: View) -> list[Tensor]:
        """The gradients of what this phase trains: AdamW passes over weights without one."""
        if self.restarts.full_rank:
            for fragment in view.fragments():
                if self._waits(fragment.name):
                    state = view.state(fragment)
                    state.clear()
                    fragment.parameter.grad = None
        return super().gradients(view)

    def after_step(self, view: View) -> None:
        """Merge and start anew where it is time."""
        self._done += 1
        done = self._done
        if done <= self.restarts.full_rank:
            return
        is_last = done == self.setup.steps
        merges_at_end = is_last and not self.options.quantised
        if not merges_at_end and not self.restarts.due(done):
            return
        fragments: dict[str, Fragment] = {}
        for fragment in view.fragments():
            fragments[fragment.name] = fragment
        losses = []
        for name in self._layers:
            lost = self._merge(view, name, fragments)
            losses.append(lost)
        if self.options.quantised:
            middle = statistics.median(losses)
            most = max(losses)
            report = f"merged after step {done}: 4 bits lost {middle:.2g} times the update"
            print(f"{report} (median of layers; at most {most:.2g})", flush=True)

    def state(self) -> Tensors:
        """The number of steps done, by which restarts are due."""
        step = torch.tensor(self._done)
        return {"step": step}

    def load_state(self, state: Tensors) -> None:
        """Go on from the number of steps that `state` gave."""
        step = state["step"]
        self._done = int(step)

    def reference(self, model: Module) -> AbstractContextManager[None]:
        """Refused, as what the method learns goes into the base."""
        return Method.reference(self, model)

    def export(self, model: peft.PeftModel, weights: Tensors, folder: Path) -> None:
        """Write the model as transformers' `from_pretrained` loads it, without factors."""
        base = model.get_base_model()
        plain: Tensors = {}
        for name, value in weights.items():
            if ".lora_" not in name:
                plain_name = name_in_base(name)
                plain[plain_name] = value
        if self.options.quantised:
            base = quantised.twin(base)
            dequantised = self._dequantised(model, weights)
            for name, value in dequantised:
                plain_name = name_in_base(name)
                plain[f"{plain_name}.weight"] = value
        base.save_pretrained(folder, state_dict=plain)

    def merge(self, model: Module) -> Module:
        """The model itself: all is in its weights."""
        return model

    def _waits(self, name: str) -> bool:
        """Whether a weight that may be trained is not trained in this phase."""
        if self._done < self.restarts.full_rank:
            return ".lora_" in name
        return name in self._first

    def _merge(self, view: View, name: str, fragments: Fragments) -> float:
        """Put the factors of a layer into its weight, and start them anew; gives what 4 bits lost of the update."""
        layer = self._layers[name]
        names = factor_names(name)
        a, b = names
        a_RI = view.whole(a, master)
        b_OR = view.whole(b, master)
        delta_OI = _update(layer, a_RI, b_OR)
        if layer.fan_in_fan_out:
            delta_OI = delta_OI.T
        base = layer.get_base_layer()
        lost = 0.0
        if self.options.quantised:
            lost = quantised.add(base, delta_OI)
        elif base.weight.requires_grad:
            fragment = fragments.get(f"{name}.base_layer.weight")
            _add_part(fragment, delta_OI)
        else:
            weight = base.weight
            with self.setup.gather.gathered([weight], modified=True):
                weight.data.add_(delta_OI)
        for factor in names:
            held = fragments.get(factor)
            self._reset(view, factor, held)
        return lost

    def _reset(self, view: View, name: str, fragment: Fragment | None) -> None:
        """Give this rank's part of a factor its new start, and what its state may keep."""
        if fragment is not None:
            shape = view.shape(name)
            start = new_start(name, shape, self.setup.seed, self._done)
            flat = start.view(-1)
            part = part_of(flat, fragment)
            values = fragment.parameter.data
            values.copy_(part)
        share = self.options.keep
        if share > 0:
            keep_largest(view, name, fragment, share)
        elif fragment is not None:
            state = view.state(fragment)
            state.clear()

    def _dequantised(self, model: peft.PeftModel, weights: Tensors) -> NamedTensors:
        """What the layers in 4 bits stand for, with the factors' updates, on the host."""
        dtype = model.config.dtype
        for name, base in quantised.four_bit_layers(model):
            weight_OI = quantised.dequantised(base.weight)
            weight_OI = weight_OI.cpu()
            module = name.removesuffix(".base_layer")
            layer = self._layers.get(module)
            if layer is not None:
                a, b = factor_names(module)
                a_RI = weights[a].float()
                b_OR = weights[b].float()
                weight_OI += _update(layer, a_RI, b_OR)
            weight = quantised.oriented(base, weight_OI)
            weight = weight.contiguous()
            yield name, weight.to(dtype)


def _names(model: Module, parameters: Sequence[Tensor]) -> set[str]:
    """The names in a model of these of its parameters, which PEFT may have given others than the base did."""
    identities = set(map(id, parameters))
    names = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in identities:
            names.add(name)
    return names


def _update(layer: LoraLayer, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """s B A of a layer, [out, in]."""
    scale: float = layer.scaling[ADAPTER]
    product_OI = b_OR @ a_RI
    return scale * product_OI


def _add_part(fragment: Fragment | None, delta_OI: Tensor) -> None:
    """Add to a master what this rank holds of an update; nothing where it holds none of it."""
    if fragment is None:
        return
    flat = delta_OI.reshape(-1)
    part = part_of(flat, fragment)
    values = fragment.parameter.data
    values.add_(part)
