"""What a step reports. A GPU's figures are read one step later, so that it never waits for the host.

They are copied to the host when the step is enqueued, and its duration is what the GPU itself says.
"""

import math
import time
from collections.abc import Iterable, Mapping
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


def checked(figures: Iterable[str]) -> list[str]:
    """The names of an objective's figures, sorted; raises ValueError where one is a name of our own."""
    for name in figures:
        if name in OURS or name.startswith("eval_"):
            raise ValueError(f"figure {name!r} of the objective; allowed: a name of its own, without eval_ in front")
    return sorted(figures)


class Moment:
    """Where a device's work is now: a GPU comes there later than the host."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.monotonic()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event:
            self._event.record()

    def wait(self) -> None:
        """Wait until the device is there."""
        if self._event:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds on the device since an earlier moment; it must have come to both."""
        if self._event and earlier._event:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._time - earlier._time


class Wish(NamedTuple):
    """What is to be done after a step: save; stop, after a save."""

    save: bool = False
    stop: bool = False


@dataclass(frozen=True)
class _Pending:
    step: int
    lr: float
    tokens: int
    data_wait_s: float
    names: list[str]  # of the objective's figures
    figures: torch.Tensor  # loss, rank 0's wish, the objective's, gradient norm, on their way to the host
    end: Moment


class Meter:
    """Collects the figures of each step and appends them to metrics.jsonl."""

    def __init__(self, attempt: Attempt, world: World, steps: int, flops_per_token: float, peak: float) -> None:
        self.attempt = attempt
        self.world = world
        self.steps = steps
        self.flops_per_token = flops_per_token
        self.peak = peak
        self._pending: _Pending | None = None
        self._last = Moment(world.device)

    def record(
        self,
        step: int,
        loss: torch.Tensor,
        beside: Mapping[str, torch.Tensor],
        grad_norm: torch.Tensor,
        lr: float,
        tokens: int,
        wait_s: float,
        wish: Wish,
    ) -> Wish:
        """Report a step; gives rank 0's wish, perhaps late.

        The loss and what the objective logs beside it, by name, are this rank's shares of sums over all ranks.
        """
        names = checked(beside)
        sums = torch.stack(
            [loss, *(torch.full_like(loss, float(flag)) for flag in wish), *(beside[name] for name in names)]
        )
        dist.all_reduce(sums)
        figures = torch.cat([sums, grad_norm.to(sums).view(1)]).to("cpu", non_blocking=True)
        ended = Moment(self.world.device)
        earlier = self.flush()
        self._pending = _Pending(step, lr, tokens, wait_s, names, figures, ended)
        return earlier if self.world.device.type == "cuda" else self.flush()

    def flush(self) -> Wish:
        """Write the step that is still open; gives rank 0's wish. Raises when a figure is not finite."""
        if self._pending is None:
            return Wish()
        open_, self._pending = self._pending, None
        open_.end.wait()
        loss, save, stop, *beside, norm = open_.figures.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found = f"step {open_.step}: the loss is {loss}, the gradient norm {norm}"
            raise FloatingPointError(f"{found}; try a lower train.lr or more train.warmup")
        seconds, self._last = open_.end.since(self._last), open_.end
        if self.world.leads:
            self._write(open_, loss, norm, seconds, dict(zip(open_.names, beside, strict=True)))
        return Wish(save > 0, stop > 0)

    def pause(self) -> None:
        """Leave the time since the last figure out of the speed (evaluations, saves)."""
        self._last = Moment(self.world.device)

    def _write(self, step: _Pending, loss: float, norm: float, seconds: float, beside: dict[str, float]) -> None:
        speed = step.tokens / seconds
        figures = {
            "step": step.step,
            "time": time.time(),
            "loss": loss,
            **beside,
            "lr": step.lr,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / (self.peak * self.world.size),
            "data_wait_s": step.data_wait_s,
            "peak_memory_bytes": peak_memory(self.world.device),
        }
        self.attempt.append("metrics.jsonl", figures)
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.steps - step.step)))
        print(
            f"step {step.step}/{self.steps}  loss {loss:.4f}  norm {norm:.3f}  lr {step.lr:.2e}  "
            f"{speed:,.0f} tokens/s  {left} left",
            flush=True,
        )
