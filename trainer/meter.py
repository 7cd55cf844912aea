"""What a step reports. A GPU's metrics are read one step later, so that it never waits for the host.

They are copied to the host when the step is enqueued, and its duration is what the GPU itself says.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from runfolder.chain import Attempt
from trainer.speed import peak_memory
from trainer.world import World

OURS = frozenset(
    ("step", "time", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "data_wait_s", "peak_memory_bytes")
)


def checked(names: Iterable[str]) -> list[str]:
    """The names of an objective's metrics, sorted; raises ValueError where one is a name of our own."""
    for name in names:
        if name in OURS or name.startswith("eval_"):
            raise ValueError(f"figure {name!r} of the objective; allowed: a name of its own, without eval_ in front")
    return sorted(names)


class Timestamp:
    """Where a device's work is now: a GPU comes there later than the host."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.monotonic()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Wait until the device is there."""
        if self._event:
            self._event.synchronize()

    def since(self, earlier: "Timestamp") -> float:
        """Seconds on the device since an earlier timestamp; it must have come to both."""
        if self._event and earlier._event:
            milliseconds = earlier._event.elapsed_time(self._event)
            return float(milliseconds) / 1000
        return self._time - earlier._time


class SaveRequest(NamedTuple):
    """A save request after a step, of one rank or any of them: to save; to stop, after a save."""

    save: bool = False
    stop: bool = False


@dataclass(frozen=True)
class _Pending:
    step: int
    lr: float
    tokens: int
    data_wait_s: float
    names: list[str]  # of the objective's metrics
    values: torch.Tensor  # on their way to the host: loss, ranks that ask to save and to stop, the objective's, norm
    end: Timestamp


class Meter:
    """Measures each step and appends its metrics to metrics.jsonl."""

    def __init__(self, attempt: Attempt, world: World, steps: int, flops_per_token: float, peak: float) -> None:
        self.attempt = attempt
        self.world = world
        self.steps = steps
        self.flops_per_token = flops_per_token
        self.peak = peak
        self._pending: _Pending | None = None
        self._last = Timestamp(world.device)

    def record(
        self,
        step: int,
        loss: torch.Tensor,
        beside: Mapping[str, torch.Tensor],
        grad_norm: torch.Tensor,
        lr: float,
        tokens: int,
        wait_s: float,
        request: SaveRequest,
    ) -> SaveRequest:
        """Report a step; gives what any rank asks for, on a GPU that of the step before.

        The loss and what the objective logs beside it, by name, are this rank's shares of sums over all ranks.
        """
        device = self.world.device
        names = checked(beside)
        flags = [torch.full_like(loss, float(flag)) for flag in request]
        logged = [beside[name] for name in names]
        sums = torch.stack([loss, *flags, *logged])
        dist.all_reduce(sums)
        norm = grad_norm.to(sums)
        values = torch.cat([sums, norm.view(1)])
        on_host = values.to("cpu", non_blocking=True)
        end = Timestamp(device)
        earlier = self.flush()
        self._pending = _Pending(step, lr, tokens, wait_s, names, on_host, end)
        if device.type == "cuda":
            return earlier
        return self.flush()

    def flush(self) -> SaveRequest:
        """Write the step that is still open; gives what any rank asks for. Raises when loss or norm is not finite."""
        if self._pending is None:
            return SaveRequest()
        pending = self._pending
        self._pending = None
        end = pending.end
        end.wait()
        values = pending.values.tolist()
        loss, save, stop, *logged, norm = values
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite:
            state = f"step {pending.step}: the loss is {loss}, the gradient norm {norm}"
            raise FloatingPointError(f"{state}; try a lower train.lr or more train.warmup")
        seconds = end.since(self._last)
        self._last = end
        if self.world.leads:
            beside = dict(zip(pending.names, logged, strict=True))
            self._write(pending, loss, norm, seconds, beside)
        return SaveRequest(save > 0, stop > 0)

    def pause(self) -> None:
        """Leave the time since the last report out of the speed (evaluations, saves)."""
        device = self.world.device
        self._last = Timestamp(device)

    @contextmanager
    def pausing(self) -> Iterator[SaveRequest]:
        """Write the step that is still open, and leave what the block takes out of the speed.

        Gives what any rank asked for after that step, which would else be known a step later.
        """
        yield self.flush()
        self.pause()

    def _write(self, step: _Pending, loss: float, norm: float, seconds: float, beside: dict[str, float]) -> None:
        """Append a step to metrics.jsonl, and show it in the log."""
        speed = step.tokens / seconds
        flops = speed * self.flops_per_token
        peak = self.peak * self.world.size
        metrics = {
            "step": step.step,
            "time": time.time(),
            "loss": loss,
            **beside,
            "lr": step.lr,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "mfu": flops / peak,
            "data_wait_s": step.data_wait_s,
            "peak_memory_bytes": peak_memory(self.world.device),
        }
        self.attempt.append("metrics.jsonl", metrics)
        steps_left = self.steps - step.step
        seconds_left = seconds * steps_left
        left = as_clock(seconds_left)
        words = [f"step {step.step}/{self.steps}"]
        if "reward" in beside:
            words.append(f"reward {beside['reward']:.4f}")
        words += [
            f"loss {loss:.4f}",
            f"norm {norm:.3f}",
            f"lr {step.lr:.2e}",
            f"{speed:,.0f} tokens/s",
            f"{left} left",
        ]
        print("  ".join(words), flush=True)


def as_clock(seconds: float) -> str:
    """A duration as hours:minutes:seconds; a day and more is as many hours."""
    total = int(seconds)
    minutes, whole_seconds = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    on_the_clock = f"{minutes:02d}:{whole_seconds:02d}"
    return f"{hours:02d}:{on_the_clock}"
