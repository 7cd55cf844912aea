"""FourierFT by half of each spectrum, as on the fast path, is PEFT's."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from llamas import loss_and_gradients, random_llama
from peft.tuners.fourierft.layer import FourierFTLinear
from torch import nn

from methods.base import Setup
from methods.fourierft import FourierFtTuning, SumOfWaves
from methods.options.other_adapters import FourierFt
from methods.parts.dithered_sum import dithered_sum, noise_like
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


def test_places_are_those_that_peft_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = torch.randperm

    def counted(size: int, **options: Any) -> torch.Tensor:
        sizes.append(size)
        return real(size, **options)

    monkeypatch.setattr(torch, "randperm", counted)
    _, model = attached(100)
    assert torch.randperm is counted
    modules = [module for module in model.modules() if isinstance(module, FourierFTLinear)]
    shapes = {(module.out_features, module.in_features) for module in modules}
    assert len(modules) > len(sizes) == len({outputs * inputs for outputs, inputs in shapes})
    for module in modules:
        generator = torch.Generator()
        generator.manual_seed(module.fourierft_random_loc_seed[ADAPTER])
        places = real(module.out_features * module.in_features, generator=generator)[:100]
        row, column = module.indices[ADAPTER]
        assert torch.equal(row * module.in_features + column, places)


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


def as_in_training(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss and gradients of a pass under autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return loss_and_gradients(model, IDS)


def test_over_a_base_in_bf16_it_is_as_near_to_the_truth_as_peft() -> None:
    found = {}
    for name in ("truth", "peft", "waves"):
        method, model = attached(50, hidden_size=64, intermediate_size=128)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
            if name == "truth" or parameter.requires_grad:
                parameter.data = parameter.data.float()
        if name == "waves":
            method.speed_up(model, ExitStack())
            kinds = {type(module) for module in model.modules() if isinstance(module, FourierFTLinear)}
            assert kinds == {SumOfWaves}
        found[name] = as_in_training(model, torch.float32 if name == "truth" else torch.bfloat16)
    for name, truth in found["truth"].items():
        peft, waves = ((found[way][name] - truth).norm() / truth.norm() for way in ("peft", "waves"))
        assert waves <= 2 * peft + 1e-4, name


def test_an_update_by_waves_is_that_by_transforms_and_is_not_lost_in_the_sum() -> None:
    method, model = attached(512, hidden_size=64)
    model.bfloat16()
    method.speed_up(model, ExitStack())
    module = next(module for module in model.modules() if isinstance(module, SumOfWaves))
    update, waves = module.update(), module.sum_of_waves()
    assert (waves - update).norm() <= 1e-2 * update.norm()
    # A sixteenth of what bf16 tells apart at 1: lost by the nearest, kept in the mean of the inputs.
    weight = torch.ones(64, 4096, dtype=torch.bfloat16)
    small = torch.full_like(weight, 2**-7 / 16, dtype=torch.float32).requires_grad_()
    total = dithered_sum(weight, small, noise_like(weight))
    assert torch.equal((weight + small).bfloat16(), weight)
    assert abs((total.float() - 1).mean() / (2**-7 / 16) - 1) < 0.02
    assert torch.equal(dithered_sum(weight, torch.zeros_like(small), noise_like(weight)), weight)
    total.sum().backward()
    assert torch.equal(small.grad, torch.ones_like(small))
