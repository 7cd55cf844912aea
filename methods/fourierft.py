"""FourierFT: W + scale * Re(ifft2(S)), where n entries of the spectrum S in R^{out x in} are trained, zero at first.

Gao et al. 2024, arXiv 2405.03003, equations 2 to 4. The places of the entries come from `location_seed`, so modules
of one shape share them. The paper and PEFT start from normal entries; zero leaves the first step at the base, which
normal ones ruin where it is small, since ifft2 divides by out * in. For the same reason a base thousands wide needs a
learning rate far above LoRA's.
"""

from contextlib import ExitStack
from typing import Any

import peft
import torch
from peft.tuners.fourierft.layer import FourierFTLinear
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear

from methods.options.other_adapters import FourierFt
from methods.parts.peft_adapter import ADAPTER, PeftAdapter


class FourierFtTuning(PeftAdapter[FourierFt]):
    """Updates whose spectrum is sparse and trained."""

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """How many entries each spectrum has, their scale, and the seed of their places."""
        return peft.FourierFTConfig(
            n_frequency=self.options.frequencies,
            scaling=self.options.scale,
            init_weights=True,  # zero
            random_loc_seed=self.options.location_seed,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )

    def speed_up(self, model: Module, undo: ExitStack) -> None:
        """Transform half of each spectrum, which says all of a real update; its places stay on the device."""
        for module in model.modules():
            if type(module) is FourierFTLinear:
                HalfSpectrum.take_over(module, undo)


class HalfSpectrum(FourierFTLinear):  # type: ignore[misc]
    """PEFT's module, whose update is the inverse transform of half a spectrum, [O, I / 2 + 1].

    The real part of a transform is that of (S + S') / 2, where S' has the entry of (p, q) at (-p, -q): columns up to
    I / 2 say all of it, and in them an entry stands once or twice, as a half. Shapes: O outputs, I inputs.
    """

    places: Tensor  # in the flattened half
    entries: Tensor  # which entry stands there

    @classmethod
    def take_over(cls, module: FourierFTLinear, undo: ExitStack) -> None:
        """Make a module of PEFT's one of these, and `undo` what makes it PEFT's again."""
        undo.callback(setattr, module, "__class__", FourierFTLinear)
        module.__class__ = cls
        spectrum = module.fourierft_spectrum[ADAPTER]
        count = len(spectrum)
        row, column = module.indices[ADAPTER].to(spectrum.device)
        mirrored_row = -row % module.out_features
        mirrored_column = -column % module.in_features
        rows = torch.cat([row, mirrored_row])
        columns = torch.cat([column, mirrored_column])
        width = module.in_features // 2 + 1
        in_half = columns < width
        numbers = torch.arange(2 * count, device=spectrum.device)
        places = rows * width + columns
        entries = numbers % count
        module.places = places[in_half]
        module.entries = entries[in_half]
        undo.callback(delattr, module, "places")
        undo.callback(delattr, module, "entries")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's module gives, but for rounding."""
        if self.disable_adapters or self.merged:
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        result: Tensor = self.base_layer(x, *args, **kwargs)
        update_OI = self.update()
        value = x.to(update_OI.dtype)
        adapted: Tensor = result + linear(value, update_OI)
        return adapted.to(x.dtype)

    def update(self) -> Tensor:
        """The update [O, I], fp32."""
        width = self.in_features // 2 + 1
        spectrum = self.fourierft_spectrum[ADAPTER].float()
        halves = spectrum[self.entries] / 2
        shape = (self.out_features, self.in_features)
        half = halves.new_zeros(self.out_features * width)
        half = half.index_add(0, self.places, halves)
        half_OH = half.view(-1, width)
        complex_OH = half_OH.to(torch.complex64)
        transformed_OI = torch.fft.irfft2(complex_OH, s=shape)
        update_OI: Tensor = transformed_OI * self.fourierft_scaling[ADAPTER]
        return update_OI
