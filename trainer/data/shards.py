"""Tokenised examples in files that all ranks make together, and map.

Each rank claims unclaimed shards, writes each whole or not at all, and waits for the others by looking for files,
never in a collective. A shard whose maker died is made, after a timeout, by those who wait for it: the same content
twice does no harm. A shard ends with the sha256 of its content and the manifest is written last, so what is
half-written or damaged is made again, never used.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from runfolder.files import read_json, sync_folder, write_json
from trainer.data.counts import Counts

ChunkT = TypeVar("ChunkT")
Array = npt.NDArray[Any]
RowProgress = Callable[[int], None]  # called with the number of rows that are done

_SHARD_POLL_S = 0.05
_SHARD_TIMEOUT_S = 2.0  # at least; and five times what the slowest shard took here
_HASH_BYTES = 32


@dataclass(frozen=True)
class Shard:
    """Examples end to end, example i in [offsets[i], offsets[i + 1]): token ids, and which of them are labels.

    `rows` [examples] are the numbers of the rows that they come from; `desirable` [examples] says of answers that
    were judged whether they were liked, and `margins` [examples] of pairs by how much the better one is to lead.
    """

    ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    desirable: npt.NDArray[np.bool_]
    margins: npt.NDArray[np.float64]
    counts: Counts


def join_examples(
    examples: Sequence[tuple[Array, Array]],
    rows: Sequence[int],
    counts: Counts,
    desirable: Sequence[bool] | None = None,
    margins: Sequence[float] | None = None,
) -> Shard:
    """Lay the ids and labels of examples end to end; unless it is said, all are desirable, without a margin."""
    count = len(examples)
    if desirable is None:
        desirable = [True] * count
    if margins is None:
        margins = [0.0] * count
    ids = [np.zeros(0, np.int32)]
    target = [np.zeros(0, np.bool_)]
    lengths = [0]
    for ids_of_example, target_of_example in examples:
        ids.append(ids_of_example)
        target.append(target_of_example)
        lengths.append(len(ids_of_example))
    return Shard(
        ids=np.concatenate(ids),
        target=np.concatenate(target),
        offsets=np.cumsum(lengths, dtype=np.int64),
        rows=np.array(rows, np.int64),
        desirable=np.array(desirable, np.bool_),
        margins=np.array(margins, np.float64),
        counts=counts,
    )


def load_or_make(
    folder: Path,
    chunks: Callable[[], Iterable[ChunkT]],
    make: Callable[[ChunkT], Shard],
    progress: RowProgress = lambda _: None,
) -> list[Shard]:
    """The shards of `folder`, one for each chunk: mapped if they are there, else made together with other ranks.

    `chunks` and `make` must give the same on every rank. `progress` is called with the number of rows that are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = _Cache(folder, chunks, make, progress)
    return cache.load() or cache.make_together()


class _Cache(Generic[ChunkT]):
    """A folder of shards as one rank sees it; `shards` are those that it has mapped so far."""

    def __init__(
        self,
        folder: Path,
        chunks: Callable[[], Iterable[ChunkT]],
        make: Callable[[ChunkT], Shard],
        progress: RowProgress,
    ) -> None:
        self.folder = folder
        self.chunks = chunks
        self.make = make
        self.progress = progress
        self.manifest = folder / "manifest.json"
        self.shards: dict[int, Shard] = {}
        self.rows = 0  # in the shards that are mapped
        self.timeout_s = _SHARD_TIMEOUT_S

    def load(self) -> list[Shard]:
        """All shards when the folder is whole, else nothing."""
        try:
            record = read_json(self.manifest)
            count = int(record["shards"])
            rows = int(record["rows"])
        except (FileNotFoundError, ValueError, KeyError):
            return []
        for number in range(count):
            if not self.has(number):
                return []
        shards = self.first(count)
        if _count_rows(shards) != rows:
            return []
        return shards

    def make_together(self) -> list[Shard]:
        """Make what nobody has claimed, wait for the others, make what they do not finish in time."""
        count = self.make_missing(steal=False)
        while missing := self.missing(count):
            if not self.wait_for_any(missing):
                self.make_missing(steal=True)
        shards = self.first(count)
        manifest = {"shards": count, "rows": _count_rows(shards)}
        write_json(self.manifest, manifest)
        return shards

    def first(self, count: int) -> list[Shard]:
        """The first `count` shards in their order; all of them must be mapped."""
        shards = []
        for number in range(count):
            shards.append(self.shards[number])
        return shards

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` shards are not there."""
        missing = []
        for number in range(count):
            if not self.has(number):
                missing.append(number)
        return missing

    def make_missing(self, *, steal: bool) -> int:
        """Make the missing shards that are unclaimed, or (steal) all that are missing; the number of chunks."""
        count = 0
        for number, chunk in enumerate(self.chunks()):
            count += 1
            if self.has(number):
                continue
            draft = self.claim(number, steal=steal)
            if draft:
                began = time.monotonic()
                shard = self.make(chunk)
                _write(draft, shard, self.path(number))
                took_s = time.monotonic() - began
                timeout_s = 5 * took_s
                self.timeout_s = max(self.timeout_s, timeout_s)
        return count

    def claim(self, number: int, *, steal: bool) -> BinaryIO | None:
        """The file to write a shard to, which is also the claim on it; None when another has claimed it."""
        suffix = ".claim"
        if steal:
            suffix = f".{uuid.uuid4().hex}"
        draft = self.path(number).with_suffix(suffix)
        try:
            return draft.open("xb")
        except FileExistsError:
            return None

    def wait_for_any(self, missing: list[int]) -> bool:
        """Wait for any of the missing shards; False when none is there after the timeout."""
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            for number in missing:
                if self.has(number):
                    return True
            time.sleep(_SHARD_POLL_S)
        return False

    def has(self, number: int) -> bool:
        """Whether a shard is there and whole; it is mapped, and its rows reported, when it is first seen."""
        if number in self.shards:
            return True
        shard = _map_shard(self.path(number))
        if shard is None:
            return False
        self.shards[number] = shard
        self.rows += shard.counts.rows
        self.progress(self.rows)
        return True

    def path(self, number: int) -> Path:
        """Where a shard of this number lies."""
        name = f"{number:05}.arrow"
        return self.folder / name


def _count_rows(shards: Iterable[Shard]) -> int:
    rows = 0
    for shard in shards:
        rows += shard.counts.rows
    return rows


def _write(draft: BinaryIO, shard: Shard, path: Path) -> None:
    """Write a shard as an Arrow stream (its readers stop at its end) and its sha256; then give it its name."""
    content = _arrow_stream(shard)
    digest = hashlib.sha256(content).digest()
    with draft:
        draft.write(content)
        draft.write(digest)
        draft.flush()
        os.fsync(draft.fileno())
    Path(draft.name).replace(path)
    sync_folder(path.parent)


def _arrow_stream(shard: Shard) -> pa.Buffer:
    """A shard as an Arrow stream of one batch: a row for each example, the counts in the metadata."""
    offsets = _arrow_array(shard.offsets)
    ids = _arrow_array(shard.ids)
    target = _arrow_array(shard.target.view(np.uint8))
    columns = {
        "ids": pa.LargeListArray.from_arrays(offsets, ids),
        "target": pa.LargeListArray.from_arrays(offsets, target),
        "row": _arrow_array(shard.rows),
        "desirable": _arrow_array(shard.desirable.view(np.uint8)),
        "margin": _arrow_array(shard.margins),
    }
    counts = json.dumps(asdict(shard.counts))
    metadata = {"counts": counts}
    batch = pa.record_batch(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _arrow_array(array: Array) -> pa.Array:
    """A numpy array as Arrow has it. The conversions of Arrow itself would import pandas: 0.4 s in every worker."""
    type_ = pa.from_numpy_dtype(array.dtype)
    content = np.ascontiguousarray(array)
    buffers = [None, pa.py_buffer(content)]  # the first would say which values are missing
    return pa.Array.from_buffers(type_, len(array), buffers)


def _numpy_array(array: pa.Array) -> Array:
    """A view of an Arrow array."""
    view: Array = np.from_dlpack(array)
    return view


def _map_shard(path: Path) -> Shard | None:
    """Map a shard; None when it is missing or damaged."""
    if not path.exists() or path.stat().st_size <= _HASH_BYTES:
        return None
    with pa.memory_map(str(path)) as file:
        content = file.read_buffer()
    stream = content[:-_HASH_BYTES]
    written_digest = content[-_HASH_BYTES:].to_pybytes()
    if hashlib.sha256(stream).digest() != written_digest:
        return None
    batch = pa.ipc.open_stream(content).read_next_batch()
    return _shard_of(batch)


def _shard_of(batch: pa.RecordBatch) -> Shard:
    """The shard in a batch; its arrays are views of the mapped file."""
    ids = batch.column("ids")
    target = batch.column("target")
    rows = batch.column("row")
    desirable = batch.column("desirable")
    margins = batch.column("margin")
    counts = json.loads(batch.schema.metadata[b"counts"])
    return Shard(
        ids=_numpy_array(ids.values),
        target=_numpy_array(target.values).view(np.bool_),
        offsets=_numpy_array(ids.offsets),
        rows=_numpy_array(rows),
        desirable=_numpy_array(desirable).view(np.bool_),
        margins=_numpy_array(margins),
        counts=Counts(**counts),
    )
