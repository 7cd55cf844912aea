"""The bases whose forward pass the engine has, against transformers; and those that it refuses."""

from typing import Any

import pytest
import torch
from llamas import TWO_LAYERS
from transformers import AutoConfig, AutoModelForCausalLM

from serving.base import FrozenBase
from serving.engine import Engine
from serving.error import BaseRefused
from serving.sequence import Request

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "phi3": {"partial_rotary_factor": 0.5, "pad_token_id": 0},
}  # fmt: skip
PROMPTS = [tuple((7 * i + 3 * n) % 320 for i in range(4 + 5 * n)) for n in range(3)]


def random_model(family: str, **more: Any) -> Any:
    """A random model of two layers, fp32, with biases and norms that matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TWO_LAYERS | {"vocab_size": 320, "initializer_range": 0.2} | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model = random_model(family, **FAMILIES[family])
    expected = []
    for prompt in PROMPTS:
        options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        expected.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROMPTS[-1:])).logits[0]
    engine = Engine(model, tokens=1024, adapter_bytes=2**16)
    (found_TV,) = engine.logits([Request(PROMPTS[-1])])
    assert (found_TV - logits).abs().max() < 1e-5 * logits.std()
    found = engine.generate([Request(prompt, new_tokens=12) for prompt in PROMPTS])
    assert [list(p) + answer for p, answer in zip(PROMPTS, found, strict=True)] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_are_rounded_as_transformers_rounds_them(family: str, dtype: torch.dtype) -> None:
    model = random_model(family, **FAMILIES[family])
    rotary = model.model.rotary_emb
    model.model.layers.to(dtype)  # of a model that is cast whole, the frequencies lose as well
    model.model.norm.to(dtype)
    model.model.embed_tokens.to(dtype)
    model.lm_head.to(dtype)
    expected = rotary(torch.zeros(1, 1, dtype=dtype), torch.arange(100)[None])
    base = FrozenBase(model)
    for found_pf, expected_1pe in zip(base.rotation(model.config, 100), expected, strict=True):
        half = found_pf.shape[1]
        assert torch.equal(found_pf, expected_1pe[0, :, :half].float())


def test_the_model_goes_on_working_on_the_same_memory() -> None:
    model = random_model("llama")
    ids = torch.tensor(PROMPTS[-1:])
    before = model(input_ids=ids).logits
    engine = Engine(model, tokens=512, adapter_bytes=2**16)
    assert torch.equal(model(input_ids=ids).logits, before)
    places = [engine.base.groups["qkv"].weight_LNI.untyped_storage().data_ptr()]
    assert [model.model.layers[1].self_attn.k_proj.weight.untyped_storage().data_ptr()] == places


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("gpt2", {}, "found model type 'gpt2'; allowed: gemma, llama, mistral, phi3, qwen2, qwen3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'; allowed",
        ),
        ("llama", {"hidden_act": "relu"}, "found activation 'relu'; allowed: silu, gelu_pytorch_tanh"),
    ],
)
def test_other_bases_are_refused_with_the_list(family: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(BaseRefused, match=said):
        Engine(random_model(family, **more))
