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
from torch import Tensor, nn
from torch.nn import Module, Parameter
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from methods.base import Method, Tensors
from methods.options.virtual import Prefix
from methods.parts import attention
from methods.parts.virtual import common, text_ids, write

ATTENTION = "sdpa_with_prefix"


class PrefixTuning(Method[Prefix]):
    """A parameter `prefix` [2, H, V, D] in every attention module: keys, then values."""

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze the base and give its attention modules a prefix."""
        options = self.options
        config = model.config.to_dict()
        options.check(config, self.setup.seq_len)
        model.requires_grad_(False)
        modules = _attentions(model)
        starts = self._starts(model, modules)
        for module, start_2HVD in zip(modules, starts, strict=True):
            module.prefix = Parameter(start_2HVD)
        attention.replace(model, ATTENTION, options.kind, "prompt")
        model.register_forward_pre_hook(self._shift, with_kwargs=True)
        return model

    def export(self, model: Module, weights: Tensors, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors: [V, L x 2 x H x D]."""
        prefixes = []
        for name, module in model.named_modules():
            if hasattr(module, "prefix"):
                prefix_2HVD = weights[f"{name}.prefix"]
                prefixes.append(prefix_2HVD)
        prefix_L2HVD = torch.stack(prefixes)
        layers, _, heads, tokens, size = prefix_L2HVD.shape
        width = heads * size
        shared = common(tokens, width)
        config = peft.PrefixTuningConfig(**shared, num_layers=layers, num_attention_heads=heads)
        prefix_VL2HD = prefix_L2HVD.permute(3, 0, 1, 2, 4)
        prompt = prefix_VL2HD.reshape(tokens, -1)
        write(model, config, prompt, folder)

    def _starts(self, model: Module, modules: list[Any]) -> list[Tensor]:
        """Each module's prefix at the start: what the base computes for a text, or noise, as PEFT has it."""
        text = self.options.init_text
        if text is None:
            return list(map(self._noise, modules))
        tokenizer = self.setup.tokenizer
        ids = text_ids(tokenizer, text, self.options.tokens)
        cache = self._cache(model, ids)
        starts = []
        for module in modules:
            layer = cache.layers[module.layer_idx]
            start_2HVD = torch.cat([layer.keys, layer.values])
            start_2HVD = start_2HVD.float()
            starts.append(start_2HVD)
        return starts

    def _noise(self, module: Any) -> Tensor:
        """A normal prefix [2, H, V, D] for an attention module."""
        size = module.head_dim
        width = module.k_proj.out_features
        heads = width // size
        tokens = self.options.tokens
        return torch.randn(2, heads, tokens, size)

    def _cache(self, model: Module, ids: Tensor) -> Any:
        """The keys and values that the base computes for a text."""
        parameter = next(model.parameters())
        ids = ids.to(parameter.device)
        training = model.training
        model.eval()  # gradient checkpointing, if it is on, drops caches in training
        ids_1T = ids[None]
        gather = self.setup.gather
        with torch.no_grad(), gather.gathered_in_turn(model):
            output = model(input_ids=ids_1T, use_cache=True, logits_to_keep=1)
        model.train(training)
        return output.past_key_values

    def _shift(self, model: Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Let a document's positions start behind the prefix."""
        positions = kwargs.get("position_ids")
        if positions is None:
            ids = kwargs["input_ids"]
            cache = kwargs.get("past_key_values")
            positions = _positions(ids, cache)
        shifted = positions + self.options.tokens
        replaced = {"position_ids": shifted}
        return args, kwargs | replaced


def _positions(ids: Tensor, cache: Any) -> Tensor:
    """The positions [1, T] of ids [B, T] behind what a cache holds."""
    past = 0
    if cache is not None:
        past = cache.get_seq_length()
    length = ids.shape[1]
    end = past + length
    positions = torch.arange(past, end, device=ids.device)
    return positions[None]


def _attentions(model: Module) -> list[Any]:
    """The attention modules of a base; raises ValueError where it has none that are known."""
    attentions = []
    for module in model.modules():
        is_attention = hasattr(module, "k_proj")
        if is_attention and hasattr(module, "layer_idx"):
            attentions.append(module)
    if not attentions:
        raise ValueError("prefix tuning needs a base whose attention has k_proj and v_proj")
    return attentions


def attend_with_prefix(
    module: Any,
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    mask_BHTS: Tensor,
    part: attention.PartOfHeads = attention.ALL_HEADS,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over the prefix and what the mask shows, of all heads or of a part of them."""
    rows, heads = key_BHSD.shape[:2]
    prefix_of_all = module.prefix.to(key_BHSD.dtype)
    own_heads = part.places(heads)
    prefix_2HVD = prefix_of_all[:, own_heads]
    prefix_21HVD = prefix_2HVD[:, None]
    prefix_2BHVD = prefix_21HVD.expand(-1, rows, -1, -1, -1)
    prefix_key, prefix_value = prefix_2BHVD
    key = torch.cat((prefix_key, key_BHSD), dim=2)
    value = torch.cat((prefix_value, value_BHSD), dim=2)
    tokens = prefix_key.size(2)
    in_front = (tokens, 0)
    mask = nn.functional.pad(mask_BHTS, in_front, value=True)
    attended: tuple[Tensor, None]
    attended = sdpa_attention_forward(module, query_BHTD, key, value, mask, **options)
    return attended


def mask_of_documents(*args: Any, **options: Any) -> Tensor:
    """The mask of documents alone, also where sdpa could do without one."""
    options["allow_is_causal_skip"] = False
    mask: Tensor = sdpa_mask(*args, **options)
    return mask


AttentionInterface.register(ATTENTION, attend_with_prefix)
AttentionMaskInterface.register(ATTENTION, mask_of_documents)
