"""The engine that writes answers while a model trains: on the trainer's own base, with its adapter as it is now.

No weight of the base is copied or sent: the engine lays the frozen weights out once, and the trainer's layers are
views of the same memory from then on. The adapter takes the way of one that is served: as its export has it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods.base import Method, Tensors
from methods.parts.peft_adapter import base_under
from serving.base import FrozenBase
from serving.engine import Engine
from serving.format import adapter_in
from serving.loading import tail_ranks
from serving.packed import Packed, pack
from serving.sequence import Request
from trainer.generation import cache_bytes
from trainer.renewed_export import RenewedExport
from trainer.reward_model import bytes_of_judge
from trainer.writing_size import ANSWERS_AT_ONCE, cached_tokens

TRAINED = "trained"
PROMPTS_CHUNK = 2560  # tokens of prompts in one pass, whose activations stand beside the trainer's memory
BETWEEN_TENSORS = 1 << 20  # bytes of the adapter's memory, for spaces: each tensor begins at a whole unit


@dataclass(frozen=True)
class AskedAnswer:
    """A prompt, the most tokens that its answer may have, and what all draws of the answer come from."""

    prompt: tuple[int, ...]
    new_tokens: int
    seed: int


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer's token ids, its end with it, and the log-probability that the engine gives each."""

    ids: list[int]
    log_probabilities: list[float]


class GroupWriter:
    """Writes answers with a model in training; a prompt and its answer have less than `positions` tokens.

    The engine has room for a second adapter of its base, which judges, where one is given by its folder.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method[Any],
        positions: int,
        judge: Path | None = None,
    ) -> None:
        self._model = model
        self._method = method
        residents = 1 if judge is None else 2
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name) / "adapter"
        self._export = RenewedExport(method, model, folder)
        self._on_host: Tensors = {}
        trained = base_under(model)
        base = FrozenBase(trained, tail_ranks(trained, residents))
        adapter_bytes = self._adapter_bytes(base)
        if judge is not None:
            adapter_bytes += bytes_of_judge(judge, base)
        of_token, _ = cache_bytes(base.config, base.dtype.itemsize)
        self.engine = Engine(
            base,
            residents=residents,
            rows=ANSWERS_AT_ONCE,
            positions=positions,
            tokens=cached_tokens(positions, of_token),
            chunk=PROMPTS_CHUNK,
            adapter_bytes=adapter_bytes,
        )

    def load(self) -> str:
        """Take over the adapter as it is now; gives its digest."""
        packed = self._packed(self.engine.base)
        self.engine.give(TRAINED, packed)
        return packed.digest

    def _adapter_bytes(self, base: FrozenBase) -> int:
        """What the adapter takes on the device: as it is now, or with all that is trained, if that is more."""
        packed = self._packed(base)
        now: int = packed.block.nbytes
        trained = numbers_trained(self._model)
        at_most: int = trained * base.dtype.itemsize
        return BETWEEN_TENSORS + max(now, at_most)

    def _packed(self, base: FrozenBase) -> Packed:
        """The adapter as it is now."""
        weights = self._weights()
        folder = self._export.folder(weights)
        adapter = adapter_in(folder, base)
        return pack(adapter, base)

    def _weights(self) -> Tensors:
        """What has changed in the model, on the host: in the same memory each time, all copied at once."""
        changed_frozen = self._method.changed_frozen(self._model)
        changed = set(changed_frozen)
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad and name not in changed:
                continue
            value = parameter.detach()
            if name not in self._on_host:
                self._on_host[name] = host_memory(value)
            host = self._on_host[name]
            host.copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._on_host

    def write(
        self,
        asked: Sequence[AskedAnswer],
        ends: Sequence[int],
        temperature: float,
    ) -> list[WrittenAnswer]:
        """The answers, in the order in which they are asked for."""
        requests = []
        for one in asked:
            request = Request(
                one.prompt,
                TRAINED,
                one.new_tokens,
                tuple(ends),
                temperature,
                seed=one.seed,
                scores_answer=True,
            )
            requests.append(request)
        sequences = self.engine.answered(requests)
        return [WrittenAnswer(sequence.answer, sequence.scores) for sequence in sequences]


def host_memory(value: torch.Tensor) -> torch.Tensor:
    """Memory on the host for a tensor, to which a device may copy."""
    pinned = value.is_cuda
    return torch.empty_like(value, device="cpu", pin_memory=pinned)


def numbers_trained(model: nn.Module) -> int:
    """How many numbers are trained."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            total += parameter.numel()
    return total
