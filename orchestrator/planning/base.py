"""The base of a job before it is loaded: what was named, whether it can be trained, and what is to be known of it.

Reads the files of a folder, the headers of its weights, or the config.json of a hub id; needs no torch.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from methods.options import KINDS
from methods.options.full import Full
from methods.parts.targets import is_named
from orchestrator.errors import InputError
from orchestrator.planning import base_folder, quantised, vocabulary
from orchestrator.planning.model import ADAPTER, Model, folder_of, locate
from runfolder.job import Base, Job

_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_ALLOWED = "allowed: a ...ForCausalLM model"
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
# Bases known to let the documents of a packed row see each other; the trainer finds others (see trainer/apart.py).
_SEE_EACH_OTHER = {"bloom", "falcon", "mamba", "mpt", "opt"}
_UNQUANTISED = "take the unquantised base, and method qlora"


def find_model(job: Job) -> Model:
    """The base, in its folder, the cache, or on the hub; raises InputError when it could not be loaded."""
    folder = folder_of(job.base)
    if folder is not None and not (folder / "config.json").exists():
        raise InputError(f"base.model: {folder}: {base_folder.without_config(folder)}")
    model = locate(job.base) or _on_hub(job.base)
    where = model.folder or job.base.model
    problem = unfit(model.config) or _foreign_code(model.config)
    if problem is None and not model.scratch:
        problem = _quantised(model)
    if problem is None and Path(job.base.model).is_dir():  # a cached snapshot is completed by the trainer
        problem = base_folder.lacks(model, Path(job.base.model))
    if problem is not None:
        raise InputError(f"base.model: {where}: {problem}")
    return vocabulary.resized(model) if job.base.resize_embeddings else model


def _on_hub(base: Base) -> Model:
    """The shapes of a base that is nowhere here."""
    from orchestrator.planning.hub import fetch_config  # what speaks HTTP is imported by who needs it

    return Model(fetch_config(base), None, base.init == "scratch")


def misfits(job: Job, model: Model) -> list[str]:
    """What the job asks for and the base does not have."""
    problems = []
    kind = model.config["model_type"]
    if job.data.packing and kind in _SEE_EACH_OTHER:
        problems.append(f"data.packing: documents in a row see each other in a base of type {kind}; allowed: false")
    if model.in_4_bits:
        problems += _in_4_bits(job, model)
    if not job.method.makes_model and model.folder is not None and (model.folder / ADAPTER).exists():
        beside = f"it holds an adapter too ({ADAPTER}), which whoever loads the base for this run's adapter would get"
        problems.append(f"base.model: {model.folder}: {beside} with it; move that away")
    problems += _new_tokens(job, model)
    try:
        job.method.check(model.config, job.data.seq_len)
    except ValueError as error:
        problems.append(str(error))
    if model.shapes:
        try:
            job.method.trained(model.linears, model.others)
        except ValueError as error:
            problems.append(f"method: {error}")
    return problems


def warnings(job: Job, model: Model) -> list[str]:
    """What is no reason to stop, but should be known of a base."""
    found = []
    kind, where = model.config["model_type"], model.folder or job.base.model
    if "auto_map" in model.config:
        found.append(f"base.model: {where}: its own code (auto_map) is not run; transformers' own {kind} is")
    if model.folder is not None and (model.folder / ADAPTER).exists():
        found.append(f"base.model: {where}: it holds an adapter too ({ADAPTER}), which is left out")
    if model.unread:
        more = (
            f"{min(model.unread)}, and {len(model.unread) - 1} more" if len(model.unread) > 1 else min(model.unread)
        )
        found.append(f"base.model: {where}: weights of layers that config.json does not have are left out: {more}")
    new = vocabulary.outside(model)
    if new:
        token, id_ = next(iter(new.items()))
        rows = f"the base has {model.embeddings} embeddings, its tokenizer {len(new)} tokens beyond them"
        found.append(f"base.model: {where}: {rows}, like {token!r} (id {id_}); base.resize_embeddings adds them")
    return found


def unfit(config: Mapping[str, Any]) -> str | None:
    """Why a model of this config.json does not write text from left to right; None where it does."""
    kind, names = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str):
        return "config.json has no model_type"
    if not isinstance(names, list):
        return f"config.json has architectures {names!r}; allowed: a list of names"
    found = ", ".join(map(str, names)) or f"a model of type {kind}"
    causal = any(_CAUSAL.search(str(name)) for name in names)
    senses = [key for key in _SENSES if config.get(key)]
    if senses:
        return f"found {found}, which reads more than text ({', '.join(senses)}); {_ALLOWED} that reads text alone"
    if config.get("is_encoder_decoder") or (kind in _ENCODER_DECODERS and not causal):
        return f"found {found}, an encoder with a decoder; {_ALLOWED}"
    if kind in _ENCODERS and not config.get("is_decoder"):
        return f"found {found}, an encoder: every token sees the whole text; {_ALLOWED}"
    return None if causal or not names else f"found {found}; {_ALLOWED}"


def _foreign_code(config: Mapping[str, Any]) -> str | None:
    """Why a base with code of its own cannot be loaded; None where there is none, or transformers has its own."""
    kind = str(config["model_type"])
    installed = importlib.util.find_spec("transformers")
    if "auto_map" not in config or installed is None or installed.origin is None:
        return None
    # Looked for by name, as transformers imports torch where there is one.
    if (Path(installed.origin).parent / "models" / kind.replace("-", "_")).is_dir():
        return None
    return (
        f"found code of its own (auto_map in config.json), which is never run, and transformers has no {kind}; "
        "allowed: a base that transformers has the code of"
    )


def _quantised(model: Model) -> str | None:
    """Why a base that is quantised already cannot be trained on; None for 4 bits by bitsandbytes."""
    found = quantised.method(model.config)
    if found is None:
        return None
    if found == quantised.FOUR_BITS:
        storage = str((model.config.get("quantization_config") or {}).get("bnb_4bit_quant_storage", "uint8"))
        if storage.removeprefix("torch.") == "uint8":
            return _not_packed(model)
        found = f"{found}, stored as {storage}"
    return f"it is quantised already ({found}); {_UNQUANTISED}"


def _not_packed(model: Model) -> str | None:
    """What to do about a config.json that speaks of 4 bits beside weights that are not; None where they are."""
    if not model.tensors or quantised.are_packed(model.tensors):
        return None
    return "config.json says that it is in 4 bits (quantization_config), and its weights are not: take that out"


def _in_4_bits(job: Job, model: Model) -> list[str]:
    """What the job asks for and a base in 4 bits cannot do."""
    problems = []
    if not job.method.on_4_bits:
        kinds = ", ".join(kind for kind, options in KINDS.items() if options.on_4_bits)
        allowed = f"allowed: the unquantised base, or one of {kinds}"
        problems.append(f"method.kind: found {job.method.kind}, and the base is in 4 bits already; {allowed}")
    try:
        job.method.check_in_4_bits(model.config["quantization_config"])
    except ValueError as error:
        problems.append(f"{error}, as the base is in 4 bits already")
    if job.output.merge:
        problems.append(f"output.merge: the base is in 4 bits already, which hold no merged weights; {_UNQUANTISED}")
    return problems


def _new_tokens(job: Job, model: Model) -> list[str]:
    """Why the embeddings of new tokens would not be trained as the job wants it."""
    longer = [name for name, shape in model.shapes.items() if shape != model.own_shapes[name]]
    method = job.method
    frozen = [name for name in longer if isinstance(method, Full) and method.freezes(name)]
    if frozen:
        return [f"method.freeze: {frozen[0]} would be frozen with its new rows, which base.resize_embeddings adds"]
    targets = getattr(method, "target", "all-linear")
    for pattern in () if method.makes_model or targets == "all-linear" else targets:
        if any(is_named(name.removesuffix(".weight"), pattern) for name in longer):
            reason = "base.resize_embeddings trains its new rows, and an adapter on it cannot"
            return [f"method.target: found {pattern!r}; {reason}; allowed: a target without it"]
    return []
