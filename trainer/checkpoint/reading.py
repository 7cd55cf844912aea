"""The loading side of checkpoints: fragments by name and range, and a start whose shards hold what was written."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from methods.base import Fragment, Method
from runfolder.chain import Attempt
from runfolder.files import Record, read_json, sha256
from trainer.checkpoint.lineage import MANIFEST, checkpoint_folder
from trainer.checkpoint.saving import METHOD, WEIGHT
from trainer.world import World
from trainer.zero.layout import held_piece
from trainer.zero.sharded import ShardedModel


class CheckpointGone(RuntimeError):
    """The checkpoint that an attempt was to start from cannot be used; the next attempt finds another."""


Key = tuple[str, str]  # kind and parameter


class _Stored(NamedTuple):
    """A tensor of a shard: elements from `start` on of a flattened parameter's state, or a scalar of it."""

    start: int
    key: str
    file: Any  # of safe_open

    def slice_(self) -> Any:
        """Access to parts of the tensor, of which none is read yet."""
        return self.file.get_slice(self.key)

    def tensor(self) -> torch.Tensor:
        """The whole tensor, read now."""
        tensor: torch.Tensor = self.file.get_tensor(self.key)
        return tensor


class CheckpointReader:
    """Random access to a checkpoint's fragments by kind, parameter and range."""

    def __init__(self, folder: Path) -> None:
        manifest = read_json(folder / MANIFEST)
        self.step = int(manifest["step"])
        self._stored: dict[Key, list[_Stored]] = defaultdict(list)
        for shard in sorted(manifest["files"]):
            file: Any = safe_open(folder / shard, framework="pt")
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, name, start = key.split("/")
                offset = int(start)
                stored = _Stored(offset, key, file)
                of_parameter = self._stored[kind, name]
                of_parameter.append(stored)

    def kinds(self, name: str) -> set[str]:
        """What the checkpoint holds of a parameter beside its weights."""
        kinds = set()
        for kind, parameter in self._stored:
            if parameter == name and kind != WEIGHT:
                kinds.add(kind)
        return kinds

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened parameter's state, from whichever ranks wrote them."""
        missing = stop - start
        dtype = self._dtype(kind, name)
        out = torch.empty(missing, dtype=dtype)
        of_parameter = self._stored[kind, name]
        for stored in of_parameter:
            part = stored.slice_()
            begin = stored.start
            (size,) = part.get_shape()
            end = begin + size
            first = max(start, begin)
            length = min(stop, end) - first
            if length > 0:
                source = first - begin
                target = first - start
                out[target : target + length] = part[source : source + length]
                missing -= length
        if missing:
            where = f"{kind} of {name}[{start}:{stop}]"
            raise ValueError(f"{missing} elements of {where} are not in the checkpoint")
        return out

    def _dtype(self, kind: str, name: str) -> torch.dtype | None:
        """The dtype of a parameter's state; None where the checkpoint has none of it."""
        stored = self._stored[kind, name]
        if not stored:
            return None
        part = stored[0].slice_()
        nothing: torch.Tensor = part[:0]
        return nothing.dtype

    def scalar(self, kind: str, name: str) -> torch.Tensor:
        """A 0-d state of a parameter, from any rank: all have the same."""
        stored = self._stored[kind, name]
        return stored[0].tensor()

    def is_scalar(self, kind: str, name: str) -> bool:
        """Whether a state is one number for the whole parameter."""
        stored = self._stored[kind, name]
        part = stored[0].slice_()
        return not part.get_shape()

    def load_weights(self, model: nn.Module, method: Method[Any]) -> None:
        """Set what this rank holds of every trained or changed parameter of a model that has no engine yet."""
        changed = set(method.changed_frozen(model))
        for name, parameter in model.named_parameters():
            is_saved = parameter.requires_grad or name in changed
            held = held_piece(name, parameter) if is_saved else None
            if held is not None:
                start = held.start
                weight = held.tensors[WEIGHT]
                stop = start + len(weight)
                weight.copy_(self.read(WEIGHT, name, start, stop))

    def load_optimizer(self, sharded: ShardedModel) -> None:
        """Set the optimizer's state of what this rank holds, and the method's pieces."""
        fragments = sharded.fragments()
        for fragment in fragments:
            kinds = self.kinds(fragment.name)
            for kind in kinds:
                state = self._state(kind, fragment)
                sharded.set_state(fragment, kind, state)
        pieces = sharded.method.pieces()
        for piece in pieces:
            start = piece.start
            for kind, tensor in piece.tensors.items():
                stop = start + len(tensor)
                tensor.copy_(self.read(kind, piece.name, start, stop))

    def _state(self, kind: str, fragment: Fragment) -> torch.Tensor:
        """The optimizer's state of one kind for a fragment: its range, or a scalar of the whole parameter."""
        name = fragment.name
        if self.is_scalar(kind, name):
            return self.scalar(kind, name)
        return self.read(kind, name, fragment.start, fragment.stop)

    def method_state(self) -> dict[str, torch.Tensor]:
        """What the method asked to keep, by name."""
        state = {}
        for (kind, name), stored in self._stored.items():
            if kind == METHOD:
                state[name] = stored[0].tensor()
        return state


def open_start(attempt: Attempt, world: World) -> CheckpointReader | None:
    """The checkpoint that an attempt starts from, None for the beginning; a collective, which raises CheckpointGone.

    Each rank hashes its share of the shards. A damaged checkpoint is set aside, so that nobody takes it again.
    """
    start = attempt.start
    if start is None:
        return None
    folder = checkpoint_folder(attempt, start.step)
    damages: list[str] = [""] * world.size
    of_rank = _damage(folder, world)
    dist.all_gather_object(damages, of_rank)
    damaged = filter(None, damages)
    damage = "; ".join(damaged)
    if not damage:
        return CheckpointReader(folder)
    if world.leads and folder.exists():
        aside = folder.with_name(f".damaged-{folder.name}")
        folder.rename(aside)
    dist.barrier()  # no rank fails, and with that ends the others, before it is set aside
    raise CheckpointGone(f"step {start.step} of attempt {start.attempt}: {damage}")


def _damage(folder: Path, world: World) -> str:
    """What is wrong with this rank's share of a checkpoint's shards; empty when nothing is."""
    changed = []
    try:
        manifest = read_json(folder / MANIFEST)
        files: dict[str, Record] = manifest["files"]
        names = sorted(files)
        for name in names[world.rank :: world.size]:
            digest = sha256(folder / name)
            written = files[name]
            if digest != written["sha256"]:
                changed.append(name)
    except (OSError, ValueError) as error:
        return str(error)
    if not changed:
        return ""
    shards = ", ".join(changed)
    return f"{shards}: not what was written"
