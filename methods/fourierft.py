"""FourierFT: W + scale * Re(ifft2(S)), where n entries of the spectrum S in R^{out x in} are trained, zero at first.

Gao et al. 2024, arXiv 2405.03003, equations 2 to 4. The places of the entries come from `location_seed`, so modules
of one shape share them. The paper and PEFT start from normal entries; zero leaves the first step at the base, which
normal ones ruin where it is small, since ifft2 divides by out * in. For the same reason a base thousands wide needs a
learning rate far above LoRA's.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.fourierft.layer import FourierFTLinear
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import linear

from methods.options.other_adapters import FourierFt
from methods.parts.dithered_sum import dithered_sum, noise_like
from methods.parts.peft_adapter import ADAPTER, PeftAdapter

MOST_WAVES = 2048  # entries of a spectrum, with more of which a transform costs less than a product


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

    def attach(self, model: Module) -> Module:
        """Add an update to each target; the places of entries are drawn once for each shape."""
        with places_drawn_once():
            return super().attach(model)

    def speed_up(self, model: Module, undo: ExitStack, sharded: bool = False) -> None:  # noqa: ARG002
        """Transform half of each spectrum, which says all of a real update; its places stay on the device.

        Where the base is in bf16, training has one product with the sum of base and update in the place of two.
        """
        shared: dict[torch.Size, WaveTables] = {}
        for module in model.modules():
            if type(module) is not FourierFTLinear:
                continue
            HalfSpectrum.take_over(module, undo)
            base: Any = module.base_layer
            is_in_bf16 = type(base) is Linear and base.weight.dtype == torch.bfloat16
            if is_in_bf16 and self.options.frequencies <= MOST_WAVES:
                SumOfWaves.add(module, base.weight, shared, undo)


@contextmanager
def places_drawn_once() -> Iterator[None]:
    """Within it, `torch.randperm` draws once for each size and seed.

    PEFT permutes all O * I places for each module anew, though modules of one shape get the same: 40 s for a 1B base.
    """
    real = torch.randperm
    drawn: dict[tuple[int, int], Tensor] = {}

    def draw(size: int, *, generator: torch.Generator) -> Tensor:
        key = (size, generator.initial_seed())
        if key not in drawn:
            drawn[key] = real(size, generator=generator)
        return drawn[key]

    torch.randperm = draw  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randperm = real


class HalfSpectrum(FourierFTLinear):  # type: ignore[misc]
    """PEFT's module, whose update is the inverse transform of half a spectrum, [O, I / 2 + 1].

    The real part of a transform is that of (S + S') / 2, where S' has the entry of (p, q) at (-p, -q): columns up to
    I / 2 say all of it, and in them an entry stands once or twice, as a half. Shapes: O outputs, I inputs.
    """

    places: Tensor  # of the entries and of their mirror images, in the flattened half
    shares: Tensor  # of an entry that stands there: a half, or nothing of one beyond it

    @classmethod
    def take_over(cls, module: FourierFTLinear, undo: ExitStack) -> None:
        """Make a module of PEFT's one of these, and `undo` what makes it PEFT's again."""
        undo.callback(setattr, module, "__class__", FourierFTLinear)
        module.__class__ = cls
        spectrum = module.fourierft_spectrum[ADAPTER]
        indices = module.indices[ADAPTER]
        row, column = indices.to(spectrum.device)
        mirrored_row = -row % module.out_features
        mirrored_column = -column % module.in_features
        rows = torch.cat([row, mirrored_row])
        columns = torch.cat([column, mirrored_column])
        width = module.in_features // 2 + 1
        in_half = columns < width
        places = rows * width + columns
        module.places = places * in_half
        module.shares = in_half / 2
        undo.callback(delattr, module, "places")
        undo.callback(delattr, module, "shares")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's module gives, but for rounding."""
        if self.disable_adapters or self.merged:
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        result: Tensor = self.base_layer(x, *args, **kwargs)
        update_OI = self.update()
        value = x.to(update_OI.dtype)
        added = linear(value, update_OI)
        adapted: Tensor = result + added
        return adapted.to(x.dtype)

    def update(self) -> Tensor:
        """The update [O, I], fp32."""
        width = self.in_features // 2 + 1
        spectrum = self.fourierft_spectrum[ADAPTER].float()
        both = spectrum.repeat(2)
        halves = both * self.shares
        shape = (self.out_features, self.in_features)
        size = self.out_features * width
        half = halves.new_zeros(size)
        half = half.index_add(0, self.places, halves)
        half_OH = half.view(-1, width)
        complex_OH = half_OH.to(torch.complex64)
        transformed_OI = torch.fft.irfft2(complex_OH, s=shape)
        update_OI: Tensor = transformed_OI * self.fourierft_scaling[ADAPTER]
        return update_OI


class WaveTables(NamedTuple):
    """The waves whose products an update is a sum of, in bf16, and the noise by which the sum with a base is rounded.

    The update of one entry c at (p, q) is c * cos(a + b) = c * (cos a cos b - sin a sin b), with a = 2 pi p o / O and
    b = 2 pi q i / I. Shapes: K twice the number of entries, first cosines and then sines, O outputs, I inputs.
    """

    of_outputs_OK: Tensor
    of_inputs_IK: Tensor
    noise_OI: Tensor

    @classmethod
    def at(cls, indices: Tensor, weight_OI: Tensor) -> "WaveTables":
        """Those of entries at indices [2, K / 2], for a weight."""
        row, column = indices.to(weight_OI.device)
        outputs, inputs = weight_OI.shape
        of_outputs_OK = _waves(row, outputs)
        of_inputs_IK = _waves(column, inputs)
        return cls(of_outputs_OK, of_inputs_IK, noise_like(weight_OI))


def _waves(frequency: Tensor, length: int) -> Tensor:
    """The cosines and sines [length, 2 * len(frequency)] of whole numbers of periods in a length, bf16."""
    place = torch.arange(length, device=frequency.device)
    phase = torch.outer(place, frequency) % length
    step = 2 * math.pi / length
    angle = phase * step
    cosines = angle.cos()
    sines = angle.sin()
    waves = torch.cat([cosines, sines], dim=1)
    return waves.bfloat16()


class SumOfWaves(HalfSpectrum):
    """The same over a base in bf16: in training, one product with the sum of base and update."""

    waves: WaveTables

    @classmethod
    def add(cls, module: Any, weight_OI: Tensor, shared: dict[torch.Size, WaveTables], undo: ExitStack) -> None:
        """Make a `HalfSpectrum` one of these, with the waves of others of its shape, which are `shared`."""
        undo.callback(setattr, module, "__class__", HalfSpectrum)
        module.__class__ = cls
        shape = weight_OI.shape
        if shape not in shared:
            shared[shape] = WaveTables.at(module.indices[ADAPTER], weight_OI)
        module.waves = shared[shape]
        undo.callback(delattr, module, "waves")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's module gives, but for rounding; see `dithered_sum`."""
        if not self.training or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        update_OI = self.sum_of_waves()
        weight_OI = dithered_sum(base.weight, update_OI, self.waves.noise_OI)
        return linear(x, weight_OI, base.bias)

    def sum_of_waves(self) -> Tensor:
        """The update [O, I], bf16."""
        waves = self.waves
        numbers = self.out_features * self.in_features
        scale = self.fourierft_scaling[ADAPTER] / numbers
        spectrum = self.fourierft_spectrum[ADAPTER].float()
        scaled = spectrum * scale
        scaled_K = torch.cat([scaled, -scaled])
        fp32_OK = waves.of_outputs_OK.float()
        scaled_OK = fp32_OK * scaled_K
        scaled_OK = scaled_OK.bfloat16()
        return scaled_OK @ waves.of_inputs_IK.T
