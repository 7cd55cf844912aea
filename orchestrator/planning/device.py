"""Which GPU a worker of a job gets, as far as the place where it would run tells: its name and its memory."""

import reprlib
import shutil
import subprocess
from typing import NamedTuple

from clusters.base import Capacity
from clusters.config import MOST_GIB
from orchestrator.errors import InputError
from trainer.devices import GPU_MODELS, bytes_of, memory_of_name, model_of_name

_ASK_DEVICE = ("nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits")
_DRIVER_S = 10.0
_MIB = 2**20


class Device(NamedTuple):
    """A GPU by its name and its bytes; None of what nobody says."""

    name: str | None = None
    memory: int | None = None


def device_said(text: str | None) -> Device:
    """The GPU that somebody says: by its GiB, by its name, or by both, like 80, H100 or A100:80.

    Raises InputError for a name that is not known and has no GiB, and for what is no size.
    """
    if text is None:
        return Device()
    name, colon, size = text.strip().rpartition(":")
    if not colon and model_of_name(size) is not None:
        return Device(size, memory_of_name(size))
    try:
        gib = float(size)
    except ValueError:
        gib = 0.0
    if not 0 < gib <= MOST_GIB:
        known = ", ".join(GPU_MODELS)
        allowed = f"GiB like 80 (at most {MOST_GIB:,}), one of {known}, or a name with its GiB like A100:80"
        raise InputError(f"--gpu: found {reprlib.repr(text)}; allowed: {allowed}")
    return Device(name.strip() or None, bytes_of(gib))


def planned_device(capacity: Capacity, is_here: bool, said: Device) -> Device:
    """The GPU of a place: what somebody said of it, then what the cluster tells, then what its name stands for."""
    told = Device(capacity.gpu, capacity.gpu_bytes)
    if said.name is not None:
        told = Device(said.name, memory_of_name(said.name))
    elif is_here and told == Device():
        told = device_here()
    if said.memory is not None:
        return told._replace(memory=said.memory)
    if told.memory is None and told.name is not None:
        return told._replace(memory=memory_of_name(told.name))
    return told


def device_here() -> Device:
    """This machine's GPU with the least memory, as its driver says."""
    if shutil.which(_ASK_DEVICE[0]) is None:
        return Device()
    try:
        answer = subprocess.run(_ASK_DEVICE, capture_output=True, text=True, timeout=_DRIVER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return Device()
    found = []
    for line in answer.stdout.splitlines():
        size, _, name = line.partition(",")
        if size.strip().isdigit():
            mebibytes = int(size)
            found.append((mebibytes * _MIB, name.strip()))
    if not found:
        return Device()
    memory, name = min(found)
    return Device(name, memory)
