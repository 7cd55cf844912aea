"""How much better an answer is than the others to the same prompt, in fp64 on the host.

- GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300: (R - mean) / (std + 1e-4), with the unbiased deviation;
  without the division: Dr. GRPO, Liu et al. 2025, https://arxiv.org/abs/2503.20783.
- RLOO, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: R less the mean of the others.

Shapes: P prompts, G answers to each.
"""

import numpy as np
import numpy.typing as npt

RewardArray = npt.NDArray[np.float64]
SMALLEST_SPREAD = 1e-4  # what is added to a standard deviation, as TRL does


def are_equal(rewards_PG: RewardArray) -> npt.NDArray[np.bool_]:
    """Which groups [P] have one reward alone: by comparison, as what rounding leaves of a mean would be scaled up."""
    first_P1 = rewards_PG[:, :1]
    is_first_PG = rewards_PG == first_P1
    equal_P: npt.NDArray[np.bool_] = is_first_PG.all(axis=1)
    return equal_P


def group_advantages(rewards_PG: RewardArray, scale: bool) -> RewardArray:
    """The advantages [P, G] of GRPO; 0 in a group with one reward alone."""
    mean_P1 = rewards_PG.mean(axis=1, keepdims=True)
    advantages_PG = rewards_PG - mean_P1
    if scale:
        spread_P1 = rewards_PG.std(
            axis=1,
            ddof=1,
            keepdims=True,
        )
        divisor_P1 = spread_P1 + SMALLEST_SPREAD
        advantages_PG /= divisor_P1
    return without_equal(advantages_PG, rewards_PG)


def advantages_over_others(rewards_PG: RewardArray) -> RewardArray:
    """The advantages [P, G] of RLOO; 0 in a group with one reward alone."""
    _, answers = rewards_PG.shape
    others = answers - 1
    total_P1 = rewards_PG.sum(axis=1, keepdims=True)
    of_others_PG = total_P1 - rewards_PG
    mean_PG = of_others_PG / others
    advantages_PG = rewards_PG - mean_PG
    return without_equal(advantages_PG, rewards_PG)


def without_equal(advantages_PG: RewardArray, rewards_PG: RewardArray) -> RewardArray:
    """The advantages with exactly 0 where all rewards of a group are equal."""
    equal_P = are_equal(rewards_PG)
    equal_P1 = equal_P[:, None]
    return np.where(equal_P1, 0.0, advantages_PG)
