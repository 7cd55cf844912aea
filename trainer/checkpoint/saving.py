"""The saving side of checkpoints, one per worker.

The only stall is the copy to the host's memory; hashing, writing and clean-up happen in a thread.
"""

import hashlib
import math
import os
import shutil
import threading
import time
import uuid
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from methods.base import Method
from runfolder.chain import Attempt
from runfolder.files import Record, read_json, sync_folder, write_json
from trainer.checkpoint.lineage import folder_of, lineage, unused, write_manifest
from trainer.world import World
from trainer.zero.shards import Shards

MEAN_TIME_BETWEEN_FAILURES = 4 * 3600.0  # seconds; of one job, as spot machines and large clusters have it
WEIGHT, METHOD = "weight", "method"


class Checkpoints:
    """When this worker saves, and the save under way."""

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
            folder = folder_of(self.attempt, record["step"])
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
        write_manifest(folder, {**record, "files": files})
        self.attempt.event("checkpoint", step=record["step"], stall_s=round(self._stall_s, 4))

    def _clean(self) -> None:
        """Remove all but the newest `keep`, of earlier attempts too. The newest is never removed, even by a ghost."""
        kept = [folder for _, folder in islice(lineage(self.attempt.run_dir), self.keep)]
        for folder in unused(self.attempt):
            if folder not in kept:
                self.attempt.check()
                # A ghost that still writes into the folder does not find it after this.
                trash = folder.rename(folder.with_name(f".trash-{uuid.uuid4().hex}"))
                shutil.rmtree(trash)


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
