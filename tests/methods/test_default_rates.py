"""LoRA's default rate on public sweeps: how much more test loss it has than the best rate of each."""

import math
from itertools import pairwise
from statistics import fmean

import pytest

from methods.options.base import WIDTH
from methods.options.low_rank import Lora

# Test loss by learning rate at rank 16 (scale 2) on tulu3, batch 128, 780 steps, one seed. From
# github.com/thinking-machines-lab/tinker-cookbook (commit 9dfcc3a2), the bases with four rates of
# tinker_cookbook/recipes/chat_sl/results/sft_sweep.md.
TEST_LOSS = {
    "Qwen3.6-35B-A3B": {4e-5: 0.6912, 1e-4: 0.6795, 3e-4: 0.671, 1e-3: 0.6917},
    "Qwen3.6-27B": {4e-5: 0.6741, 1e-4: 0.6628, 3e-4: 0.6557, 1e-3: 0.6813},
    "Qwen3.5-35B-A3B-Base": {4e-5: 0.6561, 1e-4: 0.6461, 3e-4: 0.6398, 1e-3: 0.653},
    "Qwen3.5-9B-Base": {4e-5: 0.7006, 1e-4: 0.6892, 3e-4: 0.6774, 1e-3: 0.6966},
    "Qwen3.5-9B": {4e-5: 0.7436, 1e-4: 0.7297, 3e-4: 0.7178, 1e-3: 0.7476},
    "Qwen3-30B-A3B": {4e-5: 0.5311, 1e-4: 0.523, 3e-4: 0.5171, 1e-3: 0.515, 3e-3: 0.563},
    "Qwen3-30B-A3B-Base": {4e-5: 0.5075, 1e-4: 0.5022, 3e-4: 0.4984, 1e-3: 0.4986, 3e-3: 0.5387},
    "Qwen3-30B-A3B-Instruct-2507": {4e-5: 0.5155, 1e-4: 0.5084, 3e-4: 0.5032, 1e-3: 0.5029},
    "Qwen3-4B-Instruct-2507": {4e-5: 0.5815, 1e-4: 0.573, 3e-4: 0.5651, 1e-3: 0.5631},
    "Qwen3-8B": {4e-5: 0.5604, 1e-4: 0.552, 3e-4: 0.5438, 1e-3: 0.5405},
    "Qwen3-8B-Base": {4e-5: 0.532, 1e-4: 0.5269, 3e-4: 0.5222, 1e-3: 0.5219},
    "Qwen3-VL-30B-A3B-Instruct": {4e-5: 0.5083, 1e-4: 0.5022, 3e-4: 0.498, 1e-3: 0.4994},
    "Qwen3.5-27B": {4e-5: 0.477, 1e-4: 0.4728, 3e-4: 0.4688, 1e-3: 0.4738},
    "Qwen3.5-35B-A3B": {4e-5: 0.4917, 1e-4: 0.4873, 3e-4: 0.4835, 1e-3: 0.4875},
    "Qwen3.5-4B": {4e-5: 0.5547, 1e-4: 0.5483, 3e-4: 0.5424, 1e-3: 0.5498},
    "Llama-3.1-8B": {4e-5: 0.6112, 1e-4: 0.5983, 3e-4: 0.5863, 1e-3: 0.5931},
    "Llama-3.1-8B-Instruct": {4e-5: 0.5933, 1e-4: 0.5837, 3e-4: 0.575, 1e-3: 0.5809},
    "Llama-3.2-1B": {4e-5: 0.854, 1e-4: 0.8297, 3e-4: 0.8038, 1e-3: 0.7948},
    "Llama-3.2-3B": {4e-5: 0.712, 1e-4: 0.6936, 3e-4: 0.6737, 1e-3: 0.6661},
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": {4e-5: 0.5647, 1e-4: 0.5551, 4e-4: 0.5455, 2e-3: 0.5532},
    "NVIDIA-Nemotron-3-Super-120B-A12B-BF16": {4e-5: 0.49, 1e-4: 0.4832, 2e-4: 0.4802, 4e-4: 0.4783},
    "gpt-oss-120b": {4e-5: 0.5129, 3e-4: 0.5032, 1e-3: 0.5053, 3e-3: 0.5477},
}


def loss_at(losses: dict[float, float], rate: float) -> float:
    """The loss at a rate, on straight lines between those that were run: a little more than it would be."""
    for low, high in pairwise(sorted(losses)):
        if low <= rate <= high:
            share = math.log(rate / low) / math.log(high / low)
            return (1 - share) * losses[low] + share * losses[high]
    raise AssertionError(f"no run on both sides of {rate}")


@pytest.mark.parametrize("width", [2048, 3072, 4096, 8192])
def test_the_default_rate_of_lora_costs_little_on_bases_of_any_width(width: int) -> None:
    rate = Lora().rate(width)
    regrets = [loss_at(losses, rate) / min(losses.values()) - 1 for losses in TEST_LOSS.values()]
    assert len(regrets) == 22
    assert fmean(regrets) <= 0.005 and max(regrets) <= 0.01


def test_the_rate_rises_on_narrow_bases_alone() -> None:
    assert Lora().rate(WIDTH // 2) > Lora().rate(WIDTH) == Lora().rate(4 * WIDTH) == Lora().rate(None)
