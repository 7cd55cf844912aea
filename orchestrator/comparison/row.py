"""A row of a comparison: runs that differ in nothing but the seed, and their measures."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from orchestrator.comparison.group import SEED
from orchestrator.comparison.measure import MEASURES
from orchestrator.comparison.run import TrackedRun


@dataclass(frozen=True)
class Metric:
    """A measure over the runs of a row; std is the sample's, 0 for one run."""

    mean: float
    std: float
    n: int

    def to_json(self) -> dict[str, float | None]:
        """The metric as plain data; a value that is not finite is null."""
        mean = _finite(self.mean)
        std = _finite(self.std)
        return {"mean": mean, "std": std, "n": self.n}


@dataclass(frozen=True)
class ComparisonRow:
    """Runs that differ in nothing but the seed."""

    label: str
    state: str
    differences: dict[str, str]
    runs: tuple[TrackedRun, ...]

    @property
    def seeds(self) -> list[str]:
        """The seeds of its runs, in numeric order."""
        seeds = []
        for run in self.runs:
            seed = run.params.get(SEED, "?")
            seeds.append(seed)
        return sorted(seeds, key=_numeric)

    def metric(self, key: str) -> Metric | None:
        """Mean and spread of a measure; None where no run has it."""
        values = []
        for run in self.runs:
            if key in run.metrics:
                values.append(run.metrics[key])
        if not values:
            return None
        std = _standard_deviation(values)
        number = len(values)
        mean = math.fsum(values) / number
        return Metric(mean, std, number)

    def to_json(self) -> dict[str, Any]:
        """The row as plain data, for JSON."""
        metrics = {}
        for measure in MEASURES:
            metric = self.metric(measure.key)
            if metric is not None:
                metrics[measure.key] = metric.to_json()
        run_ids = []
        mlflow_run_ids = []
        for run in self.runs:
            run_ids.append(run.run_id)
            mlflow_run_ids.append(run.mlflow_run_id)
        return {
            "label": self.label,
            "state": self.state,
            "n": len(self.runs),
            "seeds": self.seeds,
            "run_ids": run_ids,
            "mlflow_run_ids": mlflow_run_ids,
            "differences": self.differences,
            "figures": metrics,
        }


def _numeric(seed: str) -> tuple[int, str]:
    return len(seed), seed


def _standard_deviation(values: list[float]) -> float:
    """That of a sample; 0 for one value, and where one is not finite."""
    are_finite = all(map(math.isfinite, values))
    if len(values) == 1 or not are_finite:
        return 0.0
    return statistics.stdev(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
