"""The LoRA family's files: LoRA, rsLoRA, DoRA, and LongLoRA with its norms, embeddings and rotary positions.

Shapes: R rank, I inputs, O outputs, V vocabulary, D width.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serving.adapter import Adapter, Part, Place
from serving.base import HEAD_NORMS, LAST_NORM, FrozenBase
from serving.error import AdapterRefused
from serving.folder import Folder, pattern
from serving.target import PREFIX, AdaptedLinear, targets


def read_lora(folder: Folder, base: FrozenBase) -> Adapter:
    """LoRA, rsLoRA, DoRA and LongLoRA: s B A with s = alpha / r (or alpha / sqrt r), and weights of its own."""
    config = folder.config
    folder.only(
        "alpha_pattern",
        "ensure_weight_tying",
        "lora_alpha",
        "modules_to_save",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
        "bias",
    )
    if config.get("bias", "none") != "none":
        raise folder.refuse("bias", "none")
    parts = {}
    for target in targets(folder, base, "lora_A.weight"):
        part = factors(folder, target)
        if config.get("use_dora"):
            part = decomposed(folder, base, target, part)
        place = target.place
        parts[place] = part
    adapter = Adapter(folder.digest, parts)
    return with_whole_weights(folder, base, adapter)


def factors(folder: Folder, target: AdaptedLinear) -> Part:
    """A and s B of one linear layer."""
    config = folder.config
    module = target.module
    ranks = config.get("rank_pattern", {})
    rank = pattern(ranks, module, config["r"])
    alphas = config.get("alpha_pattern", {})
    alpha = pattern(alphas, module, config["lora_alpha"])
    divisor = rank
    if config.get("use_rslora"):
        divisor = math.sqrt(rank)
    scale = alpha / divisor
    name = target.name
    a_RI = folder.take(f"{name}.lora_A.weight", rank, target.inputs)
    b_OR = folder.take(f"{name}.lora_B.weight", target.outputs, rank)
    b_RO = scale * b_OR.T
    return Part(a_RI, b_RO)


def decomposed(folder: Folder, base: FrozenBase, target: AdaptedLinear, part: Part) -> Part:
    """DoRA: m = magnitude / ||W + s B A|| by output row, once; a bias of the base stays as it is."""
    assert part.a_RI is not None
    assert part.b_RO is not None
    layer, name = target.place
    weight_OI = base.weight(layer, name)
    weight_OI = weight_OI.detach()
    weight_OI = weight_OI.float()
    a_RI = part.a_RI.to(weight_OI)
    b_RO = part.b_RO.to(weight_OI)
    update_OI = b_RO.T @ a_RI
    changed_OI = weight_OI + update_OI
    norm_O = torch.linalg.norm(changed_OI, dim=1)
    name_of_magnitude = f"{target.name}.lora_magnitude_vector"
    magnitude_O = folder.take(name_of_magnitude, target.outputs)
    m_O = magnitude_O / norm_O.cpu()
    bias_O = base.bias(layer, name)
    if bias_O is None:
        return replace(part, m_O=m_O)
    bias_O = bias_O.detach().float()
    bias_O = bias_O.cpu()
    share_O = 1 - m_O
    beta_O = share_O * bias_O
    return replace(part, m_O=m_O, beta_O=beta_O)


def with_whole_weights(folder: Folder, base: FrozenBase, adapter: Adapter) -> Adapter:
    """An adapter with the norms, embedding and head that its folder holds whole, and the config beside them."""
    norms = _norms(folder, base)
    embed_VD = _vocabulary_weight(folder, base, "model.embed_tokens")
    head_VD = _vocabulary_weight(folder, base, "lm_head")
    has_only_embedding = embed_VD is not None and head_VD is None
    if has_only_embedding and base.is_tied:
        raise folder.refuse("modules_to_save", "the head beside the embedding, which are one weight in this base")
    parts = adapter.parts | norms
    config = changed_config(folder.path, base)
    return replace(adapter, parts=parts, embed_VD=embed_VD, head_VD=head_VD, config=config)


def _norms(folder: Folder, base: FrozenBase) -> dict[Place, Part]:
    """The weights of norms in a folder, Gemma's offset included; the last norm is in layer 0."""
    offset = base.shape.norm_offset
    names = set(folder.names)
    parts = {}
    for name, weight_LD in base.norms.items():
        layers, width = weight_LD.shape
        for layer in range(layers):
            module = norm_module(layer, name)
            key = f"{PREFIX}{module}.weight"
            if key in names:
                weight_D = folder.take(key, width)
                place = (layer, name)
                m_O = weight_D + offset
                parts[place] = Part(m_O=m_O)
    return parts


def norm_module(layer: int, name: str) -> str:
    """The name in the base of a layer's norm, or of the last norm, which has no layer."""
    if name == LAST_NORM:
        return f"model.{name}"
    if name in HEAD_NORMS:
        return f"model.layers.{layer}.self_attn.{name}"
    return f"model.layers.{layer}.{name}"


def _vocabulary_weight(folder: Folder, base: FrozenBase, module: str) -> Tensor | None:
    """An embedding or a head [V, D], if the folder has it."""
    key = f"{PREFIX}{module}.weight"
    if key not in folder.names:
        return None
    shape = base.shape
    return folder.take(key, shape.vocabulary, shape.width)


def changed_config(folder: Path, base: FrozenBase) -> Any:
    """The base's config as the adapter in a folder wants it; None where rotary positions are the same."""
    path = folder / "config.json"
    if not path.exists():
        return None
    from transformers import AutoConfig

    expected = base.config
    config = AutoConfig.from_pretrained(folder)
    is_same_type = config.model_type == expected.model_type
    is_as_wide = config.hidden_size == base.shape.width
    if not (is_same_type and is_as_wide):
        raise AdapterRefused(f"{path}: found another base than the one that is loaded")
    if config.rope_parameters == expected.rope_parameters:
        return None
    return config
