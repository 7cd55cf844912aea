"""Runs side by side, as MLflow has them: what differs in their configuration, and what came of it."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.comparison.conclusion import conclusion
from orchestrator.comparison.group import SEED, groups_of
from orchestrator.comparison.label import labels_of
from orchestrator.comparison.measure import MEASURES, Measure
from orchestrator.comparison.places import USUAL, RankingWish, rankings_of
from orchestrator.comparison.ranking import Ranked, Ranking
from orchestrator.comparison.row import ComparisonRow
from orchestrator.comparison.row import Metric as Metric
from orchestrator.comparison.run import TrackedRun, load_runs
from orchestrator.errors import InputError
from orchestrator.tracking.collect import CollectProgress, deliver_all, with_reasons
from orchestrator.tracking.store import client, resolve, sqlite_file
from orchestrator.tracking.trouble import diagnose, is_of_mlflow
from runfolder.variables import without_password

_NOT_COMPARED = {SEED, "name"}
_DIGEST_SHOWN = 12  # characters
QUALITIES = 7  # so many of the measures, from the first, are what rows are judged by


def display_value(param: str, value: str) -> str:
    """A param's value as it is shown; of a digest the first characters are enough."""
    if param.endswith("_digest"):
        return value[:_DIGEST_SHOWN]
    return value


@dataclass(frozen=True)
class Comparison:
    """Rows, best first; `constant` holds what all runs share, `columns` the params in which they differ.

    `undelivered`: run id or cluster -> why MLflow has not got all of it; such runs are not here, or not wholly.
    `rankings`: of the rows that succeeded, one for each kind of run; `barrier` says why there are several.
    """

    title: str
    uri: str
    constant: dict[str, str]
    columns: list[str]
    rows: list[ComparisonRow]
    undelivered: dict[str, str] = field(default_factory=dict)
    rankings: tuple[Ranking, ...] = ()
    barrier: str | None = None

    @property
    def verdict(self) -> str | None:
        """What the largest ranking says; None where nothing is to be compared."""
        if not self.rankings or len(self.rankings[0].ranked) < 2:
            return None
        return conclusion(self.rankings[0])

    def place_of(self, row: ComparisonRow) -> tuple[Ranking, Ranked] | None:
        """The ranking that has a row, and what it says of it; None where none has it."""
        for ranking in self.rankings:
            for ranked in ranking.ranked:
                if ranked.contender.label == row.label:
                    return ranking, ranked
        return None

    @property
    def shows_ranks(self) -> bool:
        """Whether any difference has an interval."""
        telling = [ranking.says_something for ranking in self.rankings]
        return any(telling)

    @property
    def runs(self) -> list[TrackedRun]:
        """All runs, in the order of the rows."""
        runs: list[TrackedRun] = []
        for row in self.rows:
            runs += row.runs
        return runs

    @property
    def measures(self) -> list[Measure]:
        """The measures that some run has."""
        reported = _reported(self.runs)
        measures = []
        for measure in MEASURES:
            if measure.key in reported:
                measures.append(measure)
        return measures

    @property
    def quality(self) -> Measure:
        """What rows are judged by: as wanted, else exact match, accuracy or loss, of test rows if all have some."""
        for ranking in self.rankings:
            return ranking.measure
        return _quality(self.runs)

    def heading(self, param: str) -> str:
        """The short name of a param: its last part, where that is clear."""
        short = _last_part(param)
        parts = Counter(map(_last_part, self.columns))
        return short if parts[short] == 1 else param

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data; a value that is not finite is null."""
        rows = []
        for row in self.rows:
            rows.append(row.to_json())
        return {
            "experiment": self.title,
            "uri": self.uri,
            "constant": self.constant,
            "columns": self.columns,
            "rows": rows,
            "undelivered": self.undelivered,
            "verdict": self.verdict,
            "barrier": self.barrier,
            "rankings": [ranking.to_json() for ranking in self.rankings],
        }


def compare(
    experiment: str | None,
    uri: str | None,
    cluster: str | None = None,
    progress: CollectProgress = lambda _cluster, _runs: None,
    wish: RankingWish = USUAL,
) -> Comparison:
    """Read the runs of an experiment (None: of all) from MLflow, which first gets what it lacks of runs.

    Of those that this machine has or knows of, that is, and of a cluster's. Raises InputError for an experiment that
    is not there, a reference that is none of its rows, and where MLflow refuses to answer, ConnectionError where it
    cannot be reached.
    """
    undelivered = deliver_all(cluster, progress)
    uri = resolve(uri)
    shown_uri = without_password(uri, uri)
    file = sqlite_file(uri)
    if file and not file.exists():
        raise InputError(with_reasons(f"nothing was tracked yet: there is no {file}", undelivered))
    try:
        runs = load_runs(client(uri), experiment, shown_uri)
    except InputError as error:
        raise InputError(with_reasons(str(error), undelivered)) from None
    except Exception as error:
        is_of_system = isinstance(error, OSError | ImportError)
        if not is_of_system and not is_of_mlflow(error):
            raise
        diagnosis = diagnose(error, uri)
        problem = f"MLflow at {shown_uri}: {diagnosis.reason}"
        if diagnosis.lasting:
            raise InputError(f"{problem}; {diagnosis.fix}") from error
        raise ConnectionError(problem) from error
    title = experiment or "all experiments"
    comparison = arrange(runs, title, shown_uri, wish)
    return replace(comparison, undelivered=undelivered)


def arrange(runs: list[TrackedRun], title: str, uri: str, wish: RankingWish = USUAL) -> Comparison:
    """Group runs that differ in the seed alone, rank the groups, and sort them, best first."""
    columns = []
    constant = {}
    for param in _compared_params(runs):
        values = {run.params.get(param) for run in runs}
        if len(values) > 1:
            columns.append(param)
            continue
        first = runs[0]
        constant[param] = first.params[param]
    rows = _comparison_rows(runs, columns)
    quality = _quality(runs, wish.measure)
    rows.sort(key=lambda row: _sort_key(row, quality))
    rankings, barrier = rankings_of(rows, quality, wish)
    in_order = []
    for ranking in rankings:
        for each in ranking.ranked:
            in_order.append(each.contender.number)
    unranked = set(range(len(rows))) - set(in_order)
    in_order += sorted(unranked)
    ordered = []
    for number in in_order:
        ordered.append(rows[number])
    return Comparison(title, uri, constant, columns, ordered, {}, rankings, barrier)


def _compared_params(runs: list[TrackedRun]) -> list[str]:
    """The params of all runs but those in which equal configurations may differ, by name."""
    params: set[str] = set()
    for run in runs:
        params.update(run.params)
    return sorted(params - _NOT_COMPARED)


def _comparison_rows(runs: list[TrackedRun], columns: list[str]) -> list[ComparisonRow]:
    """A row for each group of runs that are alike, in the order of the runs."""
    groups = groups_of(runs, columns)
    labels = labels_of(groups, columns)
    rows = []
    for label, group in zip(labels, groups, strict=True):
        first = group[0]
        differences = {}
        for param in columns:
            differences[param] = first.params.get(param, "")
        group_runs = tuple(group)
        row = ComparisonRow(label, first.state, differences, group_runs)
        rows.append(row)
    return rows


def _last_part(param: str) -> str:
    """The last part of a dotted key: of `method.kind` it is `method`."""
    name = param.removesuffix(".kind")
    _, _, last = name.rpartition(".")
    return last


def _quality(runs: Iterable[TrackedRun], wanted: str | None = None) -> Measure:
    """The first of the measures of quality that is wanted and that some run has, else the last.

    Those of test rows come first, where all runs have them: nothing was chosen by these rows.
    """
    reported = _reported(runs)
    *preferred, last = MEASURES[:QUALITIES]
    for measure in preferred:
        is_wanted = wanted in (None, measure.key)
        if measure.of_test_rows and not _all_tested(runs, measure):
            continue
        if is_wanted and measure.key in reported:
            return measure
    return last


def _all_tested(runs: Iterable[TrackedRun], measure: Measure) -> bool:
    """Whether all runs that succeeded have a measure of test rows: without them one would leave some out."""
    for run in runs:
        is_tested = measure.key in run.metrics
        if run.state == "succeeded" and not is_tested:
            return False
    return True


def _reported(runs: Iterable[TrackedRun]) -> set[str]:
    """The keys of the measures that some run has."""
    keys: set[str] = set()
    for run in runs:
        keys.update(run.metrics)
    return keys


def _sort_key(row: ComparisonRow, quality: Measure) -> tuple[bool, bool, float]:
    """What rows are sorted by: first those that finished, of them those with a finite quality, the best first."""
    unfinished = row.state != "succeeded"
    metric = row.metric(quality.key)
    if metric is None:
        return unfinished, True, 0.0
    badness = metric.mean
    if not math.isfinite(badness):
        return unfinished, True, 0.0
    if quality.more_is_better:
        badness = -badness
    return unfinished, False, badness
