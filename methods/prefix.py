"""Prefix tuning: trained keys and values in front of a document's own, softmax(q [P_K; K]^T / sqrt(D)) [P_V; V] in
every layer (Li and Liang 2021, arXiv 2101.00190, section 4; without the paper's network over P, as PEFT's default).

The prefix is what a cache would hold, so there is one per key-value head, and RoPE does not rotate its keys. A
document's positions start at V. The attention function adds the prefix, for queries of any document, while caches
and masks know the documents alone: so packing, padding, generation and gradient checkpointing need nothing else.
Shapes: B rows, T queries, S keys, L layers, V virtual tokens, H key-value heads, D head size.
"""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from methods.base import Method
from methods.options.virtual import Prefix
from methods.parts import attention
from methods.parts.virtual import common, text_ids, write

ATTENTION = "sdpa_with_prefix"


class PrefixTuning(Method[Prefix]):
    """A parameter `prefix` [2, H, V, D] in every attention module: keys, then values."""

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze the base and give its attention modules a prefix."""
        self.options.check(model.config.to_dict(), self.setup.seq_len)
        model.requires_grad_(False)
        modules = _attentions(model)
        for module, start_2HVD in zip(modules, self._start(model, modules), strict=True):
            module.prefix = nn.Parameter(start_2HVD)
        attention.replace(model, ATTENTION, self.options.kind, "prompt")
        model.register_forward_pre_hook(self._shift, with_kwargs=True)
        return model

    def export(self, model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors: [V, L x 2 x H x D]."""
        names = [name for name, module in model.named_modules() if hasattr(module, "prefix")]
        prefix_L2HVD = torch.stack([weights[f"{name}.prefix"] for name in names])
        layers, _, heads, tokens, size = prefix_L2HVD.shape
        config = peft.PrefixTuningConfig(**common(tokens, heads * size), num_layers=layers, num_attention_heads=heads)
        write(model, config, prefix_L2HVD.permute(3, 0, 1, 2, 4).reshape(tokens, -1), folder)

    def _start(self, model: nn.Module, modules: list[Any]) -> list[torch.Tensor]:
        """Each module's prefix at the start: what the base computes for a text, or noise, as PEFT has it."""
        tokens, text = self.options.tokens, self.options.init_text
        if text is None:
            return [torch.randn(2, m.k_proj.out_features // m.head_dim, tokens, m.head_dim) for m in modules]
        ids = text_ids(self.setup.tokenizer, text, tokens).to(next(model.parameters()).device)
        training = model.training
        model.eval()  # gradient checkpointing, if it is on, drops caches in training
        with torch.no_grad(), self.setup.gather.gathered_in_turn(model):
            cache = model(input_ids=ids[None], use_cache=True, logits_to_keep=1).past_key_values
        model.train(training)
        held = [cache.layers[module.layer_idx] for module in modules]
        return [torch.cat([layer.keys, layer.values]).float() for layer in held]

    def _shift(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Let a document's positions start behind the prefix."""
        positions = kwargs.get("position_ids")
        if positions is None:
            ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        return args, kwargs | {"position_ids": positions + self.options.tokens}


def _attentions(model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "layer_idx")]
    if not found:
        raise ValueError("prefix tuning needs a base whose attention has k_proj and v_proj")
    return found


def _attend(
    module: Any,
    query_BHTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    mask_BHTS: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the prefix and what the mask shows."""
    prefix_2BHVD = module.prefix.to(key_BHSD.dtype)[:, None].expand(-1, len(key_BHSD), -1, -1, -1)
    key, value = (torch.cat(pair, dim=2) for pair in zip(prefix_2BHVD, (key_BHSD, value_BHSD), strict=True))
    mask = nn.functional.pad(mask_BHTS, (prefix_2BHVD.shape[3], 0), value=True)
    attended: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query_BHTD, key, value, mask, **options)
    return attended


def _mask(*args: Any, **options: Any) -> torch.Tensor:
    """The mask of documents alone, also where sdpa could do without one."""
    mask: torch.Tensor = sdpa_mask(*args, **options | {"allow_is_causal_skip": False})
    return mask


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
