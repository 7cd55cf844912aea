"""Results as tables for a terminal."""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.cluster_views import ClusterView
from orchestrator.comparison.measure import format_bytes
from orchestrator.describe import CAPABILITIES, support
from orchestrator.doctor import Check
from orchestrator.planning.plan import Plan, Sizes
from orchestrator.status import Status
from trainer.data.survey import summary_line

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
    """Show runs in a table, one line for each."""
    table = _table("run", "cluster", "state", "step", "attempt", "submitted", "reason")
    for run in runs:
        steps = run.steps or "?"
        step = escape(f"{run.step}/{steps}")
        attempt = escape(str(run.attempt))
        submitted = escape(_local_time(run.submitted))
        reason = escape(run.reason or "")
        state = _coloured(run.state)
        table.add_row(run.run_id, run.cluster, state, step, attempt, submitted, reason)
    print_markup(table)


def show_run(run: Status) -> None:
    """Show a run, one line for each fact about it."""
    fields = run.dump()
    fields["submitted"] = _local_time(run.submitted)
    fields["data"] = summary_line(run.data) if run.data else None
    show_fields(fields)


def show_fields(fields: Mapping[str, Any]) -> None:
    """Show a table with one line for each field."""
    table = Table.grid(padding=(0, 2))
    for name, value in fields.items():
        if name == "state":
            text = _coloured(value)
        elif value is None:
            text = "-"
        else:
            text = escape(str(value))
        table.add_row(name, text)
    print_markup(table)


def show_checks(checks: Iterable[Check]) -> None:
    """Show checks, one line for each, with what to do where it is not ok."""
    table = _table("", "what", "found", "how to mend it")
    for check in checks:
        level = _coloured(check.level)
        found = escape(check.found)
        fix = ""
        if check.level != "ok":
            fix = escape(check.mend)
        table.add_row(level, check.name, found, fix)
    print_markup(table)


def show_clusters(views: Iterable[ClusterView]) -> None:
    """Show clusters, one line for each; the default one is marked."""
    table = _table("", "cluster", "kind", "where", "workers", "what is wrong")
    for view in views:
        mark = "*" if view.is_default else ""
        capacity = view.capacity or "unknown"
        table.add_row(mark, view.name, view.kind, escape(view.link), capacity, escape(view.trouble or ""))
    print_markup(table)


def show_methods(methods: list[dict[str, Any]]) -> None:
    """Show one line per option; then what was seen to work, and why the rest is refused."""
    print_markup(_option_table(methods))
    capabilities = _table("method", *CAPABILITIES)
    for method in methods:
        capabilities.add_row(method["kind"], *support(method))
    print_markup(capabilities)
    for method in methods:
        for name, seen in method["support"].items():
            if "refused" in seen:
                reason = f"{method['kind']}, {name}: {seen['refused']}"
                print_markup(escape(reason))


def _option_table(methods: list[dict[str, Any]]) -> Table:
    table = _table("method", "option", "default", "what it is")
    for method in methods:
        kind = f"[bold]{method['kind']}[/]"
        rate = f"lr {method['lr']:g}"
        summary = escape(method["summary"])
        table.add_row(kind, "", rate, summary)
        for name, option in method["options"].items():
            default = escape(_yaml(option["default"]))
            description = escape(option["description"] or "")
            table.add_row("", name, default, description)
    return table


def _counted(number: float, one: str, more: str) -> str:
    """A number of things, with their name in the singular or plural."""
    noun = one if number == 1 else more
    return f"{number} {noun}"


def _yaml(value: Any) -> str:
    """An option's value as a job writes it."""
    if isinstance(value, tuple):
        items = ", ".join(value)
        return f"[{items}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def show_plan(plan: Plan) -> None:
    """Show what would run, and the warnings below it."""
    show_fields(_plan_fields(plan))
    for warning in plan.warnings:
        print_markup(f"[yellow]warning[/]: {escape(warning)}")


def _plan_fields(plan: Plan) -> dict[str, str]:
    workers = _counted(plan.workers, "worker", "workers")
    passes = _counted(plan.micro_batches, "pass", "passes")
    fields = {
        "job": f"{plan.name}: {plan.method} on {plan.base}",
        "layout": f"{workers}, ZeRO {plan.zero}, {plan.precision}",
        "data": f"{_number(plan.rows)} rows to train on, {_number(plan.eval_rows)} to evaluate",
        "batch": f"{plan.batch_tokens:,} tokens, about {passes} per worker",
        "steps": _steps_text(plan),
    }
    if plan.sizes is None:
        fields["parameters"] = "unknown: this kind of base tells its shapes by its weights, which are not here"
        return fields
    return fields | _size_fields(plan.sizes)


def _steps_text(plan: Plan) -> str:
    if not plan.steps:
        return "unknown until the data is read"
    if plan.steps_estimated:
        return f"about {plan.steps:,} (estimated)"
    return f"{plan.steps:,}"


def _size_fields(sizes: Sizes) -> dict[str, str]:
    memory = sizes.memory
    share = 100 * sizes.trained / sizes.parameters
    weights = format_bytes(memory.weights)
    gradients = format_bytes(memory.gradients)
    optimizer = format_bytes(memory.optimizer)
    total = format_bytes(memory.total)
    kinds = f"weights {weights}, gradients {gradients}, optimizer {optimizer}"
    fields = {
        "parameters": f"{sizes.parameters:,}, trained {sizes.trained:,} ({share:.3g} %)",
        "each worker": f"{total} without activations: {kinds}",
    }
    if sizes.held:
        held = format_bytes(sizes.held)
        fields["in 4 bits"] = f"{held} of the weights, which each worker holds at every ZeRO stage"
    return fields


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column in ("run", "state", "step"))
    return table


def _coloured(word: str) -> str:
    colour = _COLOURS.get(word)
    if colour is None:
        return word
    return f"[{colour}]{word}[/]"


def _local_time(timestamp: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(timestamp))


def _number(rows: int | None) -> str:
    if rows is None:
        return "none"
    return f"{rows:,}"


def print_markup(renderable: Any) -> None:
    """Print a table, or a text with markup."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    console.print(renderable)
