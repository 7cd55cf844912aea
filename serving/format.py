"""Adapters from exported folders: one reader for each file format, chosen by what the config says.

The readers need neither PEFT nor the trainer. Formulas are those of the methods' modules in `methods/`.
Shapes: R rank, I inputs, O outputs, V virtual tokens, D width.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from serving.adapter import ACTIVATIONS, Adapter, Part
from serving.base import BEHIND, Base
from serving.error import AdapterRefused
from serving.folder import Folder
from serving.fourier import read_fourierft
from serving.lora import read_lora
from serving.target import PREFIX, listed, targets

LIMIT = 8 * 2**30  # bytes of an adapter's weights
EPSILON = 1e-5  # what PEFT adds to AdaLoRA's number of ranks


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


def read_adalora(folder: Folder, base: Base) -> Adapter:
    """AdaLoRA: alpha / (initial rank) B diag(E) A, without the triplets that training has cut."""
    config = folder.config
    folder.only(
        "bias", "beta1", "beta2", "deltaT", "init_r", "lora_alpha", "orth_reg_weight", "r", "rank_pattern",
        "target_r", "tfinal", "tinit", "total_step",
    )  # fmt: skip
    scale = (config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"]) / (config["init_r"] + EPSILON)
    parts = {}
    for target in targets(folder, base, "lora_A"):
        name = f"{PREFIX}{target.module}"
        a_RI = folder.take(f"{name}.lora_A", None, target.site.inputs)
        e_R1 = folder.take(f"{name}.lora_E", len(a_RI), 1)
        b_OR = folder.take(f"{name}.lora_B", target.out, len(a_RI))
        if len(a_RI):
            parts[target.place] = Part(a_RI * e_R1, scale * b_OR.T)
    return Adapter(folder.digest, parts)


def read_ia3(folder: Folder, base: Base) -> Adapter:
    """(IA)^3: scales of outputs, or of the inputs of feed-forward layers."""
    folder.only("feedforward_modules", "init_ia3_weights")
    fed = tuple(folder.config.get("feedforward_modules") or ())
    parts = {}
    for target in targets(folder, base, "ia3_l"):
        name, out = f"{PREFIX}{target.module}.ia3_l", target.out
        if not listed(target.module, fed):
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
    most = max((t.site.inputs for t in found), default=0), max((t.out for t in found), default=0)
    a_RI, b_OR = folder.take("base_model.vera_A", rank, most[0]), folder.take("base_model.vera_B", most[1], rank)
    a_of = lru_cache(lambda size: a_RI[:, :size].contiguous())
    b_of = lru_cache(lambda size: b_OR[:size].T.contiguous())
    parts = {}
    for target in found:
        name, out = f"{PREFIX}{target.module}", target.out
        c_R, v_O = folder.take(f"{name}.vera_lambda_d", rank), folder.take(f"{name}.vera_lambda_b", out)
        parts[target.place] = Part(a_of(target.site.inputs), b_of(out), c_R=c_R, v_O=v_O)
    return Adapter(folder.digest, parts)


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
