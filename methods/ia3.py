"""(IA)^3: keys and values l * (W x), feed-forward W (l * x), with l in R^{out} and R^{in}, one at the start.

Liu et al. 2022, arXiv 2205.05638, section 3.3 (there with a learning rate of 3e-3). A decay of weights would pull l
to zero and take the base away with it, so there is none.
"""

from typing import Any

import peft
import torch

from methods.base import View
from methods.options.other_adapters import Ia3
from methods.parts.peft_adapter import PeftAdapter


class Ia3Tuning(PeftAdapter[Ia3]):
    """Learned scales of keys, values and feed-forward inputs."""

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """The modules that are scaled, and those of them whose input is."""
        options = self.options
        scaled_by_input = options.fed(targets)
        return peft.IA3Config(target_modules=targets, feedforward_modules=scaled_by_input, task_type="CAUSAL_LM")

    def optimizer(self, view: View, lr: float, **adam: Any) -> torch.optim.Optimizer:
        """AdamW without decay of weights, which would pull l to zero."""
        without_decay = adam | {"weight_decay": 0.0}
        return super().optimizer(view, lr, **without_decay)
