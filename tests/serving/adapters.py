"""Exported adapters of every kind for one tiny random base, with weights that change what it says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llamas import random_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods.base import Setup
from methods.options import KINDS
from methods.options.lora_family import LowRankOptions
from methods.registry import create

WIDE = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "high rank": {"kind": "lora", "rank": 24, "target": ["q_proj", "down_proj"]},
    "wide": {"kind": "lora", "rank": 72, "target": ["down_proj"]},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa"},
    "rslora": {"kind": "rslora", "rank": 8},
    "dora": {"kind": "dora", "rank": 4},
    "adalora": {"kind": "adalora", "rank": 2, "initial_rank": 4},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 16},
    "fourierft": {"kind": "fourierft", "frequencies": 12},
    "prefix": {"kind": "prefix", "tokens": 5, "init_text": None},
    "prompt": {"kind": "prompt", "tokens": 6, "init_text": None},
    "ptuning": {"kind": "ptuning", "tokens": 3, "init_text": None},
    "bottleneck": {"kind": "bottleneck", "size": 6},
    "houlsby": {"kind": "bottleneck", "size": 6, "placement": "houlsby", "activation": "gelu"},
    "longlora": {"kind": "longlora", "rank": 4},
}
# A method of the project that leaves an adapter of a base in 16 bits and is not above is here with few options.
LISTED = {description["kind"] for description in ADAPTERS.values()}
for kind, options in KINDS.items():
    leaves_adapter = not options.makes_model and not options(kind=kind).quantises
    if leaves_adapter and options.implementation.startswith("methods.") and kind not in LISTED:
        small = {"rank": 4} if issubclass(options, LowRankOptions) else {}
        ADAPTERS[kind] = {"kind": kind, **small}


@dataclass(frozen=True)
class Exported:
    """An adapter's folder, and the method that loads it on a base as its users do."""

    folder: Path
    method: Any

    def alone(self, base: Path) -> nn.Module:
        """A plain model with this adapter, without our engine."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder) if (self.folder / "config.json").exists() else None
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, config=config)
        return self.method.load(model, self.folder).eval()  # type: ignore[no-any-return]


def loaded(base: Path) -> PreTrainedModel:
    """A base in memory, on the CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    return model.eval()


def make_base(folder: Path, **config: Any) -> Path:
    """A folder with a random Llama of two layers, width 64, fp32."""
    random_llama(**WIDE | config).save_pretrained(folder)
    return folder


def export(base: Path, name: str, folder: Path, seed: int = 1) -> Exported:
    """An adapter as a run leaves it, with random weights instead of trained ones."""
    description = ADAPTERS[name]
    options = KINDS[description["kind"]].model_validate(description)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    method = create(options, Setup(10, seq_len=512 if options.kind == "longlora" else 64))
    if options.kind == "longlora":
        method.load_options(model.config)
    tuned = method.attach(model)
    weights = {name: disturbed(name, p) for name, p in tuned.named_parameters() if p.requires_grad}
    method.export(tuned, weights, folder)
    return Exported(folder, method)


def disturbed(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """A trained weight's start with noise, large enough to change logits and small enough to keep them sane."""
    size = 1.0 if "spectrum" in name else 0.3 if parameter.dim() == 1 else 0.1
    if "vera_lambda" in name or "lora_E" in name:
        size = 0.5
    return parameter.detach() + size * torch.randn_like(parameter)
