"""GPUs by what their names hold: the arithmetic that they do, and the memory that they have."""

import re
from typing import NamedTuple


class GpuModel(NamedTuple):
    """What a GPU does and has, by its data sheet and its driver.

    `flops`: in bf16 a second, dense. `bandwidth`: bytes a second from its memory. `gib`: of memory, as a driver
    reports it. Of a name with several sizes the lowest figures, as a job that fits there fits everywhere.
    """

    flops: float
    bandwidth: float
    gib: float


# By a part of the name that no digit follows, whatever parts its words; one that holds another comes before it.
GPU_MODELS = {
    "GH200": GpuModel(989e12, 4e12, 94.5),
    "H200": GpuModel(989e12, 4.8e12, 139.8),
    "H100": GpuModel(989e12, 3.35e12, 79.1),
    "H800": GpuModel(989e12, 3.35e12, 79.1),
    "H20": GpuModel(148e12, 4e12, 95.1),
    "B200": GpuModel(2250e12, 8e12, 178.0),
    "A100": GpuModel(312e12, 1.555e12, 39.4),
    "A800": GpuModel(312e12, 1.555e12, 39.4),
    "L40S": GpuModel(362e12, 0.864e12, 44.4),
    "L40": GpuModel(181e12, 0.864e12, 44.4),
    "L4": GpuModel(121e12, 0.3e12, 22.0),
    "A40": GpuModel(149.7e12, 0.696e12, 44.4),
    "A10G": GpuModel(70e12, 0.6e12, 22.0),
    "A10": GpuModel(125e12, 0.6e12, 22.0),
    "A6000": GpuModel(154.8e12, 0.768e12, 47.4),
    "RTX 4090": GpuModel(165.2e12, 1.008e12, 23.5),
    "RTX 3090": GpuModel(71e12, 0.936e12, 23.5),
}
_OWN_SIZE = re.compile(r"(\d+) ?GI?B", re.IGNORECASE)  # in a name like NVIDIA-A100-SXM4-80GB
_REPORTED = 0.985  # of the GB in a name, the GiB that a driver reports
_OTHER_SIZES = (1.1, 2.1)  # times the known memory that another size of a name has; "GH200 480GB" is the host's


def model_of_name(name: str) -> GpuModel | None:
    """The GPU of this name, with the memory that the name itself says, if it does; None for one that is not known."""
    for known, model in GPU_MODELS.items():
        words = known.replace(" ", r"[\s_-]*")
        if re.search(rf"{words}(?!\d)", name, re.IGNORECASE):
            return _with_own_size(model, name)
    return None


def _with_own_size(model: GpuModel, name: str) -> GpuModel:
    """The model with the memory that its name says, where that is a larger one of several."""
    own_size = _OWN_SIZE.search(name)
    if own_size is None:
        return model
    reported = _REPORTED * int(own_size[1])
    least, most = _OTHER_SIZES
    if least <= reported / model.gib <= most:
        return model._replace(gib=reported)
    return model


def peak_of_name(name: str) -> float | None:
    """The FLOP/s in bf16 of a GPU of this name; None for one that is not known."""
    model = model_of_name(name)
    return model and model.flops


def bandwidth_of_name(name: str) -> float | None:
    """The bytes a second that a GPU of this name reads from its memory; None for one that is not known."""
    model = model_of_name(name)
    return model and model.bandwidth


def memory_of_name(name: str) -> int | None:
    """The bytes of a GPU of this name, at least; None for one that is not known."""
    model = model_of_name(name)
    return model and bytes_of(model.gib)


def bytes_of(gib: float) -> int:
    """The bytes of so many GiB."""
    return int(gib * 2**30)
