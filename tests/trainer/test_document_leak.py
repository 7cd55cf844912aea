"""Bases whose packed rows are no documents of their own are found out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import TWO_LAYERS, random_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
)

from trainer.document_leak import LEAK_ROUNDING, leak

OPT = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
KEEP_APART = [
    LlamaConfig(**TWO_LAYERS),
    MistralConfig(**TWO_LAYERS, head_dim=8, sliding_window=16),
    MixtralConfig(**TWO_LAYERS, head_dim=8, num_local_experts=4),
]
DO_NOT = [
    OPT,
    FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    MptConfig(d_model=32, n_layers=2, n_heads=4),
    MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4),
]


def found(config: PreTrainedConfig, dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    config.vocab_size, config.initializer_range = 300, 0.2
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return leak(model, 48, 300, torch.device("cpu"))


@pytest.mark.parametrize("dtype", LEAK_ROUNDING)
@pytest.mark.parametrize("config", [*KEEP_APART, *DO_NOT], ids=lambda config: config.model_type)
def test_what_documents_see_of_each_other(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    if config in KEEP_APART:
        assert found(config, dtype) == 0
    else:
        assert found(config, dtype) > 5 * LEAK_ROUNDING[dtype]


def test_a_tokenizer_may_have_more_tokens_than_the_base(
    new_run: Any, launch: Any, tiny_base: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    base = random_llama(vocab_size=len(tokenizer))
    tokenizer.add_tokens([f"<unused {i}>" for i in range(len(tokenizer))])
    for saved in (base, tokenizer):
        saved.save_pretrained(tmp_path / "base")
    launch(1, new_run("run", base=str(tmp_path / "base"), train={"steps": 2}))


def test_a_job_that_packs_them_is_refused(new_run: Any, launch: Any, tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    OPT.vocab_size, OPT.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    for saved in (AutoModelForCausalLM.from_config(OPT), tokenizer):
        saved.save_pretrained(tmp_path / "opt")
    job = {"base": str(tmp_path / "opt"), "sharding": {"zero": 3}, "train": {"steps": 2}}
    with pytest.raises(AssertionError, match=r"data\.packing: documents .* of type opt; allowed: false"):
        launch(1, new_run("packed", **job))
    launch(1, new_run("alone", data={"packing": False}, **job))
