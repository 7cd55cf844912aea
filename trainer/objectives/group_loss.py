"""The losses of GRPO and RLOO, token by token.

With A the advantage of an answer, r the ratio of a token's probability under the policy to that under the policy
that wrote it, and w how much likelier that policy was by the trainer than by the engine that drew the token (at most
`importance_cap`; without gradient), a token costs

    -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta (e^d - d - 1),

d the log of its probability at the start over that under the policy.

With `ratio: answer`, r is the geometric mean over the answer's tokens (GSPO, Zheng et al. 2025,
https://arxiv.org/abs/2507.18071). In RLOO an answer is one action: r and w are products over its tokens.

Shapes: D answers, N of their tokens.
"""

from dataclasses import dataclass

import torch

from runfolder.group_objectives import GroupOptions, GrpoOptions
from trainer.objectives.base import TensorsByName, Totals
from trainer.objectives.group_tokens import DRAWS, of_reward
from trainer.objectives.likelihood import summed_by_document


@dataclass(frozen=True)
class TokenCosts:
    """What each token costs [N], whether it is clipped [N], and its divergence from the reference [N], if asked."""

    costs: torch.Tensor
    is_clipped: torch.Tensor
    divergence: torch.Tensor | None


def token_costs(
    options: GroupOptions,
    policy_N: torch.Tensor,
    old_N: torch.Tensor,
    batch: TensorsByName,
) -> TokenCosts:
    """What tokens cost, from their log-probabilities under the policy and under the one that wrote them."""
    counts_D = batch["labels"]
    growth_N = policy_N - old_N
    growth_N = of_action(options, growth_N, counts_D)
    ratio_N = growth_N.exp()
    lowest = 1 - options.clip_low
    highest = 1 + options.clip_high
    clipped_N = ratio_N.clamp(lowest, highest)
    advantage_D = batch["advantage"]
    advantage_N = for_labels(advantage_D, counts_D)
    free_N = ratio_N * advantage_N
    bounded_N = clipped_N * advantage_N
    worth_N = torch.minimum(free_N, bounded_N)
    is_clipped_N = worth_N < free_N
    weight_N = importance(options, old_N, batch)
    costs_N = -worth_N * weight_N
    divergence_N = None
    if isinstance(options, GrpoOptions) and "reference" in batch:
        divergence_N = divergence(policy_N, batch["reference"])
        costs_N = costs_N + options.beta * divergence_N
    return TokenCosts(costs_N, is_clipped_N, divergence_N)


def divergence(policy_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """An estimate of the divergence from the reference that is never below 0: e^d - d - 1, d the log-ratio to it.

    Schulman 2020, "Approximating KL Divergence", k3.
    """
    difference_N = reference_N - policy_N
    ratio_N = difference_N.exp()
    return ratio_N - difference_N - 1


def importance(
    options: GroupOptions,
    old_N: torch.Tensor,
    batch: TensorsByName,
) -> torch.Tensor:
    """How much likelier the trainer finds each token [N] than the engine that wrote it, up to the cap."""
    cap = options.importance_cap
    if cap is None:
        return torch.ones_like(old_N)
    engine_N = batch["engine"]
    excess_N = old_N - engine_N
    if not isinstance(options, GrpoOptions):
        counts_D = batch["labels"]
        excess_N = summed_over_answer(excess_N, counts_D)
    times_N = excess_N.exp()
    return times_N.clamp(max=cap)


def of_action(
    options: GroupOptions,
    growth_N: torch.Tensor,
    counts_D: torch.Tensor,
) -> torch.Tensor:
    """By how much the log-probability of the action has grown that each token is, or belongs to [N]."""
    if not isinstance(options, GrpoOptions):
        return summed_over_answer(growth_N, counts_D)
    if options.ratio == "token":
        return growth_N
    summed_N = summed_over_answer(growth_N, counts_D)
    count_N = for_labels(counts_D, counts_D)
    return summed_N / count_N


def label_weights(
    options: GroupOptions,
    batch: TensorsByName,
    totals: Totals,
) -> torch.Tensor:
    """What each token [N] weighs in the mean of the step, fp64."""
    counts_D = batch["labels"]
    answers = totals["answers"]
    average = "answers"
    if isinstance(options, GrpoOptions):
        average = options.average
    equal_D = counts_D.double()
    if average == "tokens":
        equal_D = torch.full_like(equal_D, totals["labels"])
    elif average == "length":
        longest = answers * options.new_tokens
        equal_D = torch.full_like(equal_D, longest)
    else:
        equal_D = equal_D * answers
    weight_D = 1 / equal_D
    return for_labels(weight_D, counts_D)


def group_figures(
    old_N: torch.Tensor,
    found: TokenCosts,
    batch: TensorsByName,
    totals: Totals,
) -> TensorsByName:
    """What is logged: means over the answers of a step, and over their tokens how trainer and engine differ."""
    counts_D = batch["labels"]
    is_real_D = batch["is_real"]
    of_answers = {
        "reward": batch["reward"],
        "groups_without_signal": batch["is_dead"],
        "answers_cut": batch["is_cut"],
        "answer_tokens": counts_D,
    }
    for name in batch:
        if name == DRAWS or name.startswith(of_reward("")):
            of_answers[name] = batch[name]
    engine_N = batch["engine"]
    difference_N = old_N - engine_N
    of_tokens = {
        "tokens_clipped": found.is_clipped,
        "engine_distance": difference_N.abs(),
    }
    if found.divergence is not None:
        of_tokens["divergence"] = found.divergence.detach()
    means = {}
    for name, value_D in of_answers.items():
        real_D = value_D * is_real_D
        total = real_D.sum()
        means[name] = total / totals["answers"]
    is_real_N = for_labels(is_real_D, counts_D)
    for name, value_N in of_tokens.items():
        real_N = value_N * is_real_N
        total = real_N.sum()
        means[name] = total / totals["labels"]
    return means


def for_labels(values_D: torch.Tensor, counts_D: torch.Tensor) -> torch.Tensor:
    """What is known of each document, for each of its labels [N]."""
    return values_D.repeat_interleave(counts_D)


def summed_over_answer(values_N: torch.Tensor, counts_D: torch.Tensor) -> torch.Tensor:
    """The sum over its answer, for each label [N]."""
    sums_D = summed_by_document(values_N, counts_D)
    return for_labels(sums_D, counts_D)
