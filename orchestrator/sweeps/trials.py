"""The trials of a sweep: configurations with a seed, each with a run id that is a digest of it.

So who submits a trial a second time, from wherever, submits nothing new.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from orchestrator.planning.spec import PlainJob
from orchestrator.sweeps.spec import Axes, AxisValue, LogRange, Sweep, SweptAxis, SweptMethod, six_digits

_DIGITS_OF_IDS = "0123456789abcdefghjkmnpqrstvwxyz"  # as run ids have them
_LENGTH = 10
METHOD_KEY = "method"  # the key under which a configuration has the options of its method


@dataclass(frozen=True)
class Variant:
    """Settings by the dotted key of the job, as JSON: equal ones are one configuration."""

    text: str

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Variant":
        """The configuration with these settings."""
        text = json.dumps(settings, sort_keys=True)
        return cls(text)

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings, by their key."""
        settings: dict[str, Any] = json.loads(self.text)
        return settings

    @cached_property
    def method(self) -> str:
        """The kind of its method; empty where that is the job's."""
        options = self.settings.get(METHOD_KEY, {})
        return str(options.get("kind", ""))

    def changed(self, key: str, value: AxisValue) -> "Variant":
        """The same with another value of one setting."""
        settings = self.settings
        settings[key] = value
        return Variant.of(settings)


@dataclass(frozen=True)
class Trial:
    """A configuration with a seed."""

    configuration: Variant
    seed: int

    def run_id(self, name: str, job: PlainJob) -> str:
        """The run id of the trial in a sweep of this name, of a job as it was written."""
        content = {"job": job, "settings": self.configuration.settings, "seed": self.seed}
        text = json.dumps(content, sort_keys=True, default=str)
        named = f"{name} {text}"
        digest = hashlib.sha256(named.encode())
        content_bytes = digest.digest()
        characters = ""
        for byte in content_bytes[:_LENGTH]:
            number = byte % len(_DIGITS_OF_IDS)
            characters += _DIGITS_OF_IDS[number]
        return f"{name}-{characters}"

    def job(self, sweep: Sweep, job: PlainJob, every: int | None) -> PlainJob:
        """The job of the trial, which is judged every so many steps."""
        settings = self.configuration.settings
        settings["train.seed"] = self.seed
        settings["evaluation.test"] = sweep.test
        if every is not None:
            settings["evaluation.every"] = every
            settings["evaluation.cool_down"] = sweep.cool_down
        plain = with_settings(job, settings)
        plain["name"] = sweep.name
        return plain


def variants_of(sweep: Sweep) -> list[Variant]:
    """All configurations that a sweep begins with, each once."""
    methods: list[SweptMethod | None] = list(sweep.methods) or [None]
    found: list[Variant] = []
    for method in methods:
        axes = dict(sweep.axes)
        fixed: dict[str, Any] = {}
        if method is not None:
            axes |= method.axes
            fixed[METHOD_KEY] = method.options
        if sweep.rule == "random":
            each = sweep.trials // len(methods)
            found += _random_variants(axes, fixed, max(1, each))
        else:
            found += _all_variants(axes, fixed)
    once = dict.fromkeys(found)
    return list(once)


def axis_values(axis: SweptAxis) -> list[AxisValue]:
    """The values of an axis."""
    if isinstance(axis, LogRange):
        return list(axis.values)
    return axis


def _all_variants(axes: Axes, fixed: Mapping[str, Any]) -> Iterator[Variant]:
    """Every combination of the values of axes."""
    keys = list(axes)
    values = map(axis_values, axes.values())
    for combination in product(*values):
        settings = dict(fixed)
        for key, value in zip(keys, combination, strict=True):
            settings[key] = value
        yield Variant.of(settings)


def _random_variants(axes: Axes, fixed: Mapping[str, Any], count: int) -> Iterator[Variant]:
    """So many combinations of values that are drawn from axes, always the same."""
    text = json.dumps(fixed, sort_keys=True)
    rng = random.Random(text)
    for _ in range(count):
        settings = dict(fixed)
        for key, axis in axes.items():
            settings[key] = _draw(rng, axis)
        yield Variant.of(settings)


def _draw(rng: random.Random, axis: SweptAxis) -> AxisValue:
    """A value of an axis: of a range any between its ends."""
    if not isinstance(axis, LogRange):
        return rng.choice(axis)
    low, high = axis.log
    share = rng.random()
    ratio = high / low
    value = low * ratio**share
    return six_digits(value)


def with_settings(job: PlainJob, settings: Mapping[str, Any]) -> PlainJob:
    """A copy of a job with settings, by the dotted key of each."""
    text = json.dumps(job, default=str)
    plain: PlainJob = json.loads(text)
    for key, value in settings.items():
        _put(plain, key, value)
    return plain


def _put(plain: PlainJob, key: str, value: Any) -> None:
    """Set a dotted key of a job; a section in its short form becomes a mapping."""
    *sections, last = key.split(".")
    section: Any = plain
    for name in sections:
        inner = section.get(name)
        if not isinstance(inner, dict):
            inner = {}
            section[name] = inner
        section = inner
    section[last] = value


def with_seeds(chosen: Iterable[Variant], seeds: Iterable[int]) -> list[Trial]:
    """Each configuration with each seed, the first seed of all first."""
    configurations_of = list(chosen)
    trials = []
    for seed in seeds:
        for configuration in configurations_of:
            trials.append(Trial(configuration, seed))
    return trials
