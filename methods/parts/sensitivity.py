"""How much the loss depends on trained weights: AdaLoRA's averages of sensitivities, as state of the optimizer.

The sensitivity of a weight w is |w dL/dw|; I is its average over steps, U that of |sensitivity - I|, and its score is
I U (Zhang et al. 2023, arXiv 2303.10512, section 3.2). The weight is that after the optimizer's step, the gradient
the clipped one, as in PEFT.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from methods.base import Keywords

IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"  # as the optimizer's state names I and U


def average_sensitivity(parameter: Parameter, state: Keywords, beta1: float, beta2: float) -> None:
    """Take the sensitivities of a step into I, which beta1 averages, and U, which beta2 does."""
    weight = parameter.data
    sensitivity = _sensitivity(parameter)
    importance = _average_so_far(state, IMPORTANCE, weight)
    uncertainty = _average_so_far(state, UNCERTAINTY, weight)
    new_share = 1 - beta1
    importance.mul_(beta1)
    importance.add_(sensitivity, alpha=new_share)
    difference = sensitivity - importance
    deviation = difference.abs()
    new_share = 1 - beta2
    uncertainty.mul_(beta2)
    uncertainty.add_(deviation, alpha=new_share)


def sensitivity_scores(state: Keywords) -> Tensor | None:
    """The score I U of every weight that this state is of, in fp64; None where nothing was averaged yet."""
    if IMPORTANCE not in state:
        return None
    importance: Tensor = state[IMPORTANCE]
    uncertainty: Tensor = state[UNCERTAINTY]
    return importance.double() * uncertainty.double()


def forget_sensitivity(state: Keywords) -> None:
    """Free the averages in a state, which may hold none."""
    state.pop(IMPORTANCE, None)
    state.pop(UNCERTAINTY, None)


def _average_so_far(state: Keywords, name: str, weight: Tensor) -> Tensor:
    """The average of this name in the state of a weight; zeros before the first step."""
    if name not in state:
        state[name] = torch.zeros_like(weight)
    so_far: Tensor = state[name]
    return so_far


def _sensitivity(parameter: Parameter) -> Tensor:
    """|w dL/dw| of every weight w; zero where there is no gradient."""
    weight = parameter.data
    grad = parameter.grad
    if grad is None:
        return torch.zeros_like(weight)
    product = weight * grad
    return product.abs()
