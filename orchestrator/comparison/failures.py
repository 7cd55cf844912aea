"""The runs of a comparison that failed, and why, as their own last words have it."""

from html import escape

from orchestrator.comparison.compare import Comparison
from orchestrator.comparison.run import TrackedRun
from orchestrator.tracking.facts import REASON_TAG

_MOST_LISTED = 100  # reasons
_MOST_OF_REASON = 8  # runs of one reason
_FAILURES = '<h2>What failed</h2><div class="wide"><table><tr><th>runs</th><th>why</th></tr>{lines}</table></div>'
_FAILURE = "<tr><td>{runs}</td><td>{reason}</td></tr>"


def failures(comparison: Comparison) -> str:
    """A table of reasons, each with the runs that it ended; empty where no run has failed."""
    by_reason: dict[str, list[TrackedRun]] = {}
    for run in comparison.runs:
        if run.state == "failed":
            reason = run.tags.get(REASON_TAG) or "no reason is known"
            ended = by_reason.setdefault(reason, [])
            ended.append(run)
    if not by_reason:
        return ""
    most_first = sorted(by_reason, key=lambda reason: -len(by_reason[reason]))
    lines = ""
    for reason in most_first[:_MOST_LISTED]:
        runs = _runs_of_reason(by_reason[reason])
        lines += _FAILURE.format(runs=escape(runs), reason=escape(reason))
    return _FAILURES.format(lines=lines)


def _runs_of_reason(runs: list[TrackedRun]) -> str:
    """The run ids of some runs; of many the first."""
    names = [run.run_id for run in runs]
    text = ", ".join(names[:_MOST_OF_REASON])
    others = len(names) - _MOST_OF_REASON
    if others > 0:
        return f"{text} and {others} more"
    return text
