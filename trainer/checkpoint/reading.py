"""The loading side of checkpoints: fragments by name and range, and a start whose shards hold what was written."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from methods.base import Method
from runfolder.chain import Attempt
from runfolder.files import Record, read_json, sha256
from trainer.checkpoint.lineage import MANIFEST, folder_of
from trainer.checkpoint.saving import METHOD, WEIGHT
from trainer.world import World
from trainer.zero.gather import assign, shape
from trainer.zero.shards import Shards


class CheckpointGone(RuntimeError):
    """The checkpoint that an attempt was to start from cannot be used; the next attempt finds another."""


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


def open_start(attempt: Attempt, world: World) -> Reader | None:
    """The checkpoint that an attempt starts from, None for the beginning; a collective, which raises CheckpointGone.

    Each rank hashes its share of the shards. A damaged checkpoint is set aside, so that nobody takes it again.
    """
    if attempt.start is None:
        return None
    folder = folder_of(attempt, attempt.start.step)
    harm: list[str] = [""] * world.size
    dist.all_gather_object(harm, _harm(folder, world))
    found = "; ".join(filter(None, harm))
    if not found:
        return Reader(folder)
    if world.leads and folder.exists():
        folder.rename(folder.with_name(f".damaged-{folder.name}"))
    dist.barrier()  # no rank fails, and with that ends the others, before it is set aside
    raise CheckpointGone(f"step {attempt.start.step} of attempt {attempt.start.attempt}: {found}")


def _harm(folder: Path, world: World) -> str:
    """What is wrong with this rank's share of a checkpoint's shards; empty when nothing is."""
    try:
        files: dict[str, Record] = read_json(folder / MANIFEST)["files"]
        shares = sorted(files)[world.rank :: world.size]
        changed = [name for name in shares if sha256(folder / name) != files[name]["sha256"]]
    except (OSError, ValueError) as error:
        return str(error)
    return f"{', '.join(changed)}: not what was written" if changed else ""
