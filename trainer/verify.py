"""Whether an output, loaded as its users will load it, says what the trained model says: seen on a few rows.

Shapes: T positions of a row, V tokens of the vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer import speed
from trainer.reload import Placement, space_for_copy
from trainer.run import Run

OBSERVED_ROWS, OBSERVED_TOKENS = 4, 64  # at most; of the training data
LARGE = 10**9  # parameters, above which the log says that the check takes a while
# Of logits, relative to the largest: what another order of the same sums makes of them, at the least.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ELSEWHERE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # the same where another kind of device computes them
SPREADS = 4  # times the difference between two passes of the loaded model, which may be larger in a deep one


class OutputDiffers(RuntimeError):
    """An output is not the model that was trained."""


@dataclass(frozen=True)
class Observation:
    """The token ids [T] of a few rows, without virtual tokens, and the trained model's logits [T, V] after each."""

    ids: list[torch.Tensor]
    logits: list[torch.Tensor]


@dataclass(frozen=True)
class LogitsGap:
    """The largest difference of a loaded output's logits from the trained model's, and what rounding explains."""

    gap: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether both are the same model; what is not finite is none."""
        return self.gap <= self.allowed


def observe(run: Run) -> Observation:
    """What the trained model says of the first rows of its data; every rank calls it, as all hold its parts."""
    model = run.model
    tokens = run.tokens
    device = run.world.device
    virtual = run.job.method.virtual_tokens
    length = virtual + OBSERVED_TOKENS
    rows = []
    written = []
    count = min(OBSERVED_ROWS, len(tokens))
    for number in range(count):
        document = tokens.document(number)
        ids = document.ids[:length]
        row = torch.tensor(ids, dtype=torch.long)
        rows.append(row)
        written.append(row[virtual:])
    model.eval()
    logits = []
    for row in rows:
        on_device = row.to(device)
        of_row = _logits(model, on_device)
        logits.append(of_row[virtual:])
    model.train()
    return Observation(written, logits)


def compare_loaded(run: Run, load: Callable[[Placement], nn.Module], observation: Observation) -> LogitsGap:
    """Load a model where it fits, and compare it with what was seen of the trained one; rank 0 alone."""
    if speed.count_weights(run.model) > LARGE:
        print("loading the output once more, to compare it with the trained model", flush=True)
    device = run.world.device
    began = time.monotonic()
    with space_for_copy(run) as placement:
        model = load(placement)
        finding = _compared(model, observation, run.dtype, device)
        del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elapsed = time.monotonic() - began
    seconds = round(elapsed, 2)
    run.attempt.event("compared", gap=finding.gap, allowed=finding.allowed, seconds=seconds)
    return finding


def _compared(model: nn.Module, observation: Observation, dtype: torch.dtype, trained_on: torch.device) -> LogitsGap:
    """The gap to the nearer one of two passes: in the model's own dtypes, and under autocast, as it was trained.

    Their distance shows how far rounding reaches. In fp32 the second pass has the row twice, so it sums in another
    order.
    """
    device = _computing_device(model)
    lower = dtype != torch.float32
    largest = spread = plain_gap = autocast_gap = 0.0
    for ids, expected in zip(observation.ids, observation.logits, strict=True):
        row = ids.to(device)
        plain = _logits(model, row)
        with torch.autocast(device.type, dtype, enabled=lower):
            other = _logits(model, row, copies=2)
        expected = expected[-len(plain) :]
        magnitude = expected.abs()
        largest_of_row = float(magnitude.max())
        largest = max(largest, largest_of_row)
        spread = _larger(spread, plain - other)
        plain_gap = _larger(plain_gap, plain - expected)
        autocast_gap = _larger(autocast_gap, other - expected)
    rounding = ROUNDING[dtype]
    if device.type != trained_on.type:
        rounding = ELSEWHERE[dtype]
    gap = min(plain_gap, autocast_gap)
    of_dtype = rounding * largest
    of_passes = SPREADS * spread
    return LogitsGap(gap, max(of_dtype, of_passes))


def _computing_device(model: nn.Module) -> torch.device:
    """Where a loaded model computes; what lies on disk is on `meta`, and computed on the host."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def _logits(model: Any, ids: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """The logits [T, V] of one row, fp32 on the host, from a pass over so many copies of it.

    An output with virtual tokens has logits for these in front, which are left out. One that scores has a number for
    the row alone, as if for its last position: [1, 1].
    """
    length = len(ids)
    rows = ids.expand(copies, -1)
    with torch.no_grad():
        out = model(input_ids=rows, use_cache=False)
        first = out.logits[0]
        first = torch.atleast_2d(first)
    logits: torch.Tensor = first.float().cpu()
    return logits[-length:]


def _larger(so_far: float, difference: torch.Tensor) -> float:
    """The largest absolute difference yet; infinite once one is not a number."""
    magnitude = difference.abs()
    comparable = magnitude.nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest = float(comparable.max())
    return max(so_far, largest)
