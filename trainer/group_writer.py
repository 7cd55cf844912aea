"""The engine that writes answers while a model trains: on the trainer's own base, with its adapter as it is now.

No weight of the base is copied or sent: the engine lays the frozen weights out once, and the trainer's layers are
views of the same memory from then on. The adapter takes the way of one that is served: its export, read again.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from methods.base import Method
from methods.parts.peft_adapter import base_under
from serving.engine import Engine
from serving.sequence import Request
from trainer.generation import cache_bytes
from trainer.renewed_export import RenewedExport
from trainer.reward_model import FACTORS
from trainer.writing_size import ANSWERS_AT_ONCE, cached_tokens

TRAINED = "trained"
BESIDE_BYTES = 64 << 20  # of the adapter's memory, beside twice what is trained


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

    The engine has room for a second adapter, which judges, where one is given by its folder.
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
        adapter_bytes = BESIDE_BYTES + 2 * trained_bytes(model)
        residents = 1
        if judge is not None and (judge / FACTORS).exists():
            adapter_bytes += 2 * (judge / FACTORS).stat().st_size
            residents = 2
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name) / "adapter"
        self._export = RenewedExport(method, model, folder)
        base = base_under(model)
        of_token, _ = cache_bytes(base.config, base.dtype.itemsize)
        self.engine = Engine(
            base,
            residents=residents,
            rows=ANSWERS_AT_ONCE,
            positions=positions,
            tokens=cached_tokens(positions, of_token),
            adapter_bytes=adapter_bytes,
        )

    def load(self) -> str:
        """Take over the adapter as it is now; gives its digest."""
        weights = {}
        changed_frozen = self._method.changed_frozen(self._model)
        changed = set(changed_frozen)
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad or name in changed:
                value = parameter.detach()
                weights[name] = value.to("cpu", copy=True)
        self._export.write(weights)
        return self.engine.load(TRAINED, self._export.folder)

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


def trained_bytes(model: nn.Module) -> int:
    """The bytes of all that is trained."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            total += parameter.numel() * parameter.element_size()
    return total
