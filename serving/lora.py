"""The LoRA family's files: LoRA, rsLoRA, DoRA, and LongLoRA with its norms, embeddings and rotary positions.

Shapes: R rank, I inputs, O outputs.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from serving.adapter import Adapter, Part
from serving.base import HEAD_NORMS, Base
from serving.error import AdapterRefused
from serving.folder import Folder, pattern
from serving.target import PREFIX, Target, targets


def read_lora(folder: Folder, base: Base) -> Adapter:
    """LoRA, rsLoRA, DoRA and LongLoRA: s B A with s = alpha / r (or alpha / sqrt r), and weights of its own."""
    config = folder.config
    folder.only(
        "alpha_pattern", "ensure_weight_tying", "lora_alpha", "modules_to_save", "r", "rank_pattern", "use_dora",
        "use_rslora", "bias",
    )  # fmt: skip
    if config.get("bias", "none") != "none":
        raise folder.refuse("bias", "none")
    parts = {}
    for target in targets(folder, base, "lora_A.weight"):
        rank = pattern(config.get("rank_pattern", {}), target.module, config["r"])
        alpha = pattern(config.get("alpha_pattern", {}), target.module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        name = f"{PREFIX}{target.module}"
        a_RI = folder.take(f"{name}.lora_A.weight", rank, target.site.inputs)
        b_OR = folder.take(f"{name}.lora_B.weight", target.out, rank)
        part = Part(a_RI, scale * b_OR.T)
        parts[target.place] = decomposed(folder, base, target, part) if config.get("use_dora") else part
    return own_weights(folder, base, Adapter(folder.digest, parts))


def decomposed(folder: Folder, base: Base, target: Target, part: Part) -> Part:
    """DoRA: m = magnitude / ||W + s B A|| by output row, once; a bias of the base stays as it is."""
    assert part.a_RI is not None and part.b_RO is not None
    layer, name = target.place
    magnitude_O = folder.take(f"{PREFIX}{target.module}.lora_magnitude_vector", target.out)
    weight_OI = base.weight(layer, name).detach().float()
    update_OI = (part.b_RO.T.to(weight_OI.device)) @ part.a_RI.to(weight_OI.device)
    m_O = magnitude_O / torch.linalg.norm(weight_OI + update_OI, dim=1).cpu()
    bias_O = base.bias(layer, name)
    beta_O = None if bias_O is None else (1 - m_O) * bias_O.detach().float().cpu()
    return replace(part, m_O=m_O, beta_O=beta_O)


def own_weights(folder: Folder, base: Base, adapter: Adapter) -> Adapter:
    """An adapter with the norms, embedding and head that its folder holds whole, and the config beside them."""
    parts = dict(adapter.parts)
    shape = base.shape
    for layer in range(shape.layers):
        for name in base.norms:
            module = f"model.layers.{layer}.{'self_attn.' if name in HEAD_NORMS else ''}{name}"
            module = "model.norm" if name == "norm" else module
            if (key := f"{PREFIX}{module}.weight") in folder.names and (layer == 0 or name != "norm"):
                weight = folder.take(key, base.norms[name].shape[1])
                parts[layer, name] = Part(m_O=weight + shape.norm_offset)
    own: dict[str, Any] = {}
    for key, name in (("embed_VD", "model.embed_tokens"), ("head_VD", "lm_head")):
        if f"{PREFIX}{name}.weight" in folder.names:
            own[key] = folder.take(f"{PREFIX}{name}.weight", shape.vocabulary, shape.width)
    if "embed_VD" in own and "head_VD" not in own and base.head_VD.data_ptr() == base.embed_VD.data_ptr():
        raise folder.refuse("modules_to_save", "the head beside the embedding, which are one weight in this base")
    return replace(adapter, parts=parts, config=_changed(folder, base), **own)


def _changed(folder: Folder, base: Base) -> Any:
    """The base's config as the adapter wants it; None where rotary positions are the same."""
    if not (folder.path / "config.json").exists():
        return None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.path)
    if config.model_type != base.config.model_type or config.hidden_size != base.shape.width:
        raise AdapterRefused(f"{folder.path / 'config.json'}: found another base than the one that is loaded")
    return None if config.rope_parameters == base.config.rope_parameters else config
