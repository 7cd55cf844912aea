"""Tokenised examples in files that all ranks make together, and map.

Whoever comes claims shards that nobody has, writes each whole or not at all, and waits for the rest by looking for
files, never in a collective. A shard that does not come (its maker died) is made by those who wait for it: the same
content twice does no harm. A shard ends with the sha256 of its content and the manifest comes last, so what is
half-written or damaged is made again, never used.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from runfolder.files import read_json, sync_folder, write_json

Chunk = TypeVar("Chunk")
Array = npt.NDArray[Any]

UNUSED = "unused "  # how the kind begins under which a column that nobody reads is noticed
_POLL_S = 0.05
_PATIENCE_S = 2.0  # at least; and five times what the slowest shard took here
_HASH_BYTES = 32


@dataclass
class Counts:
    """Rows that were read, examples that they made, tokens of the longest, and what was noticed on the way.

    `noticed` has, by kind, how often something was seen and the number of the first row where it was.
    """

    rows: int = 0
    examples: int = 0
    longest: int = 0
    noticed: dict[str, tuple[int, int]] = field(default_factory=dict)

    def notice(self, kind: str, row: int, times: int = 1) -> None:
        """Count something that was seen in a row; rows come in order."""
        count, first = self.noticed.get(kind, (0, row))
        self.noticed[kind] = (count + times, first)

    def number(self, kind: str) -> int:
        """How often something was noticed."""
        return self.noticed.get(kind, (0, 0))[0]

    def summary(self) -> dict[str, int | dict[str, int]]:
        """What a run's record says of its data: rows, examples, the longest, and how often each kind was noticed."""
        counts = {kind: count for kind, (count, _) in self.noticed.items()}
        unused = {kind.removeprefix(UNUSED): count for kind, count in counts.items() if kind.startswith(UNUSED)}
        others = {kind: count for kind, count in counts.items() if not kind.startswith(UNUSED)}
        return {"rows": self.rows, "examples": self.examples, "longest": self.longest, **others, "unused": unused}

    def add(self, later: "Counts") -> None:
        """Add what was counted in later rows."""
        self.rows += later.rows
        self.examples += later.examples
        self.longest = max(self.longest, later.longest)
        for kind, (count, first) in later.noticed.items():
            self.notice(kind, first, count)


@dataclass(frozen=True)
class Shard:
    """Examples end to end, example i in [offsets[i], offsets[i + 1]): token ids, and which of them are labels.

    `rows` [examples] are the numbers of the rows that they come from.
    """

    ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    counts: Counts


def join(examples: Sequence[tuple[Array, Array]], rows: Sequence[int], counts: Counts) -> Shard:
    """Lay the ids and labels of examples end to end."""
    return Shard(
        np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in examples)]),
        np.concatenate([np.zeros(0, np.bool_), *(target for _, target in examples)]),
        np.cumsum([0, *(len(ids) for ids, _ in examples)], dtype=np.int64),
        np.array(rows, np.int64),
        counts,
    )


def collect(
    folder: Path,
    chunks: Callable[[], Iterable[Chunk]],
    make: Callable[[Chunk], Shard],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Shard]:
    """The shards of `folder`, one for each chunk: mapped if they are there, else made together with other ranks.

    `chunks` and `make` must give the same on every rank. `progress` is called with the number of rows that are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = _Work(folder, chunks, make, progress)
    return work.cached() or work.share()


class _Work(Generic[Chunk]):
    """What one rank has found and made so far."""

    def __init__(
        self,
        folder: Path,
        chunks: Callable[[], Iterable[Chunk]],
        make: Callable[[Chunk], Shard],
        progress: Callable[[int], None],
    ) -> None:
        self.folder, self.chunks, self.make, self.progress = folder, chunks, make, progress
        self.manifest = folder / "manifest.json"
        self.found: dict[int, Shard] = {}
        self.rows = 0  # in the shards that were found
        self.patience_s = _PATIENCE_S

    def cached(self) -> list[Shard]:
        """All shards when the folder is whole, else nothing."""
        try:
            record = read_json(self.manifest)
            count, rows = int(record["shards"]), int(record["rows"])
        except (FileNotFoundError, ValueError, KeyError):
            return []
        if not all(self.has(number) for number in range(count)):
            return []
        shards = [self.found[number] for number in range(count)]
        return shards if sum(shard.counts.rows for shard in shards) == rows else []

    def share(self) -> list[Shard]:
        """Make what nobody has claimed, wait for the others, make what does not come."""
        count = self.go_through(steal=False)
        while missing := [number for number in range(count) if not self.has(number)]:
            if not self.comes(missing):
                self.go_through(steal=True)
        shards = [self.found[number] for number in range(count)]
        write_json(self.manifest, {"shards": count, "rows": sum(shard.counts.rows for shard in shards)})
        return shards

    def go_through(self, *, steal: bool) -> int:
        """Make the missing shards that are unclaimed, or (steal) all that are missing; the number of chunks."""
        number = -1
        for number, chunk in enumerate(self.chunks()):
            if not self.has(number) and (draft := self.draft(number, steal=steal)):
                began = time.monotonic()
                _write(draft, self.make(chunk), self.path(number))
                self.patience_s = max(self.patience_s, 5 * (time.monotonic() - began))
        return number + 1

    def draft(self, number: int, *, steal: bool) -> BinaryIO | None:
        """The file to write a shard to, which is also the claim on it; None when another has claimed it."""
        try:
            return self.path(number).with_suffix(f".{uuid.uuid4().hex}" if steal else ".claim").open("xb")
        except FileExistsError:
            return None

    def comes(self, missing: list[int]) -> bool:
        """Wait for any of the missing shards; False when patience ends first."""
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            if any(self.has(number) for number in missing):
                return True
            time.sleep(_POLL_S)
        return False

    def has(self, number: int) -> bool:
        """Whether a shard is there and whole."""
        if number not in self.found and (shard := _read(self.path(number))):
            self.found[number] = shard
            self.rows += shard.counts.rows
            self.progress(self.rows)
        return number in self.found

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{number:05}.arrow"


def _write(draft: BinaryIO, shard: Shard, path: Path) -> None:
    """An Arrow stream (its readers stop at its end), then its sha256."""
    arrays = {"ids": shard.ids, "target": shard.target.view(np.uint8)}
    columns = {name: pa.LargeListArray.from_arrays(shard.offsets, pa.array(array)) for name, array in arrays.items()}
    columns["row"] = pa.array(shard.rows)
    batch = pa.record_batch(columns).replace_schema_metadata({"counts": json.dumps(asdict(shard.counts))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    with draft:
        draft.write(content)
        draft.write(hashlib.sha256(content).digest())
        draft.flush()
        os.fsync(draft.fileno())
    Path(draft.name).replace(path)
    sync_folder(path.parent)


def _read(path: Path) -> Shard | None:
    """Map a shard; None when it is missing or damaged."""
    if not path.exists() or path.stat().st_size <= _HASH_BYTES:
        return None
    with pa.memory_map(str(path)) as file:
        content = file.read_buffer()
    if hashlib.sha256(content[:-_HASH_BYTES]).digest() != content[-_HASH_BYTES:].to_pybytes():
        return None
    batch = pa.ipc.open_stream(content).read_next_batch()
    ids, target = batch.column("ids"), batch.column("target")
    counts = Counts(**json.loads(batch.schema.metadata[b"counts"]))
    rows = batch.column("row").to_numpy()
    return Shard(ids.values.to_numpy(), target.values.to_numpy().view(np.bool_), ids.offsets.to_numpy(), rows, counts)
