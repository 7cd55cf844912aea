"""GPUs by what their names hold: the arithmetic that they do, and the memory that they have."""

PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "B200": 2250e12,
}  # FLOP/s, dense
BANDWIDTH = {
    "H200": 4.8e12,
    "H100": 3.35e12,
    "A100": 1.555e12,
    "L40S": 0.864e12,
    "A10G": 0.6e12,
    "B200": 8e12,
}  # bytes a second from the memory, by the data sheets; of a name with several the lowest
# What a driver reports; of a name with several sizes the smallest, as a job that fits there fits everywhere.
MEMORY_GIB = {
    "H200": 139.8,
    "H100": 79.1,
    "A100": 39.4,
    "L40S": 44.4,
    "A10G": 22.0,
    "B200": 178.0,
}


def peak_of_name(name: str) -> float | None:
    """The FLOP/s in bf16 of a GPU of this name; None for one that is not known."""
    return _by_name(PEAK_BF16, name)


def bandwidth_of_name(name: str) -> float | None:
    """The bytes a second that a GPU of this name reads from its memory; None for one that is not known."""
    return _by_name(BANDWIDTH, name)


def memory_of_name(name: str) -> int | None:
    """The bytes of a GPU of this name, at least; None for one that is not known."""
    gib = _by_name(MEMORY_GIB, name)
    if gib is None:
        return None
    return int(gib * 2**30)


def _by_name(figures: dict[str, float], name: str) -> float | None:
    """The figure of the GPU whose name is in another one."""
    upper = name.upper()
    for known, figure in figures.items():
        if known in upper:
            return figure
    return None
