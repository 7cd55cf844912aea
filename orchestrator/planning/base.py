"""The base of a job before it is loaded: what was named, whether it can be trained, and what is to be known of it.

Reads the files of a folder, the headers of its weights, or the config.json of a hub id; needs no torch.
"""

from collections.abc import Iterator
from pathlib import Path

from methods.options import KINDS
from methods.options.base import check_heads
from methods.options.full import Full
from methods.parts.targets import is_named
from orchestrator.errors import InputError
from orchestrator.planning import base_folder, quantised, vocabulary
from orchestrator.planning.architecture import foreign_code, unfit
from orchestrator.planning.model import ADAPTER_CONFIG, Model, folder_of_base, locate
from runfolder.job import Base, Job

# Bases known to let the documents of a packed row see each other; trainer/document_leak.py finds others.
_SEE_EACH_OTHER = {"bloom", "falcon", "mamba", "mpt", "opt"}
_UNQUANTISED = "take the unquantised base, and method qlora"


def find_model(job: Job) -> Model:
    """The base of a job; raises InputError when it could not be loaded."""
    return find_base(job.base)


def find_base(base: Base, by_config: bool = False) -> Model:
    """A base in its folder, the cache, or on the hub; raises InputError when it could not be loaded.

    `by_config`: a folder with config.json and no weights does, as for a plan.
    """
    folder = folder_of_base(base)
    if folder is not None and not (folder / "config.json").exists():
        reason = base_folder.without_config(folder)
        raise InputError(f"base.model: {folder}: {reason}")
    model = locate(base)
    if model is None:
        model = _on_hub(base)
    problem = _unusable(base, model, by_config)
    if problem is not None:
        where = model.folder or base.model
        raise InputError(f"base.model: {where}: {problem}")
    if base.resize_embeddings:
        return vocabulary.resized(model)
    return model


def _on_hub(base: Base) -> Model:
    """The shapes of a base that is nowhere here."""
    from orchestrator.planning.hub import fetch_config  # what speaks HTTP is imported by who needs it

    config = fetch_config(base)
    return Model(config, None, base.init == "scratch")


def _unusable(base: Base, model: Model, by_config: bool) -> str | None:
    """Why a base cannot be loaded and trained; None where it can."""
    problem = unfit(model.config) or foreign_code(model.config)
    if problem is None and not model.scratch:
        problem = _quantised(model)
    folder = Path(base.model)
    if by_config and base_folder.has_config_alone(folder):
        return problem
    if problem is None and folder.is_dir():  # a cached snapshot is completed by the trainer
        problem = base_folder.lacks(model, folder)
    return problem


def misfits(job: Job, model: Model) -> list[str]:
    """What the job asks for and the base does not have."""
    problems = []
    kind = model.config["model_type"]
    if job.data.packing and kind in _SEE_EACH_OTHER:
        problems.append(f"data.packing: documents in a row see each other in a base of type {kind}; allowed: false")
    if model.in_4_bits:
        problems += _in_4_bits(job, model)
    if not job.method.makes_model and _holds_adapter(model):
        beside = f"it holds an adapter too ({ADAPTER_CONFIG})"
        consequence = "which whoever loads the base for this run's adapter would get with it"
        problems.append(f"base.model: {model.folder}: {beside}, {consequence}; move that away")
    problems += _new_tokens(job, model)
    problems += _refused_by_method(job, model)
    problems += _unshared_heads(job, model)
    return problems


def _unshared_heads(job: Job, model: Model) -> Iterator[str]:
    """Why the workers of the job cannot share rows on the base."""
    config = model.config.get("text_config", model.config)
    try:
        check_heads(config, job.sharding.sequence)
    except ValueError as error:
        yield str(error)


def _refused_by_method(job: Job, model: Model) -> Iterator[str]:
    """Why the method cannot work on the base: on its config, or on its weights where they are known."""
    try:
        job.method.check(model.config, job.data.seq_len)
    except ValueError as error:
        yield str(error)
    if not model.shapes:
        return
    try:
        job.method.trained_parameters(model.linears, model.other_shapes)
    except ValueError as error:
        yield f"method: {error}"


def _holds_adapter(model: Model) -> bool:
    """Whether an adapter lies in the folder of the base."""
    if model.folder is None:
        return False
    return (model.folder / ADAPTER_CONFIG).exists()


def base_warnings(job: Job, model: Model) -> list[str]:
    """What is no reason to stop, but should be known of a base."""
    texts = []
    kind = model.config["model_type"]
    where = model.folder or job.base.model
    if "auto_map" in model.config:
        texts.append(f"its own code (auto_map) is not run; transformers' own {kind} is")
    if _holds_adapter(model):
        texts.append(f"it holds an adapter too ({ADAPTER_CONFIG}), which is left out")
    if model.folder == Path(job.base.model) and not model.scratch and not model.tensors:
        texts.append("no weights lie there: planned by config.json alone, and a run needs them")
    if model.unread:
        texts.append(_about_unread(model.unread))
    new = vocabulary.tokens_without_embedding(model)
    if new:
        first = next(iter(new.items()))
        token, id_ = first
        number = len(new)
        rows = f"the base has {model.embeddings} embeddings, its tokenizer {number} tokens beyond them"
        texts.append(f"{rows}, like {token!r} (id {id_}); base.resize_embeddings adds them")
    return [f"base.model: {where}: {text}" for text in texts]


def _about_unread(unread: set[str]) -> str:
    """That weights are left out: the first of them by name, and how many more there are."""
    names = min(unread)
    if len(unread) > 1:
        more = len(unread) - 1
        names = f"{names}, and {more} more"
    return f"weights of layers that config.json does not have are left out: {names}"


def _quantised(model: Model) -> str | None:
    """Why a base that is quantised already cannot be trained on; None for 4 bits by bitsandbytes."""
    method = quantised.method(model.config)
    if method is None:
        return None
    if method == quantised.FOUR_BITS:
        settings = model.config.get("quantization_config") or {}
        storage = str(settings.get("bnb_4bit_quant_storage", "uint8"))
        if storage.removeprefix("torch.") == "uint8":
            return _not_packed(model)
        method = f"{method}, stored as {storage}"
    return f"it is quantised already ({method}); {_UNQUANTISED}"


def _not_packed(model: Model) -> str | None:
    """What to do about a config.json that speaks of 4 bits beside weights that are not; None where they are."""
    if not model.tensors or quantised.are_packed(model.tensors):
        return None
    return "config.json says that it is in 4 bits (quantization_config), and its weights are not: take that out"


def _in_4_bits(job: Job, model: Model) -> list[str]:
    """What the job asks for and a base in 4 bits cannot do."""
    problems = []
    if not job.method.on_4_bits:
        allowed = f"allowed: the unquantised base, or one of {_kinds_on_4_bits()}"
        kind = job.method.kind
        problems.append(f"method.kind: found {kind}, and the base is in 4 bits already; {allowed}")
    try:
        job.method.check_in_4_bits(model.config["quantization_config"])
    except ValueError as error:
        problems.append(f"{error}, as the base is in 4 bits already")
    if job.output.merge:
        problems.append(f"output.merge: the base is in 4 bits already, which hold no merged weights; {_UNQUANTISED}")
    return problems


def _kinds_on_4_bits() -> str:
    """The kinds of methods that train on a base in 4 bits."""
    kinds = []
    for kind, options in KINDS.items():
        if options.on_4_bits:
            kinds.append(kind)
    return ", ".join(kinds)


def _new_tokens(job: Job, model: Model) -> list[str]:
    """Why the embeddings of new tokens would not be trained as the job wants it."""
    longer = _longer_weights(model)
    frozen = _frozen_weight(job, longer)
    if frozen is not None:
        return [f"method.freeze: {frozen} would be frozen with its new rows, which base.resize_embeddings adds"]
    pattern = _targeting_pattern(job, longer)
    if pattern is not None:
        reason = "base.resize_embeddings trains its new rows, and an adapter on it cannot"
        return [f"method.target: found {pattern!r}; {reason}; allowed: a target without it"]
    return []


def _longer_weights(model: Model) -> list[str]:
    """The weights that get new rows."""
    longer = []
    for name, shape in model.shapes.items():
        if shape != model.base_shapes[name]:
            longer.append(name)
    return longer


def _frozen_weight(job: Job, weights: list[str]) -> str | None:
    """The first of these weights that the method freezes."""
    if not isinstance(job.method, Full):
        return None
    for name in weights:
        if job.method.freezes(name):
            return name
    return None


def _targeting_pattern(job: Job, weights: list[str]) -> str | None:
    """The first pattern among the method's targets that names one of these weights."""
    targets = getattr(job.method, "target", "all-linear")
    if job.method.makes_model or targets == "all-linear":
        return None
    modules = []
    for name in weights:
        modules.append(name.removesuffix(".weight"))
    for pattern in targets:
        for module in modules:
            if is_named(module, pattern):
                return str(pattern)
    return None
