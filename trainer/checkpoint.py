"""Checkpoints without parallelism: fragments by parameter name and range, written in the background.

RUN_DIR/attempts/N/checkpoints/step-S/ holds one `shard-K.safetensors` per rank, whose tensors are 1-D and named
`kind/parameter/start` (one figure for a whole parameter, like its number of steps, is 0-d), and beside it
`shard-K.json` with its hash. Rank 0 writes `manifest.json` when all shards are there; a checkpoint without one does
not exist. Loading reads whatever ranges the new layout needs.

The only stall is the copy to the host's memory; hashing, writing and clean-up happen in a thread.
"""

import hashlib
import math
import os
import shutil
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from methods.base import Method
from runfolder.chain import Attempt, Start, attempts, bounds
from runfolder.files import Record, read_json, sha256, sync_folder, write_json
from trainer.world import World
from trainer.zero.gather import assign, shape
from trainer.zero.shards import Shards

MEAN_TIME_BETWEEN_FAILURES = 4 * 3600.0  # seconds; of one job, as spot machines and large clusters have it
WEIGHT, METHOD = "weight", "method"


class CheckpointGone(RuntimeError):
    """A live predecessor removed the checkpoint while this attempt was being claimed; the next one finds a newer."""


class Checkpoints:
    """The saving side, one per worker."""

    def __init__(self, attempt: Attempt, world: World, every: int | str, keep: int) -> None:
        self.attempt = attempt
        self.world = world
        self.keep = keep
        self.every = every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stall_s = self._write_s = 0.0
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a fixed interval says to save after this step."""
        return self.every != "auto" and step % int(self.every) == 0

    def overdue(self) -> bool:
        """Whether `auto` says to save now: Young's interval sqrt(2 x stall x time between failures), 1974.

        Never sooner than the last write took. Asked on rank 0 alone, which tells the others: the clock starts again
        with the wish, as the save comes a step later.
        """
        interval = max(math.sqrt(2 * self._stall_s * MEAN_TIME_BETWEEN_FAILURES), self._write_s)
        if self.every != "auto" or time.monotonic() - self._saved_at <= interval:
            return False
        self._saved_at = time.monotonic()
        return True

    def save(self, shards: Shards, method: Method[Any], step: int) -> None:
        """Copy this rank's part to the host and write it in the background; waits for the save before it."""
        self.wait()
        began = time.monotonic()
        tensors = snapshot(shards, method, self.world)
        self._stall_s = time.monotonic() - began
        record = {"step": step, "world": self.world.size, "stage": shards.stage}
        self._thread = threading.Thread(target=self._write, args=(record, tensors), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write(self, record: Record, tensors: dict[str, torch.Tensor]) -> None:
        began = time.monotonic()
        try:
            folder = _folder(self.attempt, record["step"])
            folder.mkdir(parents=True, exist_ok=True)
            write_shard(folder, self.world.rank, tensors)
            if self.world.leads:
                self._commit(folder, record)
                self._clean()
        except BaseException as error:  # kept for the training thread, which raises it at the next save
            self._error = error
        self._write_s = time.monotonic() - began
        self._saved_at = time.monotonic()

    def _commit(self, folder: Path, record: Record) -> None:
        names = [f"shard-{rank}" for rank in range(self.world.size)]
        while not all((folder / f"{name}.json").exists() for name in names):
            self.attempt.check(here=True)
            time.sleep(0.02)
        self.attempt.check()  # one that was paused and has a successor ends at its first save
        files = {f"{name}.safetensors": read_json(folder / f"{name}.json") for name in names}
        # A step that a checkpoint covers must have been reported before the checkpoint exists.
        self.attempt.sync("metrics.jsonl")
        write_json(folder / "manifest.json", {**record, "files": files})
        self.attempt.event("checkpoint", step=record["step"], stall_s=round(self._stall_s, 4))

    def _clean(self) -> None:
        """Remove all but the newest `keep`, of earlier attempts too. The newest is never removed, even by a ghost."""
        kept = [folder for _, folder in islice(_lineage(self.attempt.run_dir), self.keep)]
        for folder in _unused(self.attempt):
            if folder not in kept:
                self.attempt.check()
                # A ghost that still writes into the folder does not find it after this.
                trash = folder.rename(folder.with_name(f".trash-{uuid.uuid4().hex}"))
                shutil.rmtree(trash)


class Reader:
    """Random access to a checkpoint's fragments by kind, parameter and range."""

    def __init__(self, folder: Path) -> None:
        self.step = int(read_json(folder / "manifest.json")["step"])
        self._parts: dict[tuple[str, str], list[tuple[int, str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("shard-*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, name, start = key.split("/")
                self._parts[kind, name].append((int(start), key, file))

    def kinds(self, name: str) -> set[str]:
        """What the checkpoint holds of a parameter beside its weights."""
        return {kind for kind, found in self._parts if found == name} - {WEIGHT}

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened parameter's state, from whichever ranks wrote them."""
        parts = [(begin, file.get_slice(key)) for begin, key, file in self._parts[kind, name]]
        out = torch.empty(stop - start, dtype=parts[0][1][:0].dtype if parts else None)
        missing = stop - start
        for begin, part in parts:
            (size,) = part.get_shape()
            a, b = max(start, begin), min(stop, begin + size)
            if a < b:
                out[a - start : b - start] = part[a - begin : b - begin]
                missing -= b - a
        if missing:
            raise ValueError(f"{missing} elements of {kind} of {name}[{start}:{stop}] are not in the checkpoint")
        return out

    def figure(self, kind: str, name: str) -> torch.Tensor:
        """A 0-d state of a parameter, from any rank: all have the same."""
        _, key, file = self._parts[kind, name][0]
        value: torch.Tensor = file.get_tensor(key)
        return value

    def is_figure(self, kind: str, name: str) -> bool:
        """Whether a state is one figure for the whole parameter."""
        _, key, file = self._parts[kind, name][0]
        return not file.get_slice(key).get_shape()

    def load_weights(self, model: nn.Module, method: Method[Any]) -> None:
        """Set every trained or changed parameter of a model that has no engine yet; every rank calls it."""
        changed = set(method.changed(model))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name in changed:
                assign(model, name, self.read(WEIGHT, name, 0, shape(parameter).numel()))

    def load_optimizer(self, shards: Shards) -> None:
        """Set the optimizer's state of what this rank holds, and the method's pieces."""
        for fragment in shards.fragments():
            state = shards.state(fragment)
            for kind in self.kinds(fragment.name):
                if self.is_figure(kind, fragment.name):
                    state[kind] = self.figure(kind, fragment.name)
                else:
                    part = self.read(kind, fragment.name, fragment.start, fragment.stop)
                    state[kind] = part.to(fragment.parameter.device)
        for piece in shards.method.pieces():
            for kind, tensor in piece.tensors.items():
                tensor.copy_(self.read(kind, piece.name, piece.start, piece.start + len(tensor)))

    def method_state(self) -> dict[str, torch.Tensor]:
        """What the method asked to keep."""
        found = [name for kind, name in self._parts if kind == METHOD]
        return {name: self._parts[METHOD, name][0][2].get_tensor(f"{METHOD}/{name}/0") for name in found}


def snapshot(shards: Shards, method: Method[Any], world: World) -> dict[str, torch.Tensor]:
    """This rank's part of weights, optimizer and method state, on the host."""
    tensors: dict[str, torch.Tensor] = {}
    for piece in shards.pieces():
        for kind, whole in piece.tensors.items():
            own = _owned(whole, world) if piece.whole and whole.dim() else slice(0, whole.numel())
            part = whole[own] if whole.dim() else whole
            if part.numel():
                tensors[f"{kind}/{piece.name}/{piece.start + own.start}"] = part.detach().to("cpu", copy=True)
    if world.leads:
        tensors |= {f"{METHOD}/{name}/0": value.to("cpu", copy=True) for name, value in method.state().items()}
    return tensors


def _owned(whole: torch.Tensor, world: World) -> slice:
    """Which elements this rank answers for when every rank holds them all."""
    size = math.ceil(whole.numel() / world.size)
    return slice(min(world.rank * size, whole.numel()), min((world.rank + 1) * size, whole.numel()))


def write_shard(folder: Path, rank: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write one rank's tensors, then their hash."""
    path = folder / f"shard-{rank}.safetensors"
    save_file(tensors, path)
    with path.open("rb+") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    sync_folder(folder)
    write_json(folder / f"shard-{rank}.json", {"sha256": digest, "bytes": path.stat().st_size})


def open_checkpoint(run_dir: Path, start: Start) -> Reader:
    """The checkpoint that an attempt starts from; raises CheckpointGone."""
    try:
        return Reader(_folder(Attempt(run_dir, start.attempt), start.step))
    except FileNotFoundError as error:
        raise CheckpointGone(f"step {start.step} of attempt {start.attempt}: {error}") from error


def newest(run_dir: Path) -> Start | None:
    """The newest checkpoint that counts and whose hashes hold; None when there is none."""
    for start, folder in _lineage(run_dir):
        if is_valid(folder):
            return start
    return None


def is_valid(folder: Path) -> bool:
    """Whether a checkpoint has a manifest and every shard that it names, unharmed."""
    try:
        files: dict[str, Record] = read_json(folder / "manifest.json")["files"]
    except (ValueError, KeyError):
        return False
    with ThreadPoolExecutor() as pool:
        return all(pool.map(lambda name: _matches(folder / name, files[name]), files))


def _lineage(run_dir: Path) -> Iterator[tuple[Start, Path]]:
    """Checkpoints with a manifest that count, newest first."""
    for attempt, bound in bounds(run_dir):
        folders = (attempt.folder / "checkpoints").glob("step-*/manifest.json")
        steps = sorted((int(path.parent.name.removeprefix("step-")) for path in folders), reverse=True)
        yield from ((Start(attempt.number, step), _folder(attempt, step)) for step in steps if step <= bound)


def _unused(attempt: Attempt) -> list[Path]:
    """Checkpoints that this attempt does not write at the moment: those with a manifest, and all of earlier ones."""
    earlier = [other for other in attempts(attempt.run_dir) if other.number < attempt.number]
    finished = (attempt.folder / "checkpoints").glob("step-*/manifest.json")
    return [
        *(folder for other in earlier for folder in (other.folder / "checkpoints").glob("*")),
        *(path.parent for path in finished),
    ]


def _folder(attempt: Attempt, step: int) -> Path:
    return attempt.folder / "checkpoints" / f"step-{step}"


def _matches(path: Path, expected: Record) -> bool:
    if not path.exists() or path.stat().st_size != expected["bytes"]:
        return False
    return bool(sha256(path) == expected["sha256"])
