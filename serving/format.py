"""Adapters from exported folders: one reader for each file format, chosen by what the config says.

The readers need neither PEFT nor the trainer. Formulas are those of the methods' modules in `methods/`.
Shapes: R rank, I inputs, O outputs, V virtual tokens, D width, N trained frequencies.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from serving.adapter import ACTIVATIONS, Adapter, Part, Place
from serving.base import BEHIND, Base, Site
from serving.error import AdapterRefused
from serving.folder import Folder, pattern

PREFIX = "base_model.model."
LIMIT = 8 * 2**30  # bytes of an adapter's weights
EPSILON = 1e-5  # what PEFT adds to AdaLoRA's number of ranks


@dataclass(frozen=True)
class Target:
    """A linear layer of the base that an adapter changes."""

    place: Place
    module: str  # its name in the base
    site: Site


def read(path: Path | str, base: Base, limit: int = LIMIT) -> Adapter:
    """The adapter of a folder, for a base; raises AdapterRefused with the file and what is allowed instead."""
    folder = Folder(Path(path), limit)
    kind = str(folder.config.get("peft_type") or folder.config.get("kind")).upper()
    if kind not in READERS:
        known = ", ".join(name.lower() for name in READERS)
        raise AdapterRefused(f"{folder.config_path}: found an adapter of kind {kind.lower()}; allowed: {known}")
    adapter = READERS[kind](folder, base)
    folder.finish()
    return adapter


def targets(folder: Folder, base: Base, suffix: str) -> Iterator[Target]:
    """The linear layers that have a tensor whose name ends so, and those that the config lists."""
    listed = folder.config.get("target_modules")
    wanted = tuple(listed) if isinstance(listed, list) else ()
    names = set(folder.names)
    for layer, site in base.linears():
        module = f"model.layers.{layer}.{site.module}.{site.name}"
        if f"{PREFIX}{module}.{suffix}" in names or _listed(module, wanted):
            yield Target((layer, site.name), module, site)


def _listed(module: str, wanted: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in wanted)


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
        b_OR = folder.take(f"{name}.lora_B.weight", target.site.stop - target.site.start, rank)
        part = Part(a_RI, scale * b_OR.T)
        parts[target.place] = decomposed(folder, base, target, part) if config.get("use_dora") else part
    return own_weights(folder, base, Adapter(folder.digest, parts))


def decomposed(folder: Folder, base: Base, target: Target, part: Part) -> Part:
    """DoRA: m = magnitude / ||W + s B A|| by output row, once; a bias of the base stays as it is."""
    assert part.a_RI is not None and part.b_RO is not None
    layer, name = target.place
    magnitude_O = folder.take(f"{PREFIX}{target.module}.lora_magnitude_vector", target.site.stop - target.site.start)
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
            module = f"model.layers.{layer}.{'self_attn.' if name in ('q_norm', 'k_norm') else ''}{name}"
            module = "model.norm" if name == "norm" else module
            if (key := f"{PREFIX}{module}.weight") in folder.names and (layer == 0 or name != "norm"):
                weight = folder.take(key, base.norms[name].shape[1])
                parts[layer, name] = Part(m_O=weight + shape.norm_offset)
    own = {}
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


def read_adalora(folder: Folder, base: Base) -> Adapter:
    """AdaLoRA: alpha / (initial rank) B diag(E) A, without the triplets that training has cut."""
    config = folder.config
    folder.only(
        "bias", "beta1", "beta2", "deltaT", "init_r", "lora_alpha", "orth_reg_weight", "r", "rank_pattern", "target_r",
        "tfinal", "tinit", "total_step",
    )  # fmt: skip
    scale = (config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"]) / (config["init_r"] + EPSILON)
    parts = {}
    for target in targets(folder, base, "lora_A"):
        name = f"{PREFIX}{target.module}"
        a_RI = folder.take(f"{name}.lora_A", None, target.site.inputs)
        e_R1 = folder.take(f"{name}.lora_E", len(a_RI), 1)
        b_OR = folder.take(f"{name}.lora_B", target.site.stop - target.site.start, len(a_RI))
        if len(a_RI):
            parts[target.place] = Part(a_RI * e_R1, scale * b_OR.T)
    return Adapter(folder.digest, parts)


def read_ia3(folder: Folder, base: Base) -> Adapter:
    """(IA)^3: scales of outputs, or of the inputs of feed-forward layers."""
    folder.only("feedforward_modules", "init_ia3_weights")
    fed = tuple(folder.config.get("feedforward_modules") or ())
    parts = {}
    for target in targets(folder, base, "ia3_l"):
        name, out = f"{PREFIX}{target.module}.ia3_l", target.site.stop - target.site.start
        if not _listed(target.module, fed):
            parts[target.place] = Part(m_O=folder.take(name, out, 1).flatten())
        elif target.site.name in ("o_proj", "down_proj"):
            parts[target.place] = Part(u_I=folder.take(name, 1, target.site.inputs).flatten())
        else:
            raise folder.refuse("feedforward_modules", "o_proj, down_proj (the others share their input)")
    return Adapter(folder.digest, parts)


def read_vera(folder: Folder, base: Base) -> Adapter:
    """VeRA: diag(b) B diag(d) A, with A and B sliced from projections that all modules share."""
    folder.only("bias", "d_initial", "init_weights", "projection_prng_key", "r", "save_projection")
    rank = folder.config["r"]
    found = list(targets(folder, base, "vera_lambda_d"))
    most = max((t.site.inputs for t in found), default=0), max((t.site.stop - t.site.start for t in found), default=0)
    a_RI, b_OR = folder.take("base_model.vera_A", rank, most[0]), folder.take("base_model.vera_B", most[1], rank)
    a_of = lru_cache(lambda size: a_RI[:, :size].contiguous())
    b_of = lru_cache(lambda size: b_OR[:size].T.contiguous())
    parts = {}
    for target in found:
        name, out = f"{PREFIX}{target.module}", target.site.stop - target.site.start
        c_R, v_O = folder.take(f"{name}.vera_lambda_d", rank), folder.take(f"{name}.vera_lambda_b", out)
        parts[target.place] = Part(a_of(target.site.inputs), b_of(out), c_R=c_R, v_O=v_O)
    return Adapter(folder.digest, parts)


def read_fourierft(folder: Folder, base: Base) -> Adapter:
    """FourierFT: a real sparse spectrum S is a sum of 2 N products of waves, scale S_n / (O I) each.

    Re ifft2(S)[o, i] = 1 / (O I) sum_n S_n (cos(2 pi u o / O) cos(2 pi v i / I) - sin(..) sin(..)).
    """
    folder.only("bias", "init_weights", "n_frequency", "random_loc_seed", "scaling")
    count, seed = folder.config["n_frequency"], folder.config["random_loc_seed"]
    parts = {}
    for target in targets(folder, base, "fourierft_spectrum"):
        out, inputs = target.site.stop - target.site.start, target.site.inputs
        spectrum_N = folder.take(f"{PREFIX}{target.module}.fourierft_spectrum", count)
        a_RI, b_RO = waves(count, seed, out, inputs)
        c_R = spectrum_N.repeat(2) * (folder.config["scaling"] / (out * inputs))
        parts[target.place] = Part(a_RI, b_RO, c_R=c_R)
    return Adapter(folder.digest, parts)


@lru_cache(maxsize=64)
def waves(count: int, seed: int, out: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The waves [2 N, I] and [2 N, O] of a spectrum's places, which a seed draws as PEFT draws them."""
    places_N = torch.randperm(out * inputs, generator=torch.Generator().manual_seed(seed))[:count]
    v_NI = phases(places_N % inputs, inputs)
    u_NO = phases(places_N // inputs, out)
    return torch.cat([v_NI.cos(), v_NI.sin()]).float(), torch.cat([u_NO.cos(), -u_NO.sin()]).float()


def phases(frequency_N: torch.Tensor, size: int) -> torch.Tensor:
    """2 pi f k / size for k below size, reduced to one turn before it is rounded."""
    turns_NK = frequency_N[:, None] * torch.arange(size)[None] % size
    return turns_NK.double() * (2 * math.pi / size)


def read_prefix(folder: Folder, base: Base) -> Adapter:
    """Prefix tuning: keys and values [V, L x 2 x H x E] in front of every layer's own."""
    shape, tokens = base.shape, folder.config["num_virtual_tokens"]
    _virtual(folder)
    flat = folder.take("prompt_embeddings", tokens, shape.layers * 2 * shape.kv_heads * shape.head_size)
    prefix = flat.view(tokens, shape.layers, 2, shape.kv_heads, shape.head_size).permute(1, 2, 0, 3, 4)
    return Adapter(folder.digest, prefix_L2VHE=prefix.contiguous())


def read_prompt(folder: Folder, base: Base) -> Adapter:
    """Prompt tuning and p-tuning: embeddings [V, D] in front of every document's own."""
    _virtual(folder)
    tokens = folder.config["num_virtual_tokens"]
    return Adapter(folder.digest, prompt_VD=folder.take("prompt_embeddings", tokens, base.shape.width))


def _virtual(folder: Folder) -> None:
    folder.only(
        "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type",
        "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "prompt_tuning_init",
        "token_dim",
    )  # fmt: skip


def read_bottleneck(folder: Folder, base: Base) -> Adapter:
    """Bottleneck adapters: h + up(f(down h)) behind the sublayers' last linear layers."""
    folder.only("activation", "kind", "placement", "size")
    config = folder.config
    if config.get("activation") not in ACTIVATIONS:
        raise folder.refuse("activation", ", ".join(ACTIVATIONS[1:]))
    ends = {"houlsby": ("o_proj", "down_proj"), "pfeiffer": ("down_proj",)}
    if config.get("placement") not in ends:
        raise folder.refuse("placement", ", ".join(ends))
    size, width, parts = config["size"], base.shape.width, {}
    for layer, site in base.linears():
        if site.name in ends[config["placement"]]:
            name = f"model.layers.{layer}.{site.module}.{site.name}"
            parts[layer, site.name + BEHIND] = Part(
                folder.take(f"{name}.down.weight", size, width),
                folder.take(f"{name}.up.weight", width, size).T,
                bias_R=folder.take(f"{name}.down.bias", size),
                beta_O=folder.take(f"{name}.up.bias", width),
                activation=config["activation"],
            )
    return Adapter(folder.digest, parts)


READERS: dict[str, Callable[[Folder, Base], Adapter]] = {
    "LORA": read_lora,
    "ADALORA": read_adalora,
    "IA3": read_ia3,
    "VERA": read_vera,
    "FOURIERFT": read_fourierft,
    "PREFIX_TUNING": read_prefix,
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_prompt,
    "BOTTLENECK": read_bottleneck,
}
