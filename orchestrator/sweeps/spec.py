"""What a sweep.yaml says: a job, the settings that are tried, seeds, a rule and a budget."""

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from orchestrator.errors import InputError
from orchestrator.planning.spec import load_yaml
from orchestrator.planning.spec_errors import explain
from runfolder.job import JOB_NAME

BETTER_HIGH = "eval_exact_match"  # the measure of which more is better
Rule = Literal["grid", "random", "asha", "race"]
AxisValue = str | int | float | bool | None
PlainSweep = dict[str, Any]  # as YAML has it, before it is validated


class _SweepSection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LogRange(_SweepSection):
    """Values between two ends, in equal ratios; drawn from between them where the rule is random."""

    log: tuple[float, float]
    count: int = Field(5, ge=2, le=100)

    @field_validator("log")
    @classmethod
    def _rises(cls, ends: tuple[float, float]) -> tuple[float, float]:
        low, high = ends
        if not 0 < low < high:
            raise ValueError("must be two numbers above zero, the smaller one first")
        return ends

    @property
    def values(self) -> list[float]:
        """The values, with six digits."""
        low, high = self.log
        steps = self.count - 1
        ratio = (high / low) ** (1 / steps)
        values = []
        for number in range(self.count):
            value = low * ratio**number
            values.append(six_digits(value))
        return values


def six_digits(value: float) -> float:
    """A value with six digits, as people read it."""
    shown = f"{value:.6g}"
    return float(shown)


_SAID_OTHERWISE = {  # keys of a job that are no axis, and what says them
    "name": "name",
    "method": "methods",
    "method.kind": "methods",
    "train.seed": "seeds",
    "train.steps": "the job, as a sweep compares runs of equally many steps",
    "train.epochs": "the job, as a sweep compares runs of equally many steps",
    "evaluation.test": "test",
    "evaluation.every": "rungs",
    "evaluation.cool_down": "cool_down",
    "tracking.uri": "the job",
    "tracking.experiment": "the job",
}


def _axes(found: object) -> dict[str, object]:
    """Axes as they are written, of which none changes what the sweep itself sets or tells its trials apart by."""
    if not isinstance(found, dict):
        raise ValueError("must be a mapping of dotted keys of the job to their values")
    axes = {}
    flaws = []
    for key, values in found.items():
        if key in _SAID_OTHERWISE:
            flaws.append(f"{key} is no axis; what says it is {_SAID_OTHERWISE[key]}")
            continue
        try:
            axes[str(key)] = _axis(values)
        except ValueError as error:
            flaws.append(f"{key}: {error}")
    if flaws:
        raise ValueError("; ".join(flaws))
    return axes


def _axis(found: object) -> object:
    """The values of an axis, or a range of them; raises ValueError where it is neither."""
    are_values = isinstance(found, list) and all(isinstance(value, AxisValue) for value in found)
    if are_values and found:
        return found
    if isinstance(found, dict) and "log" in found and found.keys() <= LogRange.model_fields.keys():
        try:
            return LogRange.model_validate(found)
        except ValidationError as error:
            flaws = explain(error, found, LogRange)
            raise ValueError(", ".join(flaws)) from None
    shown = reprlib.repr(found)
    raise ValueError(f"found {shown}, allowed are a list of values or {{log: [1e-5, 1e-3], count: 5}}")


SweptAxis = LogRange | list[AxisValue]
Axes = Annotated[dict[str, SweptAxis], BeforeValidator(_axes)]  # by the dotted key of the job


class SweptMethod(_SweepSection):
    """A method that is tried, by its options, and axes that it alone has."""

    options: dict[str, Any]
    axes: Axes = {}


class Sweep(_SweepSection):
    """A sweep, as somebody writes it in sweep.yaml."""

    name: str = Field(description="what its run ids begin with, like a job's name")
    job: str = Field(description="the job.yaml, beside the sweep.yaml")
    axes: Axes = Field({}, description="values of each dotted key of the job, for all methods")
    methods: list[SweptMethod] = Field([], description="methods, each with its own axes; none: that of the job")
    seeds: list[int] = Field([0], min_length=1, description="seeds of each configuration")
    rule: Rule = Field("grid", description="which trials are run, and how far")
    trials: int = Field(20, ge=1, le=10_000, description="configurations that rule random draws")
    budget: int = Field(ge=1, description="steps of training that all trials together may take")
    rungs: list[float] = Field(
        [0.11, 0.33], min_length=1, description="shares of a full run after which asha and race judge"
    )
    keep: float = Field(0.34, gt=0, lt=1, description="share of the trials of a rung that goes on")
    finalists: int = Field(3, ge=1, description="methods that race runs in full, beside the reference")
    reference: str = Field("lora", description="the method that race runs in full in any case")
    measure: Literal["eval_loss", "eval_exact_match"] = Field("eval_loss", description="what trials are judged by")
    cool_down: float = Field(
        0.15,
        ge=0,
        le=1,
        description="share of the steps up to a rung in which the rate then falls to zero, to judge",
    )
    test: float = Field(
        0.5, ge=0, lt=1, description="share of the held-out rows that judge what was chosen, and choose nothing"
    )
    parallel: int = Field(4, ge=1, description="trials that wait or run at a time")
    widen: bool = Field(True, description="go on beyond the end of a range where the best value is at it")

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not JOB_NAME.fullmatch(name):
            raise ValueError("must be at most 32 characters: a-z, 0-9 and -, starting with a letter")
        return name

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must differ")
        return seeds

    @field_validator("rungs")
    @classmethod
    def _rise(cls, rungs: list[float]) -> list[float]:
        before = 0.0
        for rung in rungs:
            if not before < rung < 1:
                raise ValueError("must be shares between 0 and 1 that rise")
            before = rung
        return rungs


def read_sweep(path: Path) -> Sweep:
    """The sweep in a file; raises InputError, with a line for each error."""
    return sweep_of(load_yaml(path), path)


def sweep_of(plain: PlainSweep, path: Path) -> Sweep:
    """The sweep in plain data, which is that of a file; raises InputError, with a line for each error."""
    with_methods = _with_methods(plain)
    try:
        return Sweep.model_validate(with_methods)
    except ValidationError as error:
        lines = []
        for line in explain(error, with_methods, Sweep):
            lines.append(f"{path}: {line}")
        raise InputError("\n".join(lines)) from None


def _with_methods(plain: PlainSweep) -> PlainSweep:
    """The sweep with each method as options and axes, of which a bare name is a short form."""
    methods = plain.get("methods")
    if not isinstance(methods, list):
        return plain
    parted = []
    for method in methods:
        options = {"kind": method}
        axes: Any = {}
        if isinstance(method, dict):
            options = dict(method)
            axes = options.pop("axes", {})
        parted.append({"options": options, "axes": axes})
    return {**plain, "methods": parted}
