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
        chosen_change = chosen.change
        rejected_change = rejected.change
        if options.normalised:
            chosen_change = chosen.change_per_token
            rejected_change = rejected.change_per_token
        losses = pair_losses(options, chosen_change - rejected_change)
        beta = options.beta
        return PairLosses(losses / totals["pairs"], beta * chosen_change, beta * rejected_change)


def pair_losses(options: DpoOptions, margin: torch.Tensor) -> torch.Tensor:
    """What each margin h costs."""
    beta = options.beta
    if options.loss == "ipo":
        target = 1 / (2 * beta)
        return (margin - target) ** 2
    scaled = beta * margin
    if options.loss == "hinge":
        return (1 - scaled).clamp(min=0)
    wrong = options.label_smoothing
    right = 1 - wrong
    return -right * logsigmoid(scaled) - wrong * logsigmoid(-scaled)
