"""How much the loss depends on trained weights: AdaLoRA's averages of sensitivities, as state of the optimizer.

The sensitivity of a weight w is |w dL/dw|; I is its average over steps, U that of |sensitivity - I|, and its score is
I U (Zhang et al. 2023, arXiv 2303.10512, section 3.2). The weight is that after the optimizer's step, the gradient
the clipped one, as in PEFT.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from methods.base import Keywords

IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"  # as the optimizer's state names I and U


def average_sensitivities(
    parameters: Sequence[Parameter], states: Sequence[Keywords], beta1: float, beta2: float
) -> None:
    """Take the sensitivities of a step into I, which beta1 averages, and U, which beta2 does; each in its state.

    A model has hundreds of small factors, so each operation is one for all of them.
    """
    if not parameters:
        return
    weights = []
    grads = []
    importances = []
    uncertainties = []
    for parameter, state in zip(parameters, states, strict=True):
        weight = parameter.data
        weights.append(weight)
        grads.append(_gradient(parameter))
        importances.append(_average_so_far(state, IMPORTANCE, weight))
        uncertainties.append(_average_so_far(state, UNCERTAINTY, weight))
    sensitivities = torch._foreach_mul(weights, grads)
    torch._foreach_abs_(sensitivities)
    torch._foreach_mul_(importances, beta1)
    torch._foreach_add_(importances, sensitivities, alpha=1 - beta1)
    deviations = torch._foreach_sub(sensitivities, importances)
    torch._foreach_abs_(deviations)
    torch._foreach_mul_(uncertainties, beta2)
    torch._foreach_add_(uncertainties, deviations, alpha=1 - beta2)


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


def _gradient(parameter: Parameter) -> Tensor:
    """The gradient of a weight; zeros where there is none."""
    grad = parameter.grad
    if grad is None:
        return torch.zeros_like(parameter.data)
    return grad
