"""FourierFT by half of each spectrum, as on the fast path, is PEFT's."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from llamas import loss_and_gradients, random_llama
from peft.tuners.fourierft.layer import FourierFTLinear
from torch import nn

from methods.base import Setup
from methods.fourierft import FourierFtTuning
from methods.options.other_adapters import FourierFt
from methods.parts.peft_adapter import ADAPTER

IDS = torch.arange(24).reshape(2, 12)


def attached(entries: int, **base: Any) -> tuple[FourierFtTuning, nn.Module]:
    """The method, and a small model with spectra away from zero."""
    torch.manual_seed(0)
    method = FourierFtTuning(FourierFt(frequencies=entries), Setup())
    model = method.attach(random_llama(**base)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return method, model


@pytest.mark.parametrize("columns", [51, 64])
def test_updates_are_the_transforms_of_whole_spectra(columns: int) -> None:
    """Of many entries: some are their own mirror images, others each other's."""
    method, model = attached(512, intermediate_size=columns)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, FourierFTLinear):
            update = module.get_delta_weight(ADAPTER)
            slope = torch.randn(update.shape, dtype=torch.float64)
            spectrum = module.fourierft_spectrum[ADAPTER]
            (update * slope).sum().backward()
            expected[name] = (update.detach(), slope, spectrum.grad)
            spectrum.grad = None
    method.speed_up(model, ExitStack())
    for name, (update, slope, gradient) in expected.items():
        module = model.get_submodule(name)
        found = module.update()
        (found * slope).sum().backward()
        torch.testing.assert_close(found, update, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.fourierft_spectrum[ADAPTER].grad, gradient, rtol=1e-4, atol=1e-4)


def test_a_pass_is_peft_s() -> None:
    method, model = attached(100)
    expected = loss_and_gradients(model, IDS)
    with ExitStack() as undo:
        method.speed_up(model, undo)
        found = loss_and_gradients(model, IDS)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-3 * value.norm()
    back = loss_and_gradients(model, IDS)
    for name, value in expected.items():
        assert torch.equal(back[name], value), "undone, it is PEFT's again"
