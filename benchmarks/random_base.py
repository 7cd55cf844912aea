"""A base with random weights and a tokenizer whose every token is a word, so that texts and token ids are one."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def random_base(folder: Path, shape: dict[str, Any], dtype: torch.dtype, device: str, end: str | None = None) -> Path:
    """A folder with a random Llama; `end` is the word that ends texts, if one does. Words are w0, w1, ..."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, dtype=dtype))
    model.to(dtype).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token=end).save_pretrained(folder)
    return folder
