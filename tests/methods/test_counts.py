"""Numbers of trained parameters: those published for Llama-3.2-3B, and those that are really trained."""

import math

import pytest
from alone import attached, llama
from llamas import LLAMA_3B

from methods.base import UNSHARDED
from methods.options import Options
from methods.options.low_rank import AdaLora, Dora, Lora, QLora, RsLora
from methods.options.other_adapters import FourierFt, Ia3, Vera
from methods.options.virtual import Prefix, Prompt
from methods.parts.weights import shapes
from orchestrator.planning.model import Model

QV = ("q_proj", "v_proj")
# PEFT's method_comparison publishes LoRA r32 to the last digit, the others in millions with these digits.
PUBLISHED: list[tuple[Options, float, int]] = [
    (Lora(rank=32, target=QV), 9.175040, 6),
    (Lora(rank=64, target=QV), 18.35, 2),
    (RsLora(rank=64, target=QV), 18.35, 2),
    (Lora(rank=10, target=("gate_proj", "up_proj", "down_proj")), 9.46, 2),
    (QLora(rank=32, target=QV), 9.175040, 6),
    (Dora(rank=32, target=QV), 9.29, 2),
    (AdaLora(initial_rank=64, rank=32, target=QV), 18.35, 2),
    (Ia3(), 0.29, 2),
    (Vera(rank=256, target=QV), 0.129, 3),
    (FourierFt(frequencies=1000, target=QV), 0.056, 3),
    (FourierFt(frequencies=5000, target=QV), 0.28, 2),
    (Prefix(tokens=50), 2.87, 2),
    (Prompt(tokens=200), 0.61, 2),
]


@pytest.mark.parametrize(("options", "millions", "digits"), PUBLISHED, ids=lambda x: getattr(x, "kind", None))
def test_published_counts(options: Options, millions: float, digits: int) -> None:
    model = Model(LLAMA_3B)
    count = options.trained_parameters(model.linears, model.other_shapes)
    assert math.isclose(count / 1e6, millions, abs_tol=0.51 * 10**-digits)


REAL: list[Options] = [
    Lora(rank=4),
    Lora(rank=4, target=("q_proj", "layers.0.mlp.*"), exclude=("down_proj",)),
    Lora(rank=4, target=("embed_tokens", "lm_head", "v_proj")),
    Lora(rank=4, init="pissa"),
    RsLora(rank=4),
    Dora(rank=4),
    Dora(rank=4, target=("k_proj", "up_proj")),
    Ia3(),
    Ia3(target=("q_proj", "up_proj", "down_proj"), feedforward=("up_proj", "layers.1.mlp.down_proj")),
    Vera(rank=8),
    Vera(rank=8, exclude=("mlp.*",)),
    FourierFt(frequencies=50),
]


@pytest.mark.parametrize("options", REAL, ids=lambda options: options.kind)
def test_real_counts(options: Options) -> None:
    base = llama(tied=False)
    linears, others = shapes(base, UNSHARDED)
    _, model = attached(options, base)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert options.trained_parameters(linears, others) == real
