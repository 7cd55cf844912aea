"""The saving side of checkpoints, one per worker.

The only stall is the copy to the host's memory; hashing, writing and clean-up happen in a thread.
"""

import hashlib
import math
import os
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from methods.base import Method
from runfolder.chain import Attempt
from runfolder.files import Record, list_names, read_json, refresh, sync_folder, write_json
from trainer.checkpoint.lineage import checkpoint_folder, lineage, remove_checkpoint, unused, write_manifest
from trainer.world import World
from trainer.zero.sharded import ShardedModel

MEAN_TIME_BETWEEN_FAILURES = 4 * 3600.0  # seconds; of one job, as spot machines and large clusters have it
_SHORT_WAIT_S, _LONG_WAIT_S = 0.01, 0.5  # between two looks for the shards of other ranks: at first, and at the most
WEIGHT, METHOD = "weight", "method"
ShardTensors = dict[str, torch.Tensor]  # of a shard, by kind/parameter/start


class CheckpointWriter:
    """When this worker saves, and the save under way."""

    def __init__(self, attempt: Attempt, world: World, every: int | str, keep: int) -> None:
        self.attempt = attempt
        self.world = world
        self.keep = keep
        self.every = every
        self.best: int | None = None  # the step whose checkpoint is kept beside the newest ones
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stall_s = self._write_s = 0.0
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a fixed interval says to save after this step."""
        if self.every == "auto":
            return False
        interval = int(self.every)
        return step % interval == 0

    def overdue(self) -> bool:
        """Whether `auto` says to save now: Young's interval sqrt(2 x stall x time between failures), 1974.

        Never sooner than the last write took. Every rank asks its own clock, and all save where one of them says so.
        """
        if self.every != "auto":
            return False
        square = 2 * self._stall_s * MEAN_TIME_BETWEEN_FAILURES
        interval = max(math.sqrt(square), self._write_s)
        elapsed = time.monotonic() - self._saved_at
        if elapsed <= interval:
            return False
        # The clock starts again with the request, as the save comes a step later.
        self._saved_at = time.monotonic()
        return True

    def save(self, sharded: ShardedModel, method: Method[Any], step: int) -> None:
        """Copy this rank's part to the host and write it in the background; waits for the save before it."""
        self.wait()
        world = self.world
        began = time.monotonic()
        tensors = copy_to_host(sharded, method, world)
        self._stall_s = time.monotonic() - began
        record = {"step": step, "world": world.size, "stage": sharded.stage}
        thread = threading.Thread(target=self._write, args=(record, tensors), daemon=True)
        self._thread = thread
        thread.start()

    def wait(self) -> None:
        """Wait for the save under way, and say so; raises what went wrong in it."""
        if self._thread is not None:
            if self._thread.is_alive():
                print("waiting until the checkpoint is on disk", flush=True)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write(self, record: Record, tensors: ShardTensors) -> None:
        """Write this rank's shard, and on rank 0 the manifest; what the thread of a save does."""
        world = self.world
        began = time.monotonic()
        try:
            step = record["step"]
            folder = checkpoint_folder(self.attempt, step)
            folder.mkdir(parents=True, exist_ok=True)
            if world.leads:
                self.attempt.event("saving", step=step)
            write_shard(folder, world.rank, tensors)
            if world.leads:
                self._commit(folder, record)
                self._clean()
        except BaseException as error:  # kept for the training thread, which raises it at the next save
            self._error = error
        self._write_s = time.monotonic() - began
        self._saved_at = time.monotonic()

    def _commit(self, folder: Path, record: Record) -> None:
        """Wait for the shards of all ranks, then write the manifest; raises Fenced where there is a successor."""
        attempt = self.attempt
        digest_files = [_digest_file(folder, rank) for rank in range(self.world.size)]
        names = {path.name for path in digest_files}
        wait_s = _SHORT_WAIT_S
        while not names.issubset(list_names(folder)):
            attempt.check(cached=True)
            time.sleep(wait_s)
            refresh(folder)  # other ranks may be on other hosts
            longer = 2 * wait_s
            wait_s = min(longer, _LONG_WAIT_S)
        attempt.check()  # one that was paused and has a successor ends at its first save
        files = {}
        for path in digest_files:
            shard = path.with_suffix(".safetensors")
            files[shard.name] = read_json(path)
        # A step that a checkpoint covers must have been reported before the checkpoint exists.
        attempt.sync("metrics.jsonl")
        whole = {**record, "files": files}
        write_manifest(folder, whole)
        stall_s = round(self._stall_s, 4)
        attempt.event("checkpoint", step=record["step"], stall_s=stall_s)

    def _clean(self) -> None:
        """Remove all but the best and the newest `keep`, of earlier attempts too.

        The newest is never removed, even by a ghost.
        """
        attempt = self.attempt
        checkpoints = lineage(attempt.run_dir)
        newest = islice(checkpoints, self.keep)
        kept = [folder for _, folder in newest]
        for start, folder in lineage(attempt.run_dir):
            if start.step == self.best:
                kept.append(folder)
        for folder in unused(attempt):
            if folder not in kept:
                attempt.check()
                remove_checkpoint(folder)


def copy_to_host(sharded: ShardedModel, method: Method[Any], world: World) -> ShardTensors:
    """This rank's part of weights, optimizer and method state, on the host."""
    tensors: ShardTensors = {}
    pieces = sharded.pieces()
    for piece in pieces:
        for kind, held in piece.tensors.items():
            start = 0
            part = held
            if piece.replicated and held.dim():
                elements = held.numel()
                start, stop = _owned_range(elements, world)
                part = held[start:stop]
            if part.numel():
                start += piece.start
                key = f"{kind}/{piece.name}/{start}"
                detached = part.detach()
                tensors[key] = detached.to("cpu", copy=True)
    if world.leads:
        state = method.state()
        for name, value in state.items():
            key = f"{METHOD}/{name}/0"
            tensors[key] = value.to("cpu", copy=True)
    return tensors


def _owned_range(elements: int, world: World) -> tuple[int, int]:
    """The range of elements that this rank answers for when every rank holds them all."""
    size = math.ceil(elements / world.size)
    first = world.rank * size
    start = min(first, elements)  # the last ranks may have none
    after = start + size
    stop = min(after, elements)
    return start, stop


def write_shard(folder: Path, rank: int, tensors: ShardTensors) -> None:
    """Write one rank's tensors, then their hash."""
    name = f"shard-{rank}.safetensors"
    path = folder / name
    save_file(tensors, path)
    with path.open("rb+") as stream:
        hashed = hashlib.file_digest(stream, "sha256")
        os.fsync(stream.fileno())
    sync_folder(folder)
    size = path.stat().st_size
    digest = hashed.hexdigest()
    record = {"sha256": digest, "bytes": size}
    write_json(_digest_file(folder, rank), record)


def _digest_file(folder: Path, rank: int) -> Path:
    """Where the hash and the size of a rank's shard lie, once it is written."""
    return folder / f"shard-{rank}.json"
