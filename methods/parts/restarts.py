"""Restarts of ReLoRA: when factors start anew and from what, what of the optimizer's state stays, and at which rate.

Lialin et al. 2023, arXiv 2307.05695, section 3: after every share of the steps, and a short warm-up of the learning
rate follows, which makes the schedule "jagged".
"""

import hashlib
import math
from functools import partial

import torch
from torch import Tensor, nn

from methods.base import Fragment, Schedule, View, part_of
from methods.options.low_rank_merged import ReLora
from methods.parts.ranks import largest

RISE = 1e-9  # of the job's rate from one step to the next, relative, that is no warm-up but rounding


def _always_one(step: int) -> float:  # noqa: ARG001
    """The schedule of a method that has not been told the job's."""
    return 1.0


class RestartSchedule:
    """The restarts of a run, in steps done; `base` is the job's schedule of the learning rate."""

    def __init__(self, options: ReLora, steps: int) -> None:
        every = round(options.every * steps)
        warmup = round(options.rewarmup * steps)
        full_rank = round(options.full_rank * steps)
        self.steps = steps
        self.every = max(1, every)
        self.warmup = warmup
        self.full_rank = full_rank  # steps that train the weights themselves, before the first factors
        self.base: Schedule = _always_one

    def due(self, done: int) -> bool:
        """Whether there is a restart after so many steps, before the last; the first factors come with one."""
        if done <= 0 or done < self.full_rank:
            return False
        since_full_rank = done - self.full_rank
        if since_full_rank % self.every:
            return False
        warm_again = done + self.warmup
        if warm_again >= self.steps:
            return False
        return not self._is_warming_up(done)

    def rate(self, step: int) -> float:
        """The learning rate of the step after so many: the job's, or on the way up to it after a restart."""
        since_full_rank = step - self.full_rank
        since_restart = since_full_rank % self.every
        start = step - since_restart
        end = start + self.warmup
        if step >= end or not self.due(start):
            return self.base(step)
        goal = self.base(end)
        warmup_step = since_restart + 1
        return goal * warmup_step / self.warmup

    def _is_warming_up(self, done: int) -> bool:
        """Whether the job's own schedule still rises to the step after so many."""
        rate = self.base(done)
        last_rate = self.base(done - 1)
        bound = last_rate * (1 + RISE)
        return rate > bound


def new_start(name: str, shape: torch.Size, seed: int, done: int) -> Tensor:
    """The start of a factor after so many steps, on the host: zeros for B, and for A what LoRA draws, by its name."""
    start = torch.zeros(shape)
    if ".lora_A." not in name:
        return start
    identity = f"{seed}/{done}/{name}"
    message = identity.encode()
    digest = hashlib.sha256(message).digest()
    first_bytes = digest[:7]
    number = int.from_bytes(first_bytes, "big")
    generator = torch.Generator()
    generator.manual_seed(number)
    slope = math.sqrt(5)
    nn.init.kaiming_uniform_(start, a=slope, generator=generator)
    return start


def keep_largest(view: View, name: str, fragment: Fragment | None, share: float) -> None:
    """Zero both moments of a factor but at a share of its entries, those with the largest first moment; a collective.

    `fragment` is what this rank holds of the factor, if anything.
    """
    first_moment = partial(_first_moment, view)
    moment = view.whole(name, first_moment)
    count = share * moment.numel()
    magnitude = moment.abs()
    kept = largest(magnitude, int(count))
    flat = kept.view(-1)
    if fragment is not None:
        part = part_of(flat, fragment)
        state = view.state(fragment)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            moment.mul_(part.to(moment.device))


def _first_moment(view: View, fragment: Fragment) -> Tensor:
    """What this rank holds of the first moment of a parameter."""
    state = view.state(fragment)
    moment: Tensor = state["exp_avg"]
    return moment
