"""Results as tables for a terminal."""

import json
import time
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.comparison.measure import size
from orchestrator.describe import CAPABILITIES, support
from orchestrator.doctor import Check
from orchestrator.planning.plan import Plan
from orchestrator.rows import Look, Shown
from orchestrator.status import Status
from trainer.data.survey import described

if TYPE_CHECKING:
    from trainer.data.survey import Survey

_COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "running": "cyan",
    "unknown": "yellow",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
}
_WIDE = 10_000  # columns of an output that is no terminal: nothing is cut or wrapped there


def show_runs(runs: Iterable[Status]) -> None:
    """One line per run."""
    table = _table("run", "cluster", "state", "step", "attempt", "submitted", "reason")
    for run in runs:
        when = _moment(run.submitted)
        step = f"{run.step}/{run.steps or '?'}"
        cells = (run.run_id, run.cluster, _coloured(run.state), step, str(run.attempt), when, run.reason or "")
        table.add_row(*cells[:2], cells[2], *map(escape, cells[3:]))
    show(table)


def show_run(run: Status) -> None:
    """One line per fact about a run."""
    show_fields(
        {**run.dump(), "submitted": _moment(run.submitted), "data": described(run.data) if run.data else None}
    )


def show_fields(fields: Mapping[str, Any]) -> None:
    """One line per field."""
    table = Table.grid(padding=(0, 2))
    for name, value in fields.items():
        text = _coloured(value) if name == "state" else escape("-" if value is None else str(value))
        table.add_row(name, text)
    show(table)


def show_checks(checks: Iterable[Check]) -> None:
    """One line per check, with what to do where it is not ok."""
    table = _table("", "what", "found", "how to mend it")
    for check in checks:
        mend = "" if check.level == "ok" else check.mend
        table.add_row(_coloured(check.level), check.name, escape(check.found), escape(mend))
    show(table)


def show_methods(methods: list[dict[str, Any]]) -> None:
    """One line per option; then what was seen to work, and why what is refused."""
    table = _table("method", "option", "default", "what it is")
    for method in methods:
        table.add_row(f"[bold]{method['kind']}[/]", "", f"lr {method['lr']:g}", escape(method["summary"]))
        for name, option in method["options"].items():
            table.add_row("", name, escape(_yaml(option["default"])), escape(option["description"] or ""))
    show(table)
    seen = _table("method", *CAPABILITIES)
    for method in methods:
        seen.add_row(method["kind"], *support(method))
    show(seen)
    for method in methods:
        for name, cell in method["support"].items():
            if "refused" in cell:
                show(escape(f"{method['kind']}, {name}: {cell['refused']}"))


def _counted(number: float, one: str, more: str) -> str:
    """A number of things."""
    return f"{number} {one if number == 1 else more}"


def _yaml(value: Any) -> str:
    """An option's value as a job writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def show_plan(plan: Plan) -> None:
    """What would run, in groups."""
    show_fields(_plan_fields(plan))
    for warning in plan.warnings:
        show(f"[yellow]warning[/]: {escape(warning)}")


def _plan_fields(plan: Plan) -> dict[str, str]:
    known = f"{plan.steps:,}" if plan.steps else "unknown until the data is read"
    fields = {
        "job": f"{plan.name}: {plan.method} on {plan.base}",
        "layout": f"{_counted(plan.workers, 'worker', 'workers')}, ZeRO {plan.zero}, {plan.precision}",
        "data": f"{_number(plan.rows)} rows to train on, {_number(plan.eval_rows)} to evaluate",
        "batch": f"{plan.batch_tokens:,} tokens, about {_counted(plan.micro_batches, 'pass', 'passes')} per worker",
        "steps": f"about {known} (estimated)" if plan.steps and plan.steps_estimated else known,
    }
    if plan.sizes is None:
        return fields | {
            "parameters": "unknown: this kind of base tells its shapes by its weights, which are not here"
        }
    sizes, memory = plan.sizes, plan.sizes.memory
    share = 100 * sizes.trained / sizes.parameters
    parts = ", ".join(f"{name} {size(getattr(memory, name))}" for name in ("weights", "gradients", "optimizer"))
    fields["parameters"] = f"{sizes.parameters:,}, trained {sizes.trained:,} ({share:.3g} %)"
    fields["each worker"] = f"{size(memory.total)} without activations: {parts}"
    if sizes.held:
        fields["in 4 bits"] = f"{size(sizes.held)} of the weights, which each worker holds at every ZeRO stage"
    return fields


def show_rows(found: Look) -> None:
    """Examples with what is learned in green, how they are packed, and the figures of all."""
    for example in found.examples:
        fate = {"truncated": ", longer than data.seq_len: its end is cut", "dropped": ", left out: it is too long"}
        learned = sum(token.learned for token in example.tokens[: example.kept])
        length = f"{len(example.tokens)} tokens, {learned} learned{fate.get(example.fate or '', '')}"
        show(f"[bold]row {example.row}[/]  {length}")
        show(_text(example))
        show(_tokens(example))
        show("")
    for number, sequence in enumerate(found.sequences, 1):
        places = "  ".join(f"row {row} [{start}, {stop})" for row, start, stop in sequence.examples)
        show(f"[bold]sequence {number} of step 1[/]  {escape(places)}  padding {sequence.padding}")
    show("")
    show_fields(_row_fields(found.survey) | {"source": found.source})
    for warning in found.warnings:
        show(f"[yellow]warning[/]: {escape(warning)}")


def _text(example: Shown) -> Text:
    text = Text()
    for part, learned, kept in example.parts:
        text.append(_visible(part), style=_row_style(learned, kept))
    return text


def _visible(text: str) -> str:
    """A text whose control characters cannot move the cursor or change colours."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else f"\\x{ord(char):02x}" for char in text
    )


def _tokens(example: Shown) -> Text:
    """The ids, each with its text as a word without spaces."""
    text = Text("tokens  ", style="dim")
    for place, token in enumerate(example.tokens):
        text.append(f"{token.id}:{token.text!r}", style=_row_style(token.learned, place < example.kept))
        text.append(" ")
    return text


def _row_style(learned: bool, kept: bool) -> str:
    if not kept:
        return "red strike"
    return "bold green" if learned else ""


def _row_fields(survey: "Survey") -> dict[str, str]:
    share = 100 * survey.learned / survey.tokens
    fields = {
        "rows": f"{survey.rows:,}, which make {survey.examples:,} examples",
        "tokens": f"{survey.tokens:,}, learned {survey.learned:,} ({share:.3g} %)",
        "lengths": f"{survey.shortest:,} to {survey.longest:,} tokens, median {survey.median:,}",
        "duplicates": f"{survey.duplicates:,}",
        "cut, left out": f"{survey.number('truncated'):,}, {survey.number('dropped'):,}",
    }
    if survey.unused:
        fields["not used"] = ", ".join(f"{name} ({count:,} rows)" for name, (count, _) in survey.unused.items())
    return fields


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _number(rows: int | None) -> str:
    return "none" if rows is None else f"{rows:,}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column in ("run", "state", "step"))
    return table


def _coloured(word: str) -> str:
    colour = _COLOURS.get(word)
    return f"[{colour}]{word}[/]" if colour else word


def show(what: Any) -> None:
    """Print a table, or a text with markup."""
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=_WIDE)).print(what)
