"""An evaluation as tables for a terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from orchestrator.comparison.estimates import Estimate
from orchestrator.evaluation.report import LOSS, EvaluatedTask, EvaluationReport, TaskResult
from orchestrator.terminal.wrapped import WrappedText

TITLES = {"exact_match": "exact match", "accuracy": "accuracy", LOSS: "loss"}
_WIDE_ENOUGH = 76  # columns, with which intervals stand beside their values


def evaluation_table(report: EvaluationReport, width: int) -> Group:
    """All tasks, and how much was asked, for a terminal this wide."""
    shown: list[RenderableType] = []
    for task in report.tasks:
        grid = _task_table(task, width)
        sentence = WrappedText(verdict_on(task))
        shown += [grid, sentence]
        for text in win_texts(task):
            shown.append(WrappedText(text))
        shown.append("")
    last = WrappedText(asked_text(report))
    shown.append(last)
    return Group(*shown)


def _task_table(task: EvaluatedTask, width: int) -> Table:
    """A line for each adapter, the best first, with what it has more than the base."""
    rows = len(task.prepared.rows)
    title = escape(f"{task.name}, {rows} rows")
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    grid.pad_edge = False
    grid.padding = (0, 1, 0, 0)
    grid.add_column("adapter", overflow="fold")
    for measure in task.measures:
        grid.add_column(TITLES[measure], justify="right")
        grid.add_column("to the base", justify="right")
    joint = " "
    if width < _WIDE_ENOUGH or len(task.measures) > 1:
        joint = "\n"
    leaders = task.leaders
    for result in task.best_first:
        cells = _cells_of(task, result, joint)
        style = None
        if result in leaders:
            style = "bold"
        grid.add_row(*cells, style=style)
    return grid


def _cells_of(task: EvaluatedTask, result: TaskResult, joint: str) -> list[str]:
    """The line of one adapter, or of the base."""
    cells = [escape(result.label)]
    estimates = task.estimates(result)
    to_base = task.to_base(result)
    for measure, value in estimates.items():
        text = estimate_text(measure, value, joint)
        difference = ""
        if result is not task.base:
            difference = difference_text(measure, to_base[measure], joint)
        cells += [text, difference]
    return cells


def estimate_text(measure: str, estimate: Estimate, joint: str = " ") -> str:
    """A measure with its interval."""
    form = "{:.1%}"
    if measure == LOSS:
        form = "{:.4f}"
    return _with_interval(form, estimate, joint)


def difference_text(measure: str, difference: Estimate, joint: str = " ") -> str:
    """A difference with its interval; of shares, in points of a percent."""
    if measure == LOSS:
        return _with_interval("{:+.4f}", difference, joint)
    value = 100 * difference.value
    low = 100 * difference.low
    high = 100 * difference.high
    points = Estimate(value, low, high)
    return _with_interval("{:+.1f}", points, joint)


def _with_interval(form: str, estimate: Estimate, joint: str) -> str:
    """A value in a form, and the ends of its interval."""
    show = form.format
    value = show(estimate.value)
    low = show(estimate.low)
    high = show(estimate.high)
    return f"{value}{joint}({low} to {high})"


def verdict_on(task: EvaluatedTask) -> str:
    """Which is best, in one sentence, and which cannot be told apart from it."""
    best, *others = task.leaders
    measure = task.measures[0]
    estimates = task.estimates(best)
    value = estimates[measure].value
    sentence = f"best: {best.label} with {value:.1%} {TITLES[measure]}"
    if others:
        labels = []
        for other in others:
            labels.append(other.label)
        names = ", ".join(labels)
        return f"{sentence}; these rows do not tell it apart from {names}"
    if len(task.results) > 1:
        return f"{sentence}, better than all others"
    return sentence


def win_texts(task: EvaluatedTask) -> list[str]:
    """Of each adapter whose answers were judged, how often they won, in one sentence."""
    texts = []
    for result in task.results:
        wins = result.wins
        if wins is None:
            continue
        rate = estimate_text("win_rate", wins.rate)
        text = f"{result.label} wins {rate} against {wins.against}, judged by {wins.judge}"
        if wins.flipped:
            text += f"; {wins.flipped} of {len(wins.of_rows)} choices went with the order, and are ties"
        if wins.unread:
            text += f"; {wins.unread} had no room, and are ties"
        texts.append(text)
    return texts


def asked_text(report: EvaluationReport) -> str:
    """How much was asked now, and how long that took."""
    if not report.asked:
        return "nothing was asked: all answers were there already"
    seconds = max(report.seconds, 0.001)
    speed = report.asked / seconds
    return f"{report.asked:,} questions asked in {seconds:.1f} s, {speed:,.1f} a second"
