"""LoRA adapters as folders, read and written without their base: the update of each linear layer as two factors.

Shapes: R rank, I inputs, O outputs.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
MODULE_PREFIX = "base_model.model."
LoraConfigFile = dict[str, Any]
# What makes an adapter more than a sum of products, so that there is no weighted sum of two.
NOT_SUMMED = ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication")


class NotCombined(ValueError):
    """Adapters that have no combination, in one line that says why."""


@dataclass(frozen=True)
class LayerUpdate:
    """An update s B A of a linear layer."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return len(self.a_RI)

    def delta(self) -> Tensor:
        """The update [O, I] itself."""
        product_OI = self.b_OR @ self.a_RI
        return self.scale * product_OI


@dataclass(frozen=True)
class LoraFolder:
    """An adapter: its config, and what it adds to each linear layer, by the layer's name."""

    config: LoraConfigFile
    updates: dict[str, LayerUpdate] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The base that it was trained on, as its config has it."""
        base: str = self.config["base_model_name_or_path"]
        return base


def read_lora_folder(folder: Path) -> LoraFolder:
    """An adapter from its folder; raises NotCombined where it is no LoRA, or more than one."""
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise NotCombined(f"{folder}: found no {CONFIG_FILE}; allowed: folders of LoRA adapters")
    text = config_path.read_text()
    config = json.loads(text)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotCombined(f"{config_path}: found an adapter of kind {kind}; allowed: lora")
    for key in NOT_SUMMED:
        if config.get(key):
            raise NotCombined(f"{config_path}: {key}: found {config[key]!r}; allowed: nothing, as it has no sum")
    bias = config.get("bias", "none")
    if bias != "none":
        raise NotCombined(f"{config_path}: bias: found {bias!r}; allowed: none")
    weights_path = folder / WEIGHTS_FILE
    tensors = load_file(weights_path)
    updates: dict[str, LayerUpdate] = {}
    for name in sorted(tensors):
        if name.endswith(A_SUFFIX):
            layer = name.removesuffix(A_SUFFIX)
            module = layer.removeprefix(MODULE_PREFIX)
            updates[module] = read_update(config, tensors, layer, module)
        elif not name.endswith(B_SUFFIX):
            raise NotCombined(f"{weights_path}: found {name}; allowed: LoRA's factors of linear layers")
    return LoraFolder(config, updates)


def read_update(config: LoraConfigFile, tensors: dict[str, Tensor], layer: str, module: str) -> LayerUpdate:
    """The update of a linear layer, from the tensors of a file."""
    a_name = layer + A_SUFFIX
    b_name = layer + B_SUFFIX
    a_RI = tensors[a_name]
    b_OR = tensors[b_name]
    rank = len(a_RI)
    scale = scale_of(config, module, rank)
    a_RI = a_RI.float()
    b_OR = b_OR.float()
    return LayerUpdate(a_RI, b_OR, scale)


def scale_of(config: LoraConfigFile, module: str, rank: int) -> float:
    """What a layer's product is multiplied by: alpha / r, or alpha / sqrt(r) of rsLoRA."""
    alphas = config.get("alpha_pattern") or {}
    patterns = list(alphas)
    key = get_pattern_key(patterns, module)
    alpha: float = config["lora_alpha"]
    alpha = alphas.get(key, alpha)
    divisor = float(rank)
    if config.get("use_rslora"):
        divisor = math.sqrt(rank)
    return alpha / divisor


def write_lora_folder(adapter: LoraFolder, folder: Path) -> None:
    """Write an adapter whose scale is 1, with the rank of each layer; PEFT and the engine load it like any other."""
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.updates.items():
        ranks[module] = factors.rank
        layer = MODULE_PREFIX + module
        a_name = layer + A_SUFFIX
        b_name = layer + B_SUFFIX
        tensors[a_name] = factors.a_RI.contiguous()
        tensors[b_name] = factors.b_OR.contiguous()
    most = max(ranks.values())
    config = adapter.config | {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(ranks),
    }
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    weights_path = folder / WEIGHTS_FILE
    config_path = folder / CONFIG_FILE
    save_file(tensors, weights_path, metadata)
    text = json.dumps(config, indent=2)
    config_path.write_text(text)
