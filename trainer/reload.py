"""An output as its users will load it: by transformers, and by PEFT on its base."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods.parts import quantised
from trainer import speed
from trainer.base import SCORING, WRITING, load_config, load_pretrained
from trainer.run import Run

SPARE = 1.2  # memory that a model takes, over that of its weights
Placement = dict[str, Any]  # keyword arguments of `from_pretrained` that say where the weights go


def load_base(run: Run, adapter: Path, placement: Placement) -> Any:
    """The base as an adapter's users load it; a method that changes the base's config leaves it in the adapter."""
    from transformers import AutoConfig

    base = run.job.base
    if base.init == "scratch":
        raise ValueError(
            "base.init scratch: the base's random weights are kept nowhere, so nothing can load it again"
        )
    config = None
    if (adapter / "config.json").exists():
        config = AutoConfig.from_pretrained(adapter)
    return load_pretrained(base, run.dtype, config, run.objective.scores, **placement)


def load_output(run: Run, folder: Path, placement: Placement) -> nn.Module:
    """What a run left: a model, or an adapter on its base, in 4 bits where it was trained on that."""
    if run.job.method.makes_model:
        return load_whole_model(run, folder, placement)
    options = placement | _quantisation(run)
    base = load_base(run, folder, options)
    quantised.disable_cpu_repacking(base)
    model = run.method.load(base, folder)
    return model.eval()


def _quantisation(run: Run) -> Placement:
    """What puts the base in 4 bits for the method as it is loaded; nothing where it is in 4 bits already."""
    config = load_config(run.job.base)
    config.dtype = run.dtype
    in_4_bits = hasattr(config, "quantization_config")
    if in_4_bits or not run.job.method.quantises:
        return {}
    return run.method.load_options(config)


def load_whole_model(run: Run, folder: Path, placement: Placement) -> nn.Module:
    """A model from a folder that holds all of its weights, in evaluation mode."""
    import transformers

    class_name = WRITING
    if run.objective.scores:
        class_name = SCORING
    kind = getattr(transformers, class_name)
    model: nn.Module = kind.from_pretrained(folder, dtype=run.dtype, **placement)
    return model.eval()


@contextmanager
def space_for_copy(run: Run) -> Iterator[Placement]:
    """Where one more copy of the model fits: this rank's device, the host, or layer by layer from disk.

    Raises RuntimeError where an adapter's base does not fit.
    """
    weights = speed.count_weights(run.model)
    size = weights * run.dtype.itemsize * SPARE
    device = run.world.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what training has used meanwhile
        free_on_device, _ = torch.cuda.mem_get_info(device)
        if size < free_on_device:
            yield {"device_map": {"": device}}
            return
    free = free_bytes()
    if free is None or size < free:
        yield {}
        return
    if not run.job.method.makes_model:  # PEFT cannot put an adapter on a base that lies on disk
        needed_gib = size / 2**30
        free_gib = free / 2**30
        raise RuntimeError(f"one more copy of the model takes {needed_gib:.1f} GiB, the host has {free_gib:.1f}")
    limit = int(free / SPARE)
    memory = {"cpu": limit}
    with tempfile.TemporaryDirectory(dir=run.attempt.folder) as disk:
        yield {"device_map": "auto", "max_memory": memory, "offload_folder": disk}


def free_bytes() -> float | None:
    """What this process may still take of the host's memory; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {}
    for line in lines:
        name, size = line.split(":")
        kibibytes = size.split()[0]
        sizes[name] = int(kibibytes) * 1024
    return min(sizes["MemAvailable"], _free_in_group())


def _free_in_group() -> float:
    """What the control group of a container leaves; cached files count as taken, which errs on the safe side."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        taken = int((group / "memory.current").read_text())
        return limit - taken
    except (OSError, ValueError):  # no such group, or "max": no limit
        return float("inf")
