"""KTO, Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306: answers that were judged one by one.

With D the growth of an answer's log-likelihood since before the first step, and z the mean of the growth of answers
to other prompts (not below zero; without gradient), a desirable answer costs w_d (1 - s(beta (D - z))), an
undesirable one w_u (1 - s(beta (z - D))): the mean over the global batch.

z is the mean over the whole global batch, of the answer that the nearest row before gives to another prompt. So the
loss is no function of micro-batches, and the reference of those answers too is computed once.

Shapes: A answers that were judged, D documents.
"""

from collections.abc import Sequence

import torch
from torch import nn

from runfolder.objectives import KtoOptions
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import MicroBatch
from trainer.objectives.answers import AnswerObjective, NumbersOfRows
from trainer.objectives.base import HostArrays, Shares, TensorsByName, Totals
from trainer.objectives.likelihood import STAND_IN

_NEIGHBOURS = "neighbours_"  # what the arrays of the other documents are named with


class ProspectTheory(AnswerObjective):
    """To write what was judged desirable; an example is an answer, and behind it a neighbour's answer."""

    has_prelude = True
    needs_reference = True

    def totals(self, batch: GlobalBatch) -> Totals:
        """The answers of a global batch, and how many of them are desirable and undesirable."""
        examples = batch.examples
        tokens = examples.tokens
        answers = examples.starts[batch.chosen]
        count = len(answers)
        is_desirable = tokens.desirable[answers]
        desirable = int(is_desirable.sum())
        undesirable = count - desirable
        return {"answers": count, "desirable": desirable, "undesirable": undesirable}

    def arrays(self, examples: Examples, micro: MicroBatch) -> HostArrays:
        """The answers of a micro-batch, and apart from them their neighbours'."""
        own_rows = every_second(micro.rows, 0)
        arrays = self.document_arrays(own_rows, examples)
        tokens = examples.tokens
        numbers_A = arrays["document"]
        desirable_A = tokens.desirable[numbers_A]
        is_answer_A = numbers_A != STAND_IN
        arrays["desirable"] = desirable_A & is_answer_A
        arrays["undesirable"] = ~desirable_A & is_answer_A
        neighbours_rows = every_second(micro.rows, 1)
        of_neighbours = self.document_arrays(neighbours_rows, examples)
        for name, array in of_neighbours.items():
            arrays[_NEIGHBOURS + name] = array
        return arrays

    def log_likelihoods(self, model: nn.Module, batch: TensorsByName) -> TensorsByName:
        """Of both kinds of documents, by their numbers."""
        own = super().log_likelihoods(model, batch)
        neighbours = neighbours_in(batch)
        others = super().log_likelihoods(model, neighbours)
        together = {}
        for name, values_D in own.items():
            both = (values_D, others[name])
            together[name] = torch.cat(both)
        return together

    def prelude(self, model: nn.Module, batch: TensorsByName, totals: Totals) -> TensorsByName:
        """The share of a micro-batch in the mean growth of the neighbours' answers."""
        neighbours = neighbours_in(batch)
        policy_A = self.policy(model, neighbours)
        growth_A = policy_A - neighbours["reference"]
        total = growth_A.sum()
        return {"growth": total / totals["answers"]}

    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:
        """The losses of a micro-batch's answers, over the number of answers in the global batch."""
        options = self.setup.job.objective
        assert isinstance(options, KtoOptions)
        policy_A = self.policy(model, batch)
        growth_A = policy_A - batch["reference"]
        rewards_A = options.beta * growth_A
        kl = prelude["growth"].clamp(min=0)
        baseline = options.beta * kl
        above_A = rewards_A - baseline
        is_desirable_A = batch["desirable"].double()
        is_undesirable_A = batch["undesirable"].double()
        desirable_A = options.desirable * torch.sigmoid(-above_A)
        undesirable_A = options.undesirable * torch.sigmoid(above_A)
        losses_A = desirable_A * is_desirable_A + undesirable_A * is_undesirable_A
        loss = losses_A.sum() / totals["answers"]
        is_answer_A = is_desirable_A + is_undesirable_A
        liked_A = rewards_A * is_desirable_A
        disliked_A = rewards_A * is_undesirable_A
        metrics = {
            "kl": mean_share(kl * is_answer_A, totals["answers"]),
            "reward_desirable": mean_share(liked_A, totals["desirable"]),
            "reward_undesirable": mean_share(disliked_A, totals["undesirable"]),
        }
        return Shares(loss, metrics)


def every_second(rows: NumbersOfRows, first: int) -> list[Sequence[int]]:
    """Rows with their even documents alone (first 0) or their odd ones (first 1); none that is then empty."""
    kept: list[Sequence[int]] = []
    for row in rows:
        of_row = []
        for number in row:
            if number % 2 == first:
                of_row.append(number)
        if of_row:
            kept.append(of_row)
    return kept


def neighbours_in(batch: TensorsByName) -> TensorsByName:
    """The part of a micro-batch that is of the neighbours' answers, under its plain names."""
    part = {}
    for name, tensor in batch.items():
        if name.startswith(_NEIGHBOURS):
            plain = name.removeprefix(_NEIGHBOURS)
            part[plain] = tensor
    return part


def mean_share(values: torch.Tensor, total: float) -> torch.Tensor:
    """The sum of some values over a total; zero where that is none."""
    summed = values.sum()
    if not total:
        return torch.zeros_like(summed)
    return summed / total
