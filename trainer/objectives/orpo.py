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


class OddsRatio(PairObjective):
    """To write the chosen answer, and to make its odds better than those of the rejected one."""

    def compare(self, chosen: AnswerLikelihoods, rejected: AnswerLikelihoods, totals: Totals) -> PairLosses:
        """The losses of ORPO, each part over its own total; a reward is lambda times the log-likelihood per token."""
        options = self.setup.job.objective
        assert isinstance(options, OrpoOptions)
        weight = options.weight
        ratio = log_odds(chosen.per_token) - log_odds(rejected.per_token)
        supervised = -chosen.policy / totals["chosen_labels"]
        preferring = -weight * logsigmoid(ratio) / totals["pairs"]
        return PairLosses(supervised + preferring, weight * chosen.per_token, weight * rejected.per_token)


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p: exact for a p near 0, and for one near 1."""
    near_one = log_p > -log(2)
    # Each branch is given what it can compute, so that the other one's gradient is no NaN.
    close = torch.where(near_one, log_p, -1.0).clamp(max=-1e-12)
    far = torch.where(near_one, -1.0, log_p)
    log_rest = torch.where(near_one, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
    return log_p - log_rest
