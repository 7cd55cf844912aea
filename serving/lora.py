"""The LoRA family's files: LoRA, rsLoRA, DoRA, and LongLoRA with its norms, embeddings and rotary positions.

Shapes: R rank, I inputs, O outputs.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from serving.adapter import Adapter, Part, Place
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
        part = factors(folder, target)
        if config.get("use_dora"):
            part = decomposed(folder, base, target, part)
        parts[target.place] = part
    return with_whole_weights(folder, base, Adapter(folder.digest, parts))


def factors(folder: Folder, target: Target) -> Part:
    """A and s B of one linear layer."""
    config = folder.config
    ranks = config.get("rank_pattern", {})
    rank = pattern(ranks, target.module, config["r"])
    alphas = config.get("alpha_pattern", {})
    alpha = pattern(alphas, target.module, config["lora_alpha"])
    scale = alpha / rank
    if config.get("use_rslora"):
        scale = alpha / math.sqrt(rank)
    a_RI = folder.take(f"{target.name}.lora_A.weight", rank, target.site.inputs)
    b_OR = folder.take(f"{target.name}.lora_B.weight", target.out, rank)
    return Part(a_RI, scale * b_OR.T)


def decomposed(folder: Folder, base: Base, target: Target, part: Part) -> Part:
    """DoRA: m = magnitude / ||W + s B A|| by output row, once; a bias of the base stays as it is."""
    assert part.a_RI is not None and part.b_RO is not None
    layer, name = target.place
    magnitude_O = folder.take(f"{target.name}.lora_magnitude_vector", target.out)
    weight_OI = base.weight(layer, name).detach().float()
    device = weight_OI.device
    b_OR = part.b_RO.T.to(device)
    a_RI = part.a_RI.to(device)
    update_OI = b_OR @ a_RI
    norm_O = torch.linalg.norm(weight_OI + update_OI, dim=1)
    m_O = magnitude_O / norm_O.cpu()
    bias_O = base.bias(layer, name)
    if bias_O is None:
        return replace(part, m_O=m_O)
    beta_O = (1 - m_O) * bias_O.detach().float().cpu()
    return replace(part, m_O=m_O, beta_O=beta_O)


def with_whole_weights(folder: Folder, base: Base, adapter: Adapter) -> Adapter:
    """An adapter with the norms, embedding and head that its folder holds whole, and the config beside them."""
    parts = adapter.parts | _norms(folder, base)
    embed_VD = _vocabulary_weight(folder, base, "model.embed_tokens")
    head_VD = _vocabulary_weight(folder, base, "lm_head")
    is_tied = base.head_VD.data_ptr() == base.embed_VD.data_ptr()
    if embed_VD is not None and head_VD is None and is_tied:
        raise folder.refuse("modules_to_save", "the head beside the embedding, which are one weight in this base")
    return replace(adapter, parts=parts, embed_VD=embed_VD, head_VD=head_VD, config=_changed_config(folder, base))


def _norms(folder: Folder, base: Base) -> dict[Place, Part]:
    """The weights of norms in a folder, Gemma's offset included; the last norm is in layer 0."""
    names = set(folder.names)
    parts = {}
    for layer in range(base.shape.layers):
        for name, weight_LD in base.norms.items():
            key = f"{PREFIX}{norm_module(layer, name)}.weight"
            is_again = name == "norm" and layer > 0
            if key in names and not is_again:
                weight_D = folder.take(key, weight_LD.shape[1])
                parts[layer, name] = Part(m_O=weight_D + base.shape.norm_offset)
    return parts


def norm_module(layer: int, name: str) -> str:
    """The name in the base of a layer's norm, or of the last norm, which has no layer."""
    if name == "norm":
        return "model.norm"
    if name in HEAD_NORMS:
        return f"model.layers.{layer}.self_attn.{name}"
    return f"model.layers.{layer}.{name}"


def _vocabulary_weight(folder: Folder, base: Base, module: str) -> Tensor | None:
    """An embedding or a head [V, D], if the folder has it."""
    key = f"{PREFIX}{module}.weight"
    if key not in folder.names:
        return None
    return folder.take(key, base.shape.vocabulary, base.shape.width)


def _changed_config(folder: Folder, base: Base) -> Any:
    """The base's config as the adapter wants it; None where rotary positions are the same."""
    path = folder.path / "config.json"
    if not path.exists():
        return None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.path)
    if config.model_type != base.config.model_type or config.hidden_size != base.shape.width:
        raise AdapterRefused(f"{path}: found another base than the one that is loaded")
    if config.rope_parameters == base.config.rope_parameters:
        return None
    return config
