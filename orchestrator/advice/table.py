"""Advice in a terminal: rules with their sources, and the methods that could be raced."""

from rich.table import Table

from orchestrator.advice.advise import Advice
from orchestrator.advice.candidates import MethodCandidate, foretold
from orchestrator.comparison.measure import format_bytes, format_count, format_hours

ABOUT = "~"  # before what is only roughly known


def rules_table(advice: Advice) -> Table:
    """The rules, each with its strength and source."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("question", "advice", "evidence", "source"):
        table.add_column(heading)
    for rule in advice.rules:
        table.add_row(rule.question, rule.advice, rule.strength, rule.source)
    return table


def candidates_table(advice: Advice) -> Table:
    """The methods: what each would train, take and last, or why it is left out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("method", "rate", "trained", "memory", "time", "left out"):
        table.add_column(heading)
    for candidate in advice.candidates:
        cells = _figures(candidate)
        table.add_row(candidate.kind, *cells, candidate.reason or "")
    return table


def _figures(candidate: MethodCandidate) -> list[str]:
    """What is foretold of a method, as far as it is known."""
    plan = candidate.plan
    if plan is None:
        return ["", "", "", ""]
    figures = foretold(plan)
    trained = "?"
    memory = "?"
    hours = "?"
    if figures.trained is not None:
        trained = format_count(figures.trained)
    if figures.needed is not None:
        memory = format_bytes(figures.needed)
        if candidate.is_rough:
            memory = f"{ABOUT}{memory}"
    if plan.fit is not None and plan.fit.fits is False:
        hours = "-"
    if figures.hours is not None:
        hours = format_hours(figures.hours)
    rate = f"{plan.lr:.2g}"
    return [rate, trained, memory, hours]
