"""A job's base with a few of its layers and the method attached, as tensors without values."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from methods.base import Method
from methods.options.base import BaseConfig
from runfolder.job import Job
from trainer.base import load_model

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # what config.json calls it


def layer_count(config: BaseConfig) -> int:
    """How many layers a base has; raises ValueError where its config.json does not say."""
    for key in LAYER_COUNTS:
        layers = config.get(key)
        if isinstance(layers, int):
            return layers
    raise ValueError("config.json does not say how many layers the base has")


def with_layers(config: BaseConfig, layers: int) -> dict[str, Any]:
    """The config.json of a base with only so many layers, the first ones."""
    whole = layer_count(config)
    cut = dict(config)
    for key, value in config.items():
        if key in LAYER_COUNTS:
            cut[key] = layers
        elif isinstance(value, list) and len(value) == whole:
            cut[key] = value[:layers]
    return cut


@contextmanager
def without_weights(job: Job, config: BaseConfig) -> Iterator[Job]:
    """Within it, there is a folder with this config.json, which is the base of the job that is given."""
    with TemporaryDirectory() as folder:
        plain = dict(config)
        text = json.dumps(plain)
        path = Path(folder) / "config.json"
        path.write_text(text)
        changes = {"model": folder, "init": "scratch", "resize_embeddings": False}
        base = job.base.model_copy(update=changes)
        yield job.model_copy(update={"base": base})


def attached(job: Job, config: BaseConfig, method: Method[Any], dtype: torch.dtype) -> tuple[nn.Module, bool]:
    """The model as the trainer makes it, on no device; and whether its base is frozen, all of it."""
    nowhere = torch.device("meta")
    of_base: list[nn.Parameter] = []
    attach = method.attach

    def noting_base(model: Any) -> nn.Module:
        of_base.extend(model.parameters())
        return attach(model)

    with (
        without_weights(job, config) as job_of_shapes,
        patch("torch.randperm", _undrawn),
        patch.object(method, "attach", noting_base),
    ):
        model = load_model(job_of_shapes, method, dtype, nowhere)
    trains_base = any(parameter.requires_grad for parameter in of_base)
    return model, not trains_base


def _undrawn(size: int, **_options: Any) -> Tensor:
    """A permutation that is none, as to permute the places of a large weight takes seconds."""
    one = torch.zeros(1, dtype=torch.long)
    return one.expand(size)


def fake_weights(model: nn.Module) -> None:
    """Give a model on no device new weights and buffers, each once; call it where tensors get no values."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _same(parameter, made)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _same(buffer, made)


def _same(tensor: Tensor, made: dict[Tensor, Tensor]) -> Tensor:
    """The new tensor in the place of one that may be in several modules."""
    if tensor not in made:
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, tensor.requires_grad)
            if tensor.requires_grad:
                new.grad_dtype = tensor.grad_dtype
        made[tensor] = new
    return made[tensor]
