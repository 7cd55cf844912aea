"""Merging into bases whose input and output embedding are one weight."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from alone import attached, logits, trained
from llamas import TWO_LAYERS
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from methods.options.low_rank import Lora, RsLora

SMALL: dict[str, Any] = {"vocab_size": 320, "initializer_range": 0.2, "tie_word_embeddings": True}
BASES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TWO_LAYERS | SMALL),
    "qwen2": Qwen2Config(**TWO_LAYERS | SMALL),
    "gemma": GemmaConfig(**TWO_LAYERS | SMALL, head_dim=8),  # scales what its embedding gives
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **SMALL),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("where", ["embedding", "head", "both", "neither"])
def test_a_merge_changes_the_use_that_the_adapter_changes(base: str, where: str, tmp_path: Path) -> None:
    embedding = "wte" if base == "gpt2" else "embed_tokens"
    linear = "c_attn" if base == "gpt2" else "q_proj"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BASES[base]).save_pretrained(tmp_path / "base")

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    kind = RsLora if where == "both" else Lora
    method, model = attached(kind(rank=4, target=(linear,)), plain())
    targets = {"embedding": [embedding], "head": ["lm_head"], "both": [embedding, "lm_head"], "neither": []}[where]
    model = peft.get_peft_model(plain(), method.peft_config([*targets, linear]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model):
            model.get_parameter(parameter).normal_(0, 0.1, generator=generator)
    expected = logits(model)
    method.export(model, trained(model), tmp_path / "adapter")
    merged = method.merge(peft.PeftModel.from_pretrained(plain(), tmp_path / "adapter"))
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(plain()) - expected).abs().max() > 0.1
    assert (logits(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert loaded.config.tie_word_embeddings == (where == "neither")
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (where == "neither")
