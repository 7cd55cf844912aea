"""What the runs of a comparison were judged by, as arrays by seed and held-out row, so that rows can be paired.

Shape suffixes are those of intervals.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.comparison.group import SEED
from orchestrator.comparison.intervals import Contrast, contrast, contrast_unpaired, ratio_values
from orchestrator.comparison.measure import EXACT_MATCH, OF_TEST_ROWS
from orchestrator.comparison.run import TrackedRun
from orchestrator.comparison.variances import SeedRows
from runfolder.folders import home
from runfolder.news import UNREADABLE
from runfolder.row_results import RowResult, last_row_results, read_row_results

RowKey = tuple[str, int]  # the digest of a row's content, and how many equal ones were before it
ResultsByKey = Mapping[RowKey, RowResult]
ReadResults = Callable[[TrackedRun], ResultsByKey]
_LOSS = "_loss"  # what measures of the loss end with
_FEWEST_PAIRS = 2  # seeds that both have, with which only these are compared


@dataclass(frozen=True)
class QualityByRow:
    """What came of one configuration: its seeds, and for each of them a value by held-out row.

    Without results by row there is one value for each seed.
    """

    seeds: tuple[str, ...]
    values_SN: SeedRows

    def alone(self) -> Contrast:
        """Its mean, and how well that is known."""
        return contrast(self.values_SN)

    def less(self, other: "QualityByRow") -> Contrast:
        """Its mean less that of another one: on the same rows, and as far as possible of the same seeds."""
        shared = []
        for seed in self.seeds:
            if seed in other.seeds:
                shared.append(seed)
        pairs = len(shared)
        fewest = min(len(self.seeds), len(other.seeds))
        if pairs == fewest or pairs >= _FEWEST_PAIRS:
            differences_SN = self._of(shared) - other._of(shared)
            return contrast(differences_SN)
        return contrast_unpaired(self.values_SN, other.values_SN)

    def _of(self, seeds: Sequence[str]) -> SeedRows:
        """The values of some of its seeds, in their order."""
        places = []
        for seed in seeds:
            places.append(self.seeds.index(seed))
        return self.values_SN[places]


def read_results(run: TrackedRun) -> ResultsByKey:
    """What the last evaluation of a run found of each row, where its folder or a mirror of it is on this machine."""
    for run_dir in _places_of_run(run):
        with suppress(*UNREADABLE):
            path = last_row_results(run_dir)
            if path is not None:
                results = read_row_results(path)
                return _by_key(results)
    return {}


def outcomes_of(groups: Sequence[Sequence[TrackedRun]], measure: str, read: ReadResults) -> list[QualityByRow]:
    """The outcomes of configurations, each with its runs, by a measure that all of them have.

    They are by row where every run has results, of the rows that all have; else there is one value for each run.
    """
    found = []
    for runs in groups:
        results = list(map(read, runs))
        found.append(results)
    keys = _shared_keys(found, measure)
    outcomes = []
    for runs, results in zip(groups, found, strict=True):
        seeds = []
        of_runs = []
        for run in runs:
            seed = run.params.get(SEED, run.run_id)
            value = run.metrics[measure]
            seeds.append(seed)
            of_runs.append([value])
        values = np.array(of_runs)
        if keys:
            values = _values(results, keys, measure)
        outcome = QualityByRow(tuple(seeds), values)
        outcomes.append(outcome)
    return outcomes


def _places_of_run(run: TrackedRun) -> Iterable[Path]:
    """Where on this machine the files of a run may be."""
    yield home() / "runs" / run.run_id
    mirrors = home() / "mirrors"
    yield from mirrors.glob(f"*/{run.run_id}")


def _by_key(results: Iterable[RowResult]) -> ResultsByKey:
    """The results by what their rows hold."""
    by_key = {}
    before: Counter[str] = Counter()
    for result in results:
        digest = result.digest
        key = (digest, before[digest])
        before[digest] += 1
        by_key[key] = result
    return by_key


def _shared_keys(found: Sequence[Sequence[ResultsByKey]], measure: str) -> list[RowKey]:
    """The rows of which every run knows the measure, in the order of the first one."""
    shared: dict[RowKey, None] | None = None
    for results in found:
        for of_run in results:
            known: dict[RowKey, None] = {}
            for key, result in of_run.items():
                is_shared = shared is None or key in shared
                if is_shared and _has(result, measure):
                    known[key] = None
            shared = known
    return list(shared or ())


def _has(result: RowResult, measure: str) -> bool:
    """Whether a row was judged by a measure."""
    if result.test != measure.startswith(OF_TEST_ROWS):
        return False
    if measure.endswith(EXACT_MATCH):
        return result.correct is not None
    if measure.endswith(_LOSS):
        return result.loss is not None and bool(result.weight)
    return False


def _values(results: Sequence[ResultsByKey], keys: Sequence[RowKey], measure: str) -> SeedRows:
    """The values of the runs of a configuration, by row: 0 or 1, or what has the loss for its mean."""
    values = []
    for of_run in results:
        of_rows = []
        for key in keys:
            result = of_run[key]
            value = result.loss
            if measure.endswith(EXACT_MATCH):
                value = result.correct
            of_rows.append(value)
        values.append(of_rows)
    values_SN = np.array(values, dtype=np.float64)
    if measure.endswith(EXACT_MATCH):
        return values_SN
    first = results[0]
    weights = []
    for key in keys:
        result = first[key]
        weights.append(result.weight)
    weights_N = np.array(weights, dtype=np.float64)
    return ratio_values(values_SN, weights_N)
