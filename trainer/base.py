"""Loading the base: tokenizer, and model with the dtype that the method and the precision want."""

from functools import wraps
from typing import Any

import torch
from torch import nn

from methods.base import Method
from orchestrator.job import Base, Job
from trainer.zero import partitioned_loading


def precision(job: Job, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: bf16 where a GPU has it, unless the job says otherwise."""
    if job.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[job.train.precision]


def load_tokenizer(base: Base) -> Any:
    """The base's tokenizer; its padding token is its end token where it has none of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.model, revision=base.revision or "main")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(base: Base) -> Any:
    """The base's config."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.model, revision=base.revision or "main")


def load_model(job: Job, method: Method[Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The base with the method attached; trained weights are fp32, frozen ones `dtype`.

    At ZeRO 3 a pretrained base is never whole on a device. One from scratch is: it has no weights to read in parts.
    One in 4 bits is: it cannot be partitioned.
    """
    weights = torch.float32 if job.method.makes_model else dtype
    options = _options(job, method, weights)
    in_parts = job.base.init == "pretrained" and "quantization_config" not in options
    with partitioned_loading(job.sharding.zero if in_parts else 0, weights):
        torch.manual_seed(job.train.seed)
        model = _load(job, options, device)
        _compute_in(dtype, device, model)
        model.config.use_cache = False
        if job.train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(job.train.seed)
        # On the device at once, as at ZeRO 3: what `attach` computes from the base is fast and the same there.
        return method.attach(model.to(device)).train().to(device)  # transformers loads for evaluation


def _compute_in(dtype: torch.dtype, device: torch.device, model: nn.Module) -> None:
    """Make a model's forward pass run in `dtype`; from inside, as DeepSpeed switches an autocast around it off."""
    if dtype == torch.float32:
        return
    forward = model.forward

    @wraps(forward)
    def computed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*args, **kwargs)

    model.forward = computed


def _options(job: Job, method: Method[Any], dtype: torch.dtype) -> dict[str, Any]:
    config = load_config(job.base)
    config.dtype = dtype
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # its masks would depend on the layout; a method's own dropout is asked for
    return {"config": config, "dtype": dtype, **method.load_options(config)}


def _load(job: Job, options: dict[str, Any], device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    source = {"pretrained_model_name_or_path": job.base.model, "revision": job.base.revision or "main"}
    if job.base.init == "pretrained":
        return AutoModelForCausalLM.from_pretrained(**source, **options)
    with device:
        return AutoModelForCausalLM.from_config(**options)
