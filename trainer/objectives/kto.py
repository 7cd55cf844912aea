"""KTO, Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306: answers that were judged one by one.

With D the growth of an answer's log-likelihood since before the first step, and z the mean of the growth of answers
to other prompts (not below zero; without gradient), a desirable answer costs w_d (1 - s(beta (D - z))), an
undesirable one w_u (1 - s(beta (z - D))): the mean over the global batch.

z is the mean over the whole global batch, of the answer that the row before gives to the same prompt. So the loss is
no function of micro-batches, and the reference of those answers too is computed once.

Shapes: A answers that were judged, D documents.
"""

from collections.abc import Sequence

import torch
from torch import nn

from runfolder.objectives import KtoOptions
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import MicroBatch
from trainer.data.tokens import tokenise
from trainer.objectives.base import Arrays, HostArrays, Objective, Shares, TensorsByName, Totals
from trainer.objectives.likelihood import STAND_IN, likelihood_arrays, log_likelihoods

_NEIGHBOURS = "neighbours_"  # what the arrays of the other documents are named with


class ProspectTheory(Objective):
    """To write what was judged desirable; documents 2 i and 2 i + 1 are an answer, and a neighbour's answer."""

    has_prelude = True
    needs_reference = True

    def read(self, source: str) -> Examples:
        """The rows of a source, two documents each."""
        setup = self.setup
        tokens = tokenise(source, setup.tokenizer, setup.reading, setup.folder, setup.progress)
        return Examples.of_each(tokens, 2)

    def totals(self, batch: GlobalBatch) -> Totals:
        """The answers of a global batch, and how many of them are desirable and undesirable."""
        examples = batch.examples
        answers = examples.starts[batch.chosen]
        count = len(answers)
        desirable = int(examples.tokens.desirable[answers].sum())
        return {"answers": count, "desirable": desirable, "undesirable": count - desirable}

    def arrays(self, examples: Examples, micro: MicroBatch) -> HostArrays:
        """The answers of a micro-batch, and apart from them their neighbours'."""
        tokens = examples.tokens
        pad_id = self.setup.tokenizer.pad_token_id
        own_rows = every_second(micro.rows, 0)
        arrays: Arrays = dict(likelihood_arrays(own_rows, tokens, pad_id))
        numbers = arrays["document"]
        arrays["desirable"] = tokens.desirable[numbers].copy()
        neighbours_rows = every_second(micro.rows, 1)
        for name, array in likelihood_arrays(neighbours_rows, tokens, pad_id).items():
            arrays[_NEIGHBOURS + name] = array
        return arrays

    def log_likelihoods(self, model: nn.Module, batch: TensorsByName) -> TensorsByName:
        """Of both kinds of documents, by their numbers; what the reference is made of."""
        neighbours = of_neighbours(batch)
        numbers = [batch["document"], neighbours["document"]]
        policy = [log_likelihoods(model, part, self.kernels) for part in (batch, neighbours)]
        return {"document": torch.cat(numbers), "log_likelihood": torch.cat(policy)}

    def prelude(self, model: nn.Module, batch: TensorsByName, totals: Totals) -> TensorsByName:
        """The share of a micro-batch in the mean growth of the neighbours' answers."""
        neighbours = of_neighbours(batch)
        policy_A = log_likelihoods(model, neighbours, self.kernels)
        growth_A = policy_A - neighbours["reference"]
        return {"growth": growth_A.sum() / totals["answers"]}

    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:
        """The losses of a micro-batch's answers, over the number of answers in the global batch."""
        options = self.setup.job.objective
        assert isinstance(options, KtoOptions)
        policy_A = log_likelihoods(model, batch, self.kernels)
        is_answer_A = batch["document"] != STAND_IN
        is_desirable_A = batch["desirable"] & is_answer_A
        is_undesirable_A = ~batch["desirable"] & is_answer_A
        rewards_A = options.beta * (policy_A - batch["reference"])
        baseline = options.beta * prelude["growth"].clamp(min=0)
        desirable_A = options.desirable * torch.sigmoid(baseline - rewards_A)
        undesirable_A = options.undesirable * torch.sigmoid(rewards_A - baseline)
        losses_A = desirable_A * is_desirable_A + undesirable_A * is_undesirable_A
        kl = prelude["growth"].clamp(min=0) * is_answer_A.sum() / totals["answers"]
        metrics = {
            "kl": kl,
            "reward_desirable": mean_share(rewards_A * is_desirable_A, totals["desirable"]),
            "reward_undesirable": mean_share(rewards_A * is_undesirable_A, totals["undesirable"]),
        }
        return Shares(losses_A.sum() / totals["answers"], metrics)


def every_second(rows: Sequence[Sequence[int]], first: int) -> list[list[int]]:
    """Rows with their even documents alone (first 0) or their odd ones (first 1); none that is then empty."""
    kept = []
    for row in rows:
        of_row = [number for number in row if number % 2 == first]
        if of_row:
            kept.append(of_row)
    return kept


def of_neighbours(batch: TensorsByName) -> TensorsByName:
    """The part of a micro-batch that is of the neighbours' answers, under its plain names."""
    part = {}
    for name, tensor in batch.items():
        if name.startswith(_NEIGHBOURS):
            plain = name.removeprefix(_NEIGHBOURS)
            part[plain] = tensor
    return part


def mean_share(values: torch.Tensor, total: float) -> torch.Tensor:
    """The sum of some values over a total; zero where that is none."""
    if not total:
        return torch.zeros_like(values.sum())
    return values.sum() / total
