"""The files of a base's weights: which of them are loaded, and the tensors that their headers list.

Values are never read, so that this needs no torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError

TensorShape = tuple[int, ...]
Shapes = dict[str, TensorShape]  # by parameter name
HeaderEntry = dict[str, Any]  # what a header says of a tensor

_LENGTH_BYTES = 8  # in front of the header, its length
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself limits it


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `size` bytes from byte `begin` of a file."""

    name: str
    shape: TensorShape
    file: Path
    begin: int
    size: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads; raises InputError when one that the index names is not there."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        return []
    names = _indexed_names(index)
    files = []
    for name in names:
        files.append(folder / name)
    missing = []
    for file in files:
        if not file.is_file():
            missing.append(file)
    if missing:
        lacking = f"{len(names)} files, {len(missing)} lack"
        raise InputError(f"{missing[0]}: missing; {index.name} names {lacking}")
    return files


def _indexed_names(index: Path) -> list[str]:
    """The names of the files that an index says the weights are in."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index}: not an index of safetensors files") from None


def read_header(path: Path) -> Iterator[StoredTensor]:
    """Every tensor in a safetensors file, without its values; raises InputError when it is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        longest = min(size - _LENGTH_BYTES, _LARGEST_HEADER)
        if size < _LENGTH_BYTES or length > longest:
            raise InputError(f"{path}: not a whole safetensors file ({size} bytes)")
        header = stream.read(length)
    data_begin = _LENGTH_BYTES + length
    try:
        ends = []
        tensors = []
        for name, entry in _entries(header).items():
            ends.append(entry["data_offsets"][1])
            tensors.append(_tensor(path, data_begin, name, entry))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{path}: its safetensors header cannot be read") from None
    expected_size = data_begin + max(ends, default=0)
    if size != expected_size:
        raise InputError(f"{path}: found {size} bytes, its header says {expected_size}: damaged or cut short")
    yield from tensors


def _entries(header: bytes) -> dict[str, HeaderEntry]:
    """What a header says of each tensor, by its name."""
    entries = dict(json.loads(header).items())
    entries.pop("__metadata__", None)
    return entries


def _tensor(path: Path, data_begin: int, name: str, entry: HeaderEntry) -> StoredTensor:
    """A tensor by its entry in the header of a file whose data begins at the byte `data_begin`."""
    offsets = entry["data_offsets"]
    begin, end = map(int, offsets)
    size = end - begin
    begin += data_begin
    shape = tuple(map(int, entry["shape"]))
    return StoredTensor(name, shape, path, begin, size)
