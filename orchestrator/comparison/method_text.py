"""How a comparison was made, in sentences that can be pasted into a paper."""

from html import escape

from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.ranking import Ranking
from orchestrator.comparison.run import TrackedRun

_PACKAGES_SAID = ("fleetune.version", "fleetune.env.torch", "fleetune.env.transformers", "fleetune.env.peft")
_SAID_OF_ALL = {
    "base.model": "base",
    "data.train": "training data",
    "data.eval": "held-out data",
    "train.steps": "steps",
}
_HEADING = "<h2>Methods, to paste</h2>"


def methods_text(comparison: Comparison) -> str:
    """The paragraph as HTML; empty where nothing was ranked."""
    if not comparison.rankings:
        return ""
    sentences = [_runs(comparison), *map(_how_judged, comparison.rankings[:1])]
    shared = [
        f"{name} {comparison.constant[param]}" for param, name in _SAID_OF_ALL.items() if param in comparison.constant
    ]
    if shared:
        sentences.append(f"All runs shared: {', '.join(shared)}.")
    if comparison.barrier:
        sentences.append(f"There were {comparison.barrier}.")
    versions = _versions(comparison.runs)
    if versions:
        sentences.append(f"Software: {versions}.")
    paragraph = " ".join(sentences)
    text = escape(paragraph)
    return f'{_HEADING}<p class="methods">{text}</p>'


def _runs(comparison: Comparison) -> str:
    """How many runs there were, of how many configurations with how many seeds."""
    numbers = set()
    for row in comparison.rows:
        number = len(row.runs)
        numbers.add(number)
    fewest = min(numbers)
    most = max(numbers)
    seeds = f"{fewest} to {most}"
    if fewest == most:
        seeds = str(fewest)
    rows = len(comparison.rows)
    runs = len(comparison.runs)
    return f"We compared {rows} configurations in {runs} runs, {seeds} seeds each."


def _how_judged(ranking: Ranking) -> str:
    """By what rows were judged, on how many of them, and how intervals were made."""
    rows = ranking.ranked[0].own.rows
    measure = ranking.measure
    text = f"They were judged by {measure.title}"
    if rows > 1:
        kind = "held-out rows"
        if measure.of_test_rows:
            kind = "rows by which nothing was chosen"
        text = f"{text} on {rows} {kind}"
    if not ranking.says_something:
        return f"{text}; no difference has an interval, as there are too few seeds."
    others = len(ranking.ranked) - 1
    percent = 100 * ranking.level
    reference = ranking.reference.label
    return (
        f"{text}, against {reference}. Intervals of differences allow for other seeds and other rows, paired where "
        f"seeds and rows are shared, at a level of {percent:.2f} % each, so that all {others} hold at once with 95 % "
        "(Bonferroni)."
    )


def _versions(runs: list[TrackedRun]) -> str:
    """The versions of the packages that matter, where all runs have the same."""
    found = []
    for tag in _PACKAGES_SAID:
        versions = set()
        for run in runs:
            version = run.tags.get(tag, "")
            versions.add(version)
        only = versions.pop()
        if only and not versions:
            package = tag.removesuffix(".version")
            _, _, name = package.rpartition(".")
            found.append(f"{name} {only}")
    return ", ".join(found)
