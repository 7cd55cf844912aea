"""Which GPU a worker of a job gets, as far as the place where it would run tells: its name and its memory."""

import shutil
import subprocess
from typing import NamedTuple

from clusters.base import Capacity
from clusters.config import MOST_GIB
from orchestrator.errors import InputError
from trainer.devices import memory_of_name

_ASK_DEVICE = ("nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits")
_DRIVER_S = 10.0
_MIB = 2**20
_GIB = 2**30


class Device(NamedTuple):
    """A GPU by its name and its bytes; None of what nobody says."""

    name: str | None = None
    memory: int | None = None


def check_gib(said: float | None) -> None:
    """Raise InputError where what somebody said of a GPU's memory is no size."""
    if said is None:
        return
    is_size = 0 < said <= MOST_GIB
    if not is_size:
        raise InputError(f"gpu: found {said:g}; allowed: the GiB of a GPU, above 0 and at most {MOST_GIB:,}")


def planned_device(capacity: Capacity, is_here: bool, said_gib: float | None) -> Device:
    """The GPU of a place: its memory is what somebody said, what the cluster tells, or what its name stands for."""
    device = Device(capacity.gpu, capacity.gpu_bytes)
    if is_here and device == Device():
        device = device_here()
    if said_gib is not None:
        return device._replace(memory=int(said_gib * _GIB))
    if device.memory is None and device.name is not None:
        return device._replace(memory=memory_of_name(device.name))
    return device


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
