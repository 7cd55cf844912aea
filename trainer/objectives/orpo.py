"""ORPO, Hong et al. 2024, https://arxiv.org/abs/2403.07691: supervised fine-tuning that shuns the rejected answer.

NLL(c) - lambda log s(w), with w the log-odds of the chosen answer less those of the rejected one. The odds of an
answer are p / (1 - p), with p the geometric mean of its tokens' probabilities. NLL(c) is the mean over the labels of
all chosen answers of the global batch, the other term the mean over its pairs.
"""

from math import log

import torch
from torch.nn.functional import logsigmoid

from runfolder.objectives import OrpoOptions
from trainer.objectives.base import Totals
from trainer.objectives.pairs import AnswerLikelihoods, PairLosses, PairObjective

LIKELIEST = -1e-12  # the log of a probability whose odds are still a number


class OddsRatio(PairObjective):
    """To write the chosen answer, and to make its odds better than those of the rejected one."""

    def compare(self, chosen: AnswerLikelihoods, rejected: AnswerLikelihoods, totals: Totals) -> PairLosses:
        """The losses of ORPO, each part over its own total; a reward is lambda times the log-likelihood per token."""
        options = self.setup.job.objective
        assert isinstance(options, OrpoOptions)
        weight = options.weight
        chosen_s = chosen.per_token
        rejected_s = rejected.per_token
        ratio = log_odds(chosen_s) - log_odds(rejected_s)
        entropy = -chosen.policy
        supervised = entropy / totals["chosen_labels"]
        dislike = -weight * logsigmoid(ratio)
        preferring = dislike / totals["pairs"]
        losses = supervised + preferring
        chosen_rewards = weight * chosen_s
        rejected_rewards = weight * rejected_s
        return PairLosses(losses, chosen_rewards, rejected_rewards, weight)


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p: exact for a p near 0, and for one near 1."""
    half = -log(2)
    is_near_one = log_p > half
    # Each branch is given what it can compute, so that the other one's gradient is no NaN.
    near_one = torch.where(is_near_one, log_p, half)
    near_one = near_one.clamp(max=LIKELIEST)
    near_zero = torch.where(is_near_one, half, log_p)
    rest_of_near_one = -torch.expm1(near_one)
    rest_of_near_zero = -torch.exp(near_zero)
    log_rest = torch.where(
        is_near_one,
        torch.log(rest_of_near_one),
        torch.log1p(rest_of_near_zero),
    )
    return log_p - log_rest
