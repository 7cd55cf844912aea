"""What objectives on pairs of answers share: the pairs of a micro-batch, and the figures that are logged.

Shapes: D documents, P pairs.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import MicroBatch
from trainer.objectives.answers import AnswerObjective
from trainer.objectives.base import HostArrays, Shares, TensorsByName, Totals

TIE = 1e-3  # log-likelihoods that differ by less are equal: a policy that has not moved yet differs by rounding


@dataclass(frozen=True)
class AnswerLikelihoods:
    """One side of some pairs [P], fp64: its log-likelihoods, what the reference gave them, its numbers of labels."""

    policy: torch.Tensor
    reference: torch.Tensor
    labels: torch.Tensor

    @property
    def growth(self) -> torch.Tensor:
        """By how much the log-likelihoods have grown since before the first step."""
        return self.policy - self.reference

    @property
    def per_token(self) -> torch.Tensor:
        """The log-likelihoods per label."""
        return self.policy / self.labels

    @property
    def growth_per_token(self) -> torch.Tensor:
        """The growth of the log-likelihoods per label."""
        return self.growth / self.labels


@dataclass(frozen=True)
class PairLosses:
    """Of some pairs [P]: what each adds to the loss, and the rewards of both of its answers.

    `scale` is what log-likelihoods are multiplied with to be rewards.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    scale: float = 1.0


class OnPairs(AnswerObjective):
    """What is learned from pairs, whose documents are the chosen answer and then the rejected one."""

    def totals(self, batch: GlobalBatch) -> Totals:
        """The pairs of a global batch, and the labels of their chosen answers."""
        examples = batch.examples
        tokens = examples.tokens
        chosen = examples.starts[batch.chosen]
        labels = tokens.targets[chosen]
        count = len(chosen)
        chosen_labels = int(labels.sum())
        return {"pairs": count, "chosen_labels": chosen_labels}

    def arrays(self, examples: Examples, micro: MicroBatch) -> HostArrays:
        """The documents of a micro-batch, and where among them each pair has its answers."""
        arrays = self.document_arrays(micro.rows, examples)
        places = np.array(micro.examples, np.int64)
        places_P2 = places.reshape(-1, 2)  # also of no pair
        chosen_P, rejected_P = places_P2.T
        arrays["chosen"] = np.ascontiguousarray(chosen_P)
        arrays["rejected"] = np.ascontiguousarray(rejected_P)
        return arrays


class PairObjective(OnPairs):
    """To prefer the chosen answer of each pair by the log-likelihoods of both."""

    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """The losses of a micro-batch's pairs, over the totals of the global batch; a tie counts one half."""
        policy_D = self.policy(model, batch)
        chosen = side(policy_D, batch, "chosen")
        rejected = side(policy_D, batch, "rejected")
        found = self.compare(chosen, rejected, totals)
        # The document that stands in for none is in no pair, but must reach the weights all the same.
        nothing = 0 * policy_D.sum()
        loss = found.losses.sum() + nothing
        tie = TIE * found.scale
        logged = figures_of_pairs(found, chosen.labels, rejected.labels, tie)
        metrics = mean_shares(logged, totals["pairs"])
        return Shares(loss, metrics, found.losses)

    @abstractmethod
    def compare(self, chosen: AnswerLikelihoods, rejected: AnswerLikelihoods, totals: Totals) -> PairLosses:
        """What each pair adds to the loss of the step, already divided by the totals; and its rewards."""


def figures_of_pairs(
    found: PairLosses, chosen_labels_P: torch.Tensor, rejected_labels_P: torch.Tensor, tie: float
) -> TensorsByName:
    """What is logged of each pair, by name; rewards are equal that differ by no more than a tie."""
    margins_P = found.chosen_rewards - found.rejected_rewards
    return {
        "accuracy": wins(margins_P, tie),
        "reward_margin": margins_P,
        "reward_chosen": found.chosen_rewards,
        "reward_rejected": found.rejected_rewards,
        "labels_chosen": chosen_labels_P,
        "labels_rejected": rejected_labels_P,
    }


def mean_shares(values: TensorsByName, total: float) -> TensorsByName:
    """The sums of some values by name, over the total of the global batch."""
    shares = {}
    for name, value_P in values.items():
        of_pairs = value_P.sum()
        shares[name] = of_pairs / total
    return shares


def wins(margins_P: torch.Tensor, tie: float) -> torch.Tensor:
    """For each margin 1 where it is above zero, 0 where it is below; one half where it is no more than a tie."""
    is_tie_P = margins_P.abs() <= tie
    is_above_P = margins_P > 0
    won_P = is_above_P.double()
    return torch.where(is_tie_P, 0.5, won_P)


def side(policy_D: torch.Tensor, batch: TensorsByName, name: str) -> AnswerLikelihoods:
    """One side of a micro-batch's pairs: of the documents, those whose places the batch has under a name."""
    places_P = batch[name]
    policy_P = policy_D[places_P]
    reference_P = torch.zeros_like(policy_P)
    if "reference" in batch:
        reference_D = batch["reference"]
        reference_P = reference_D[places_P]
    labels_D = batch["labels"]
    labels_P = labels_D[places_P]
    return AnswerLikelihoods(policy_P, reference_P, labels_P.double())
