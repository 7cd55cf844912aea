"""Several LoRA adapters as one: weighted sums of their updates, and what they lose by interfering with each other.

The exact sum is `cat`: the factors one below the other. `svd` is the sum's best approximation of a lower rank (Eckart
and Young 1936). `ties` (Yadav et al. 2023, arXiv 2306.01708) and `dare` (Yu et al. 2024, arXiv 2311.03099) prune the
updates first, by PEFT's functions. PEFT's own ones of these names prune the factors A and B each for itself, which is
no pruning of the update that the papers speak of; here it is the product that is pruned. `linear` is what PEFT calls
so: the factors are added, and so every A meets every B; how far that is from the sum is in the report.
Shapes: R rank, I inputs, O outputs, N adapters.
"""

import math
from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor

from methods.parts.lora_folder import LayerUpdate, LoraFolder, NotCombined

HOWS = ("linear", "cat", "svd", "ties", "dare")
OVERSAMPLED = 16  # ranks beside those that are wanted, of a randomised SVD (Halko et al. 2011, arXiv 0909.4061)
ITERATIONS = 6


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined."""

    how: str
    rank: int | None = None  # of the result; None is the largest parent's; `cat` and `linear` have their own
    density: float = 0.5  # the share of numbers that ties and dare keep
    seed: int = 0


@dataclass(frozen=True)
class Combination:
    """The result, and how far it is from the weighted sum that it stands for."""

    adapter: LoraFolder
    distance: float  # ||result - sum|| / ||sum||, Frobenius, over all layers
    cancelled: float  # the share of the parents' updates, by absolute size, that the sum takes away again


def combine(parents: list[LoraFolder], weights: list[float], recipe: Recipe) -> Combination:
    """The combination of adapters of one base; raises NotCombined."""
    if recipe.how not in HOWS:
        allowed = ", ".join(HOWS)
        raise NotCombined(f"--how: found {recipe.how!r}; allowed: {allowed}")
    names: set[str] = set()
    bases: set[str] = set()
    for parent in parents:
        names |= parent.updates.keys()
        bases.add(parent.base)
    if len(bases) > 1:
        found = ", ".join(sorted(bases))
        raise NotCombined(f"found adapters of several bases: {found}; allowed: one")
    rank = recipe.rank or largest_rank_of(parents)
    updates: dict[str, LayerUpdate] = {}
    interference = Interference()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for module in sorted(names):
            members = [parent.updates.get(module) for parent in parents]
            combined = combined_update(module, members, weights, recipe, rank)
            updates[module] = combined
            interference.add(members, weights, combined)
    first = parents[0]
    adapter = LoraFolder(first.config, updates)
    return Combination(adapter, interference.distance, interference.cancelled)


def largest_rank_of(parents: list[LoraFolder]) -> int:
    """The largest rank that any parent has in any layer."""
    largest = 1
    for parent in parents:
        for update in parent.updates.values():
            largest = max(largest, update.rank)
    return largest


Members = list[LayerUpdate | None]


def combined_update(module: str, members: Members, weights: list[float], recipe: Recipe, rank: int) -> LayerUpdate:
    """The combination of the updates of one linear layer."""
    if recipe.how == "linear":
        return linear(module, members, weights)
    whole = cat(members, weights)
    if recipe.how == "cat":
        return whole
    if recipe.how == "svd":
        return cut_product(whole, rank)
    deltas_NOI: list[Tensor] = []
    present: list[float] = []
    for member, weight in zip(members, weights, strict=True):
        if member is not None:  # who leaves a layer alone has no say there
            deltas_NOI.append(member.delta())
            present.append(weight)
    weight_N = torch.tensor(present)
    prune = merge_utils.dare_linear
    if recipe.how == "ties":
        prune = merge_utils.ties
    delta_OI = prune(deltas_NOI, weight_N, recipe.density)
    return cut_dense(delta_OI, rank)


def cat(members: Members, weights: list[float]) -> LayerUpdate:
    """The exact weighted sum: factors one below the other, the rank is the sum of ranks."""
    a_parts: list[Tensor] = []
    b_parts: list[Tensor] = []
    for member, weight in zip(members, weights, strict=True):
        if member is not None:
            scale = weight * member.scale
            a_parts.append(member.a_RI)
            b_parts.append(scale * member.b_OR)
    a_RI = torch.cat(a_parts)
    b_OR = torch.cat(b_parts, dim=1)
    return LayerUpdate(a_RI, b_OR)


def linear(module: str, members: Members, weights: list[float]) -> LayerUpdate:
    """Interference of the factors, each with the root of its weight; raises NotCombined where ranks differ."""
    present = [member for member in members if member is not None]
    ranks = {member.rank for member in present}
    if len(ranks) > 1:
        found = sorted(ranks)
        raise NotCombined(f"{module}: found ranks {found}; allowed for linear: one rank; cat takes any")
    first = present[0]
    a_RI = torch.zeros_like(first.a_RI)
    b_OR = torch.zeros_like(first.b_OR)
    for member, weight in zip(members, weights, strict=True):
        if member is not None:
            scale = weight * member.scale
            size = abs(scale)
            root = math.sqrt(size)
            signed = math.copysign(root, scale)
            a_RI += signed * member.a_RI
            b_OR += root * member.b_OR
    return LayerUpdate(a_RI, b_OR)


def cut_product(factors: LayerUpdate, rank: int) -> LayerUpdate:
    """The best approximation of a product, from the small square matrix between two orthogonal ones."""
    q_OR, r_RR = torch.linalg.qr(factors.b_OR)
    a_IR = factors.a_RI.T
    p_IR, t_RR = torch.linalg.qr(a_IR)
    middle_RR = r_RR @ t_RR.T
    u_RR, size_R, v_RR = torch.linalg.svd(middle_RR)
    sized_RR = u_RR * size_R
    sized_RR = sized_RR[:, :rank]
    v_RR = v_RR[:rank]
    b_OR = q_OR @ sized_RR
    a_RI = v_RR @ p_IR.T
    return LayerUpdate(a_RI, b_OR)


def cut_dense(delta_OI: Tensor, rank: int) -> LayerUpdate:
    """An approximation of an update, of a lower rank: the best one of small ones, nearly that of large ones."""
    smallest = min(delta_OI.shape)
    drawn = rank + OVERSAMPLED
    if drawn * 4 > smallest:
        u_OR, size_R, v_RI = torch.linalg.svd(delta_OI, full_matrices=False)
    else:
        u_OR, size_R, v_IR = torch.svd_lowrank(delta_OI, drawn, ITERATIONS)
        v_RI = v_IR.T
    sized_OR = u_OR * size_R
    a_RI = v_RI[:rank]
    b_OR = sized_OR[:, :rank]
    return LayerUpdate(a_RI, b_OR)


class Interference:
    """What is said of a combination, summed over its layers."""

    def __init__(self) -> None:
        self._missed = 0.0
        self._whole = 0.0
        self._cancelled = 0.0
        self._sizes = 0.0

    def add(self, members: Members, weights: list[float], combined: LayerUpdate) -> None:
        """Count what happens in one layer."""
        whole = cat(members, weights)
        sum_OI = whole.delta()
        delta_OI = combined.delta()
        missed_OI = delta_OI - sum_OI
        self._missed += square(missed_OI)
        self._whole += square(sum_OI)
        remaining = total_size(sum_OI)
        size = 0.0
        for member, weight in zip(members, weights, strict=True):
            if member is not None:
                delta_OI = member.delta()
                size += abs(weight) * total_size(delta_OI)
        self._sizes += size
        self._cancelled += size - remaining

    @property
    def distance(self) -> float:
        """How far the result is from the sum, as a share of the sum's norm."""
        share = ratio(self._missed, self._whole)
        return math.sqrt(share)

    @property
    def cancelled(self) -> float:
        """The share of the parents' updates, by absolute size, that the sum takes away again."""
        return ratio(self._cancelled, self._sizes)


def square(delta_OI: Tensor) -> float:
    """The sum of the squares of an update's numbers."""
    square_OI = delta_OI.square()
    return float(square_OI.sum())


def total_size(delta_OI: Tensor) -> float:
    """The sum of an update's absolute numbers."""
    size_OI = delta_OI.abs()
    return float(size_OI.sum())


def ratio(part: float, whole: float) -> float:
    """A part of a whole; of nothing, nothing."""
    if whole == 0:
        return 0.0
    return part / whole
