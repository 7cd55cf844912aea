"""SimPO, Meng et al. 2024, https://arxiv.org/abs/2405.14734: the log-likelihood per token is the reward.

-log s(beta (s_c - s_r) - gamma), with s the log-likelihoods per token of the chosen and of the rejected answer: the
mean over the pairs of the global batch. There is no reference, and no cross-entropy beside.
"""

from torch.nn.functional import logsigmoid

from runfolder.objectives import SimpoOptions
from trainer.objectives.base import Totals
from trainer.objectives.pairs import AnswerLikelihoods, PairLosses, PairObjective


class SimplePreference(PairObjective):
    """To make each token of the chosen answer likelier than those of the rejected one, by a margin."""

    def compare(self, chosen: AnswerLikelihoods, rejected: AnswerLikelihoods, totals: Totals) -> PairLosses:
        """The losses of SimPO over the number of pairs; a reward is beta times the log-likelihood per token."""
        options = self.setup.job.objective
        assert isinstance(options, SimpoOptions)
        chosen_rewards = options.beta * chosen.per_token
        rejected_rewards = options.beta * rejected.per_token
        margin = chosen_rewards - rejected_rewards
        lead = margin - options.gamma
        losses = -logsigmoid(lead)
        of_step = losses / totals["pairs"]
        return PairLosses(of_step, chosen_rewards, rejected_rewards, options.beta)
