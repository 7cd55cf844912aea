"""Direct preference optimisation, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, and two of its kin.

With h the growth of the chosen answer's log-likelihood since before the first step, less that of the rejected one's:

- sigmoid: -(1 - e) log s(beta h) - e log s(-beta h), with e the label smoothing (conservative DPO);
- ipo: (h - 1 / (2 beta))^2, Azar et al. 2023, https://arxiv.org/abs/2310.12036, with log-likelihoods per token as
  TRL has them;
- hinge: max(0, 1 - beta h), Zhao et al. 2023, https://arxiv.org/abs/2305.10425.

The loss is their mean over the pairs of the global batch.
"""

import torch
from torch.nn.functional import logsigmoid

from runfolder.objectives import DpoOptions
from trainer.objectives.base import Totals
from trainer.objectives.pairs import AnswerLikelihoods, PairLosses, PairObjective


class DirectPreference(PairObjective):
    """To raise the chosen answer above the rejected one, against the policy before the first step."""

    needs_reference = True

    def compare(self, chosen: AnswerLikelihoods, rejected: AnswerLikelihoods, totals: Totals) -> PairLosses:
        """The losses of DPO over the number of pairs; a reward is beta times the growth of a log-likelihood."""
        options = self.setup.job.objective
        assert isinstance(options, DpoOptions)
        beta = options.beta
        chosen_growth = chosen.growth
        rejected_growth = rejected.growth
        if options.normalised:
            chosen_growth = chosen.growth_per_token
            rejected_growth = rejected.growth_per_token
        margin = chosen_growth - rejected_growth
        losses = pair_losses(options, margin)
        of_step = losses / totals["pairs"]
        chosen_rewards = beta * chosen_growth
        rejected_rewards = beta * rejected_growth
        return PairLosses(of_step, chosen_rewards, rejected_rewards, beta)


def pair_losses(options: DpoOptions, margin: torch.Tensor) -> torch.Tensor:
    """What each margin h costs."""
    beta = options.beta
    if options.loss == "ipo":
        target = 1 / (2 * beta)
        distance = margin - target
        return distance**2
    scaled = beta * margin
    if options.loss == "hinge":
        missing = 1 - scaled
        return missing.clamp(min=0)
    wrong = options.label_smoothing
    right = 1 - wrong
    as_labelled = logsigmoid(scaled)
    the_other_way = logsigmoid(-scaled)
    return -right * as_labelled - wrong * the_other_way
