"""Adapters from exported folders: one reader for each file format, chosen by what the config says.

The readers need neither PEFT nor the trainer. Formulas are those of the methods' modules in `methods/`.
Shapes: R rank, I inputs, O outputs, V virtual tokens, D width.
"""

import math
from collections.abc import Callable
from pathlib import Path

from serving.adapter import ACTIVATION_NAMES, Adapter, Part
from serving.base import BEHIND, FrozenBase
from serving.error import AdapterRefused
from serving.folder import Folder, adapter_digest
from serving.fourier import read_fourierft
from serving.lora import read_lora
from serving.target import listed, module_name, targets
from serving.vera import read_vera
from serving.whole import is_whole_model, read_whole, whole_digest

LIMIT = 8 * 2**30  # bytes of an adapter's weights
EPSILON = 1e-5  # what PEFT adds to AdaLoRA's number of ranks
PLACEMENTS = {"houlsby": ("o_proj", "down_proj"), "pfeiffer": ("down_proj",)}  # the layers that have a bottleneck
UNSHARED = ("o_proj", "down_proj")  # linear layers that share their input with no other


def read_adapter(path: Path | str, base: FrozenBase, limit: int = LIMIT) -> Adapter:
    """The adapter of a folder, for a base; raises AdapterRefused with the file and what is allowed instead.

    A whole model of the base's shape is one, too: its difference to the base.
    """
    if is_whole_model(Path(path)):
        return read_whole(Path(path), base, limit)
    folder = Folder.read(Path(path), limit)
    return adapter_in(folder, base)


def adapter_in(folder: Folder, base: FrozenBase) -> Adapter:
    """The adapter that a folder's config describes; raises AdapterRefused."""
    config = folder.config
    named = config.get("peft_type") or config.get("kind")
    name = str(named)
    kind = name.upper()
    if kind not in READERS:
        known = ", ".join(READERS)
        found = f"{folder.config_path}: found an adapter of kind {name.lower()}"
        raise AdapterRefused(f"{found}; allowed: {known.lower()}")
    reader = READERS[kind]
    adapter = reader(folder, base)
    folder.finish()
    return adapter


def digest_in_folder(path: Path) -> str:
    """The digest that the adapter or model in a folder is known by; raises AdapterRefused where there is none."""
    if is_whole_model(path):
        return whole_digest(path)
    return adapter_digest(path)


def read_adalora(folder: Folder, base: FrozenBase) -> Adapter:
    """AdaLoRA: alpha / (initial rank) B diag(E) A, without the triplets that training has cut."""
    config = folder.config
    folder.only(
        "bias",
        "beta1",
        "beta2",
        "deltaT",
        "init_r",
        "lora_alpha",
        "orth_reg_weight",
        "r",
        "rank_pattern",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
    )
    initial_rank = config["init_r"]
    alpha = config["lora_alpha"]
    if alpha <= 0:
        alpha = initial_rank
    scale = alpha / (initial_rank + EPSILON)
    parts = {}
    for target in targets(folder, base, "lora_A"):
        name = target.name
        a_RI = folder.take(f"{name}.lora_A", None, target.inputs)
        rank = len(a_RI)
        e_R1 = folder.take(f"{name}.lora_E", rank, 1)
        b_OR = folder.take(f"{name}.lora_B", target.outputs, rank)
        if rank > 0:
            scaled_RI = a_RI * e_R1
            scaled_RO = scale * b_OR.T
            parts[target.place] = Part(scaled_RI, scaled_RO)
    return Adapter(folder.digest, parts)


def read_ia3(folder: Folder, base: FrozenBase) -> Adapter:
    """(IA)^3: scales of outputs, or of the inputs of feed-forward layers."""
    folder.only("feedforward_modules", "init_ia3_weights")
    modules = folder.config.get("feedforward_modules") or ()
    feedforward = tuple(modules)
    parts = {}
    for target in targets(folder, base, "ia3_l"):
        name = f"{target.name}.ia3_l"
        place = target.place
        if not listed(target.module, feedforward):
            m_O1 = folder.take(name, target.outputs, 1)
            parts[place] = Part(m_O=m_O1.flatten())
        elif target.linear_layer.name in UNSHARED:
            u_1I = folder.take(name, 1, target.inputs)
            parts[place] = Part(u_I=u_1I.flatten())
        else:
            raise folder.refuse("feedforward_modules", "o_proj, down_proj (the others share their input)")
    return Adapter(folder.digest, parts)


def read_prefix(folder: Folder, base: FrozenBase) -> Adapter:
    """Prefix tuning: keys and values [V, L x 2 x H x E] in front of every layer's own."""
    shape = base.shape
    tokens = folder.config["num_virtual_tokens"]
    _check_virtual(folder)
    size_L2HE = (shape.layers, 2, shape.kv_heads, shape.head_size)
    numbers = math.prod(size_L2HE)
    flat = folder.take("prompt_embeddings", tokens, numbers)
    prefix_VL2HE = flat.view(tokens, *size_L2HE)
    prefix_L2VHE = prefix_VL2HE.permute(1, 2, 0, 3, 4)
    return Adapter(folder.digest, prefix_L2VHE=prefix_L2VHE.contiguous())


def read_prompt(folder: Folder, base: FrozenBase) -> Adapter:
    """Prompt tuning and p-tuning: embeddings [V, D] in front of every document's own."""
    _check_virtual(folder)
    tokens = folder.config["num_virtual_tokens"]
    prompt_VD = folder.take("prompt_embeddings", tokens, base.shape.width)
    return Adapter(folder.digest, prompt_VD=prompt_VD)


def _check_virtual(folder: Folder) -> None:
    """Raise AdapterRefused where a config of virtual tokens has keys that are not known."""
    folder.only(
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "prompt_tuning_init",
        "token_dim",
    )


def read_bottleneck(folder: Folder, base: FrozenBase) -> Adapter:
    """Bottleneck adapters: h + up(f(down h)) behind the sublayers' last linear layers."""
    folder.only("activation", "kind", "placement", "size")
    config = folder.config
    width = base.shape.width
    activation = config.get("activation")
    if activation not in ACTIVATION_NAMES:
        functions = ", ".join(ACTIVATION_NAMES[1:])
        raise folder.refuse("activation", functions)
    placement = config.get("placement")
    if placement not in PLACEMENTS:
        placements = ", ".join(PLACEMENTS)
        raise folder.refuse("placement", placements)
    adapted = PLACEMENTS[placement]
    parts = {}
    for layer, linear_layer in base.linears():
        if linear_layer.name not in adapted:
            continue
        name = module_name(layer, linear_layer)
        name_behind = linear_layer.name + BEHIND
        place = (layer, name_behind)
        parts[place] = bottleneck(folder, name, width)
    return Adapter(folder.digest, parts)


def bottleneck(folder: Folder, name: str, width: int) -> Part:
    """One bottleneck, behind the linear layer of this name."""
    config = folder.config
    size = config["size"]
    down_RD = folder.take(f"{name}.down.weight", size, width)
    up_DR = folder.take(f"{name}.up.weight", width, size)
    return Part(
        a_RI=down_RD,
        b_RO=up_DR.T,
        bias_R=folder.take(f"{name}.down.bias", size),
        beta_O=folder.take(f"{name}.up.bias", width),
        activation=config["activation"],
    )


Reader = Callable[[Folder, FrozenBase], Adapter]
READERS: dict[str, Reader] = {
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
