"""Loading the base: a model with the dtype that the method and the precision want."""

from functools import wraps
from typing import Any

import torch
from torch import nn

from methods.base import Method
from methods.parts import quantised
from runfolder.job import Base, Job
from trainer.data.tokenizer import load_tokenizer
from trainer.embeddings import add_missing, vocabulary
from trainer.objectives.base import Objective
from trainer.objectives.score_head import SCORE_WEIGHT
from trainer.zero.engine import partitioned_loading

WRITING, SCORING = "AutoModelForCausalLM", "AutoModelForSequenceClassification"  # classes of transformers
_NOWHERE = "no-adapter"


def forward_dtype(job: Job, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: bf16 on a GPU and fp32 elsewhere, unless the job says otherwise."""
    name = job.train.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return dtypes[name]


def load_config(base: Base) -> Any:
    """The base's config; raises ValueError where it needs code of its own."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(**_source(base))
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"base.model: {base.model}: it needs code of its own, which is never run") from None
    if base.init == "scratch" and hasattr(config, "quantization_config"):
        del config.quantization_config  # random weights are not quantised
    return config


def load_pretrained(base: Base, dtype: torch.dtype, config: Any = None, scores: bool = False, **options: Any) -> Any:
    """The base with its weights: safetensors alone, and neither code of its own nor an adapter from beside them.

    Where the job says so, it has an embedding for every id of its tokenizer. One that is in 4 bits already computes
    in `dtype`, as others do. Where it `scores`, it has a new head for that. `options` are those of `from_pretrained`.
    Raises ValueError where it has not all the weights of its config.
    """
    import transformers

    class_name = WRITING
    new = set()
    if scores:
        class_name = SCORING
        new.add(SCORE_WEIGHT)
    kind = getattr(transformers, class_name)
    config = config or load_config(base)
    in_4_bits = hasattr(config, "quantization_config")
    if in_4_bits:
        config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    model, loading = kind.from_pretrained(
        **_source(base),
        config=config,
        dtype=dtype,
        use_safetensors=True,
        # transformers puts an adapter on the base where it finds one; it is sent to look in a folder of no base.
        adapter_kwargs={"subfolder": _NOWHERE},
        output_loading_info=True,
        **options,
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise RuntimeError(f"base.model: {base.model}: this transformers has loaded an adapter with it")
    _check_weights(base, loading, new)
    if in_4_bits:
        quantised.cast_others(model, dtype)
    if base.resize_embeddings:
        add_missing(model, load_tokenizer(base))
    return model


def _check_weights(base: Base, loading: dict[str, Any], new: set[str]) -> None:
    """Raise ValueError where the base lacks weights of its config, by transformers' info; print what it left out."""
    missing = set(loading["missing_keys"])
    lacking = sorted(missing - new)
    if lacking:
        names = ", ".join(lacking[:3])
        count = len(lacking)
        raise ValueError(f"base.model: {base.model}: its weights lack {names} ({count} in all)")
    left_out = sorted(loading["unexpected_keys"])
    if left_out:
        names = ", ".join(left_out)
        print(f"left out of the base's weights: {names}", flush=True)


def load_model(
    job: Job, method: Method[Any], dtype: torch.dtype, device: torch.device, objective: Objective | None = None
) -> nn.Module:
    """The base with the method attached; trained weights are fp32 (without masters bf16), frozen ones `dtype`.

    An objective may have the base changed before that.

    At ZeRO 3 a pretrained base is never whole on a device. One from scratch is: it has no weights to read in parts.
    One in 4 bits is: it cannot be partitioned.
    """
    base = job.base
    settings = job.train
    in_fp32 = job.method.makes_model and settings.master_weights
    weights = torch.float32 if in_fp32 else dtype
    options = _load_options(job, method, weights)
    config = options["config"]
    in_4_bits = hasattr(config, "quantization_config")
    known = vocabulary(config)
    quantised_as_loaded = "quantization_config" in options
    whole = in_4_bits or quantised_as_loaded
    partitioned = base.init == "pretrained" and not whole
    stage = job.sharding.zero if partitioned else 0
    with partitioned_loading(stage, weights):
        torch.manual_seed(settings.seed)
        model = _load_base(job, options, device)
        if whole:
            quantised.disable_cpu_repacking(model)
        _autocast_forward(model, dtype, device)
        model.config.use_cache = False
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(settings.seed)
        # On the device at once, as at ZeRO 3: what `attach` computes from the base is fast and the same there.
        resized = vocabulary(model.config)
        method.new_tokens = range(known, resized)
        if objective:
            objective.prepare(model)
        on_device = model.to(device)
        tuned = method.attach(on_device)
        if objective:
            objective.take(tuned)
        if in_4_bits:
            quantised.register_as_buffers(tuned)
        return tuned.train().to(device)  # transformers loads for evaluation


def _autocast_forward(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Make a model's forward pass run in `dtype`; from inside, as DeepSpeed switches an autocast around it off."""
    if dtype == torch.float32:
        return
    forward = model.forward
    kind = "cpu" if device.type == "meta" else device.type  # a dry run's weights are nowhere, its passes on a CPU

    @wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype):
            return forward(*args, **kwargs)

    model.forward = autocast


def _load_options(job: Job, method: Method[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` or `from_config`: a config without dropout, and the method's own."""
    config = load_config(job.base)
    config.dtype = dtype
    values = config.to_dict()
    for name, value in values.items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # its masks would depend on the layout; a method's own dropout is asked for
    options = method.load_options(config)
    if hasattr(config, "quantization_config"):
        options.pop("quantization_config", None)  # it is in 4 bits already
    return {"config": config, "dtype": dtype, **options}


def _load_base(job: Job, options: dict[str, Any], device: torch.device) -> Any:
    """The base without the method, with embeddings for all ids of its tokenizer where the job asks for them."""
    from transformers import AutoModelForCausalLM

    if job.base.init == "pretrained":
        return load_pretrained(job.base, **options)
    with device:
        model = AutoModelForCausalLM.from_config(**options, trust_remote_code=False)
    if job.base.resize_embeddings:
        add_missing(model, load_tokenizer(job.base))
    return model


def _source(base: Base) -> dict[str, Any]:
    """Where transformers finds a base, whose own code is never run."""
    return {
        "pretrained_model_name_or_path": base.model,
        "revision": base.revision or "main",
        "trust_remote_code": False,
    }
