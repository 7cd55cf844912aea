"""Full fine-tuning: every weight of the base is trained."""

from pathlib import Path

import torch
from torch import nn

from methods.base import Method
from methods.options import Full


class FullTuning(Method[Full]):
    """W <- W - lr * AdamW(dL/dW) for every weight."""

    def attach(self, model: nn.Module) -> nn.Module:
        """Make every weight fp32 and trained."""
        return model.float().requires_grad_(True)

    def export(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the model as `from_pretrained` loads it."""
        model.save_pretrained(folder, state_dict=weights)

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself: there is nothing to merge."""
        return model
