"""Results as tables for a terminal."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clusters.checks import Check
from methods.options.base import WIDTH
from orchestrator.cluster_views import ClusterView
from orchestrator.comparison.measure import format_bytes
from orchestrator.describe import CAPABILITIES, support
from orchestrator.planning.plan import Plan
from orchestrator.planning.sizes import Sizes
from orchestrator.status import Status
from orchestrator.terminal.fit_text import fit_fields, generation_fields, hours_text
from orchestrator.terminal.run_list import GAP, list_lines
from orchestrator.terminal.status_text import output_lines, status_lines
from orchestrator.terminal.wrapped import WrappedText

_COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "running": "cyan",
    "unknown": "yellow",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
}
_LABEL_WIDTH = 11  # columns
_WIDE = 10_000  # columns of an output that is no terminal: nothing is cut or wrapped there


def show_runs(runs: Sequence[Status]) -> None:
    """Show runs in a list."""
    if not runs:
        print("no runs yet", file=sys.stderr)
        return
    console = _console()
    for line in list_lines(runs, console.width):
        text = Text(line)
        for state, colour in _COLOURS.items():
            pattern = rf"^\S+{GAP}(?P<{colour}>{state})\b"
            text.highlight_regex(pattern)
        console.print(text, soft_wrap=True)


def show_run(run: Status) -> None:
    """Show where a run stands."""
    print_markup(run_view(run))


def run_view(run: Status) -> Group:
    """Where a run stands: facts in two columns; what a person copies is never broken into lines."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(width=_LABEL_WIDTH)
    facts.add_row("run", run.run_id)
    facts.add_row("state", _coloured(run.shown_state))
    for label, fact in status_lines(run):
        facts.add_row(label, WrappedText(fact))
    whole = []
    for label, line in output_lines(run):
        label = label.ljust(_LABEL_WIDTH)
        text = Text(f"{label}  {line}")
        text.no_wrap = True
        text.overflow = "ignore"
        whole.append(text)
    return Group(facts, *whole)


def show_fields(fields: Mapping[str, str]) -> None:
    """Show facts by their labels, in two columns."""
    table = Table.grid(padding=(0, 2))
    for name, fact in fields.items():
        table.add_row(name, WrappedText(fact))
    print_markup(table)


def show_checks(checks: Iterable[Check]) -> None:
    """Show checks, one line for each, with what to do below where it is not ok."""
    table = _table("", "what", "found")
    for check in checks:
        level = _coloured(check.level)
        table.add_row(level, check.name, WrappedText(check.found))
        if check.level != "ok" and check.mend:
            remedy = escape(check.mend)
            table.add_row("", "", f"[bold]to mend it[/]: {remedy}")
    print_markup(table)


def show_clusters(views: Sequence[ClusterView]) -> None:
    """Show clusters, one line for each, with the default one marked; below what is wrong with some."""
    table = _table("", "cluster", "kind", "where", "workers")
    for view in views:
        mark = "*" if view.is_default else ""
        capacity = view.capacity or "unknown"
        table.add_row(mark, view.name, view.kind, escape(view.link), capacity)
    print_markup(table)
    for view in views:
        if view.trouble:
            trouble = view.trouble.removeprefix(f"cluster {view.name}: ")
            print_markup(f"[yellow]{view.name}[/]: {escape(trouble)}")


def show_methods(methods: list[dict[str, Any]]) -> None:
    """Show a line for each method: its kind, its default learning rate, and what it is."""
    width = max(len(method["kind"]) for method in methods)
    head = "method".ljust(width)
    lines = [Text(f"{head}  lr        what it is", style="bold")]
    for method in methods:
        kind = method["kind"].ljust(width)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(kind, style="bold")
        line.append(f"  {_rate(method):<8}  {method['summary']}")
        lines.append(line)
    print_markup(Group(*lines))
    _explain_rates(methods)
    print_markup("fleetune methods METHOD shows one, with its options and when to take it")


def show_method(method: dict[str, Any]) -> None:
    """Show one line per option; then what was seen to work, and why the rest is refused."""
    kind = method["kind"]
    table = _table("method", "option", "default", "what it is")
    table.add_row(f"[bold]{kind}[/]", "", f"lr {_rate(method)}", escape(method["summary"]))
    for name, option in method["options"].items():
        default = escape(_yaml(option["default"]))
        description = escape(option["description"] or "")
        table.add_row("", name, default, description)
    print_markup(table)
    _explain_rates([method])
    print_markup(escape(method["when_to_take"]))
    capabilities = _table("method", *CAPABILITIES)
    capabilities.add_row(kind, *support(method))
    print_markup(capabilities)
    for name, seen in method["support"].items():
        if "refused" in seen:
            reason = f"{kind}, {name}: {seen['refused']}"
            print_markup(escape(reason))


def _rate(method: dict[str, Any]) -> str:
    """The default learning rate of a method, with a mark where it is for bases of one width."""
    mark = " *" if method["lr_width"] else ""
    return f"{method['lr']:g}{mark}"


def _explain_rates(methods: Iterable[dict[str, Any]]) -> None:
    """Say what the mark at a rate means, where there is one."""
    if any(method["lr_width"] for method in methods):
        print_markup(f"* on a base of hidden size {WIDTH}; others have another one: see fleetune plan")


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
    if plan.request is not None:
        print_markup("\n[bold]what submit sends there[/], with another run id:\n")
        print(plan.request, end="", flush=True)


def _plan_fields(plan: Plan) -> dict[str, str]:
    workers = _counted(plan.workers, "worker", "workers")
    passes = _counted(plan.micro_batches, "pass", "passes")
    if plan.sequence > 1:
        workers += f", {plan.sequence} to a row"
    fields = {
        "job": f"{plan.name}: {plan.method} on {plan.base}",
        "layout": f"{workers}, ZeRO {plan.zero}, {plan.precision}, {plan.kernels} kernels",
        "data": f"{_number(plan.rows, 'uncounted')} rows to train on, {_number(plan.eval_rows)} to evaluate",
        "batch": f"{plan.batch_tokens:,} tokens, about {passes} per worker",
        "learning rate": f"{plan.lr:.4g} at its peak ({plan.lr_source})",
        "steps": _steps_text(plan),
    }
    if plan.objective != "sft":
        fields["objective"] = plan.objective
    if plan.needs:
        fields["it needs"] = plan.needs
    if plan.sizes is None:
        fields["parameters"] = "unknown: this kind of base tells its shapes by its weights, which are not here"
    else:
        fields |= _size_fields(plan.sizes, plan.fit is None)
    if plan.fit is not None:
        fields |= fit_fields(plan.fit)
    elif not plan.has_gpus:
        fields["fits"] = "not asked, as its workers have no GPU; --gpu H100 or --cluster NAME says where they have"
    if plan.generations is not None:
        fields |= generation_fields(plan.generations)
    if plan.host_changed:
        on_host = format_bytes(plan.host_changed)
        fields["instead"] += f", with {on_host} of the host's memory for each worker"
    if plan.fit is not None and plan.fit.fits is False and plan.hours_changed is None:
        return fields
    if plan.hours is not None:
        fields["time"] = hours_text(plan.hours, plan.hours_changed)
    elif plan.sizes is None:
        fields["time"] = "not foretold, as the base's parameters are not known"
    elif plan.has_gpus and plan.steps:
        fields["time"] = "not foretold, as it is not known what such a GPU does (--gpu H100 names one that is known)"
    return fields


def _steps_text(plan: Plan) -> str:
    if not plan.steps:
        return "unknown until the data is read"
    steps = f"about {plan.steps:,} (estimated)" if plan.steps_estimated else f"{plan.steps:,}"
    if plan.epochs is not None:
        steps += f", {_epochs_text(plan.epochs)}"
    return steps


def _epochs_text(epochs: float) -> str:
    if epochs == 1:
        return "1 epoch"
    return f"{epochs:,.0f} epochs" if epochs >= 10 else f"{epochs:.2g} epochs"


def _size_fields(sizes: Sizes, alone: bool) -> dict[str, str]:
    """The lines about a model's size; `alone`: nothing else says what a worker takes."""
    memory = sizes.memory
    share = 100 * sizes.trained / sizes.parameters
    weights = format_bytes(memory.weights)
    gradients = format_bytes(memory.gradients)
    optimizer = format_bytes(memory.optimizer)
    total = format_bytes(memory.total)
    kinds = f"weights {weights}, gradients {gradients}, optimizer {optimizer}"
    fields = {
        "parameters": f"{sizes.parameters:,}, trained {sizes.trained:,} ({share:.3g} %)",
    }
    if alone:
        fields["each worker"] = f"{total} without activations: {kinds}"
    if memory.on_host:
        on_host = format_bytes(memory.on_host)
        fields["on the host"] = f"{on_host} of each worker's optimizer, which its device does not hold"
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


def _number(rows: int | None, unknown: str = "none") -> str:
    if rows is None:
        return unknown
    return f"{rows:,}"


def print_markup(renderable: Any) -> None:
    """Print a table, or a text with markup."""
    _console().print(renderable, crop=False)


def output_width() -> int:
    """The columns of standard output; any number where it is no terminal."""
    return _console().width


def _console() -> Console:
    """Standard output, which wraps and has colours only where it is a terminal."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=_WIDE)
