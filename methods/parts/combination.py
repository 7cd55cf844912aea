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


@dataclass(frozen=True)
class Member:
    """A parent's update of a linear layer, and the parent's weight; who leaves a layer alone has no say there."""

    update: LayerUpdate
    weight: float

    @property
    def scale(self) -> float:
        """What the product of its factors counts in the sum."""
        return self.weight * self.update.scale


LayerMembers = dict[str, list[Member]]  # by the name of the layer


def combine(parents: list[LoraFolder], weights: list[float], recipe: Recipe) -> Combination:
    """The combination of adapters of one base; raises NotCombined."""
    if recipe.how not in HOWS:
        allowed = ", ".join(HOWS)
        raise NotCombined(f"--how: found {recipe.how!r}; allowed: {allowed}")
    members = members_by_layer(parents, weights)
    rank = recipe.rank
    if rank is None:
        rank = largest_rank_of(members)
    updates: dict[str, LayerUpdate] = {}
    interference = Interference()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for module in sorted(members):
            layer = members[module]
            combined = combined_update(module, layer, recipe, rank)
            updates[module] = combined
            interference.add(layer, combined)
    first = parents[0]
    adapter = LoraFolder(first.config, updates)
    distance = interference.distance
    cancelled = interference.cancelled
    return Combination(adapter, distance, cancelled)


def members_by_layer(parents: list[LoraFolder], weights: list[float]) -> LayerMembers:
    """The members of each linear layer that any parent changes; raises NotCombined where bases differ."""
    members: LayerMembers = {}
    bases: set[str] = set()
    for parent, weight in zip(parents, weights, strict=True):
        bases.add(parent.base)
        for module, update in parent.updates.items():
            member = Member(update, weight)
            layer = members.setdefault(module, [])
            layer.append(member)
    if len(bases) > 1:
        found = ", ".join(sorted(bases))
        raise NotCombined(f"found adapters of several bases: {found}; allowed: one")
    return members


def largest_rank_of(members: LayerMembers) -> int:
    """The largest rank that any parent has in any layer."""
    largest = 1
    for layer in members.values():
        for member in layer:
            update = member.update
            rank = update.rank
            largest = max(largest, rank)
    return largest


def combined_update(module: str, layer: list[Member], recipe: Recipe, rank: int) -> LayerUpdate:
    """The combination of the updates of one linear layer."""
    if recipe.how == "linear":
        return linear(module, layer)
    whole = cat(layer)
    if recipe.how == "cat":
        return whole
    if recipe.how == "svd":
        return cut_product(whole, rank)
    prune = merge_utils.dare_linear
    if recipe.how == "ties":
        prune = merge_utils.ties
    deltas_NOI = [member.update.delta() for member in layer]
    weights = [member.weight for member in layer]
    weight_N = torch.tensor(weights)
    density = recipe.density
    delta_OI = prune(deltas_NOI, weight_N, density)
    return cut_dense(delta_OI, rank)


def cat(layer: list[Member]) -> LayerUpdate:
    """The exact weighted sum: factors one below the other, the rank is the sum of ranks."""
    a_parts: list[Tensor] = []
    b_parts: list[Tensor] = []
    for member in layer:
        update = member.update
        scaled_OR = member.scale * update.b_OR
        a_parts.append(update.a_RI)
        b_parts.append(scaled_OR)
    a_RI = torch.cat(a_parts)
    b_OR = torch.cat(b_parts, dim=1)
    return LayerUpdate(a_RI, b_OR)


def linear(module: str, layer: list[Member]) -> LayerUpdate:
    """Sums of the factors, each with the root of its weight; raises NotCombined where ranks differ."""
    first = layer[0].update
    a_RI = torch.zeros_like(first.a_RI)
    b_OR = torch.zeros_like(first.b_OR)
    for member in layer:
        update = member.update
        if update.rank != first.rank:
            ranks = f"{first.rank} and {update.rank}"
            raise NotCombined(f"{module}: found ranks {ranks}; allowed for linear: one rank; cat takes any")
        scale = member.scale
        size = abs(scale)
        root = math.sqrt(size)
        signed = math.copysign(root, scale)
        signed_RI = signed * update.a_RI
        scaled_OR = root * update.b_OR
        a_RI += signed_RI
        b_OR += scaled_OR
    return LayerUpdate(a_RI, b_OR)


def cut_product(update: LayerUpdate, rank: int) -> LayerUpdate:
    """The best approximation of a product, from the small square matrix between two orthogonal ones."""
    a_IR = update.a_RI.T
    q_OR, r_RR = torch.linalg.qr(update.b_OR)
    p_IR, t_RR = torch.linalg.qr(a_IR)
    s_RR = t_RR.T
    middle_RR = r_RR @ s_RR
    u_RR, size_R, v_RR = torch.linalg.svd(middle_RR)
    sized_RR = u_RR * size_R
    kept_RR = sized_RR[:, :rank]
    v_RR = v_RR[:rank]
    p_RI = p_IR.T
    b_OR = q_OR @ kept_RR
    a_RI = v_RR @ p_RI
    return LayerUpdate(a_RI, b_OR)


def cut_dense(delta_OI: Tensor, rank: int) -> LayerUpdate:
    """An approximation of an update, of a lower rank: the best one of small ones, nearly that of large ones."""
    smallest = min(delta_OI.shape)
    drawn = rank + OVERSAMPLED
    many = 4 * drawn
    if many > smallest:
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
        self._remaining = 0.0
        self._size = 0.0

    def add(self, layer: list[Member], combined: LayerUpdate) -> None:
        """Count what happens in one layer."""
        whole = cat(layer)
        sum_OI = whole.delta()
        delta_OI = combined.delta()
        missed_OI = delta_OI - sum_OI
        missed = square(missed_OI)
        whole_square = square(sum_OI)
        remaining = total_size(sum_OI)
        self._missed += missed
        self._whole += whole_square
        self._remaining += remaining
        for member in layer:
            update = member.update
            own_OI = update.delta()
            own_OI *= member.weight
            size = total_size(own_OI)
            self._size += size

    @property
    def distance(self) -> float:
        """How far the result is from the sum, as a share of the sum's norm."""
        if self._whole == 0:
            return 0.0
        share = self._missed / self._whole
        return math.sqrt(share)

    @property
    def cancelled(self) -> float:
        """The share of the parents' updates, by absolute size, that the sum takes away again."""
        if self._size == 0:
            return 0.0
        remaining = self._remaining / self._size
        return 1 - remaining


def square(delta_OI: Tensor) -> float:
    """The sum of the squares of an update's numbers."""
    square_OI = delta_OI.square()
    sum_of_squares = square_OI.sum()
    return float(sum_of_squares)


def total_size(delta_OI: Tensor) -> float:
    """The sum of an update's absolute numbers."""
    size_OI = delta_OI.abs()
    sum_of_sizes = size_OI.sum()
    return float(sum_of_sizes)
