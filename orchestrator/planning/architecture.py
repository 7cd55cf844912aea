"""Whether a model of some config.json writes text from left to right, with code that transformers has."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_ALLOWED_MODELS = "allowed: a ...ForCausalLM model"
# Attention that sees the whole text at once, unless config.json says is_decoder.
_ENCODERS = {
    *("albert", "bert", "bert-generation", "big_bird", "camembert", "convbert", "data2vec-text", "deberta"),
    *("deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "flaubert", "funnel", "ibert", "layoutlm"),
    *("longformer", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nomic_bert", "nystromformer"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod", "yoso"),
}
_ENCODER_DECODERS = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "fsmt", "led", "longt5"),
    *("m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet"),
    *("switch_transformers", "t5", "t5gemma", "udop", "umt5"),
}
# Parts of config.json that a model has which reads more than text.
_SENSES = ("vision_config", "audio_config", "image_config", "video_config", "vision_tower_config", "mm_vision_tower")


def unfit(config: Mapping[str, Any]) -> str | None:
    """Why a model of this config.json does not write text from left to right; None where it does."""
    kind = config.get("model_type")
    names = config.get("architectures") or []
    if not isinstance(kind, str):
        return "config.json has no model_type"
    if not isinstance(names, list):
        return f"config.json has architectures {names!r}; allowed: a list of names"
    names = list(map(str, names))
    found = ", ".join(names) or f"a model of type {kind}"
    is_causal = any(map(_CAUSAL.search, names))
    senses = list(filter(config.get, _SENSES))
    if senses:
        keys = ", ".join(senses)
        return f"found {found}, which reads more than text ({keys}); {_ALLOWED_MODELS} that reads text alone"
    known_with_decoder = kind in _ENCODER_DECODERS and not is_causal
    if known_with_decoder or config.get("is_encoder_decoder"):
        return f"found {found}, an encoder with a decoder; {_ALLOWED_MODELS}"
    if kind in _ENCODERS and not config.get("is_decoder"):
        return f"found {found}, an encoder: every token sees the whole text; {_ALLOWED_MODELS}"
    if names and not is_causal:
        return f"found {found}; {_ALLOWED_MODELS}"
    return None


def foreign_code(config: Mapping[str, Any]) -> str | None:
    """Why a base with code of its own cannot be loaded; None where there is none, or transformers has its own."""
    if "auto_map" not in config:
        return None
    kind = str(config["model_type"])
    # Looked for by name, as transformers imports torch where there is one.
    installed = importlib.util.find_spec("transformers")
    if installed is None or installed.origin is None:
        return None
    package = Path(installed.origin).parent
    module = kind.replace("-", "_")
    if (package / "models" / module).is_dir():
        return None
    found = f"found code of its own (auto_map in config.json), which is never run, and transformers has no {kind}"
    return f"{found}; allowed: a base that transformers has the code of"
