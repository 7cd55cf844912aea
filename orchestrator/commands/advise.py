"""The command that says how to train: by evidence, or by a race on the user's own rows."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.arguments import ClusterOption, GpuOption, JobArgument, SetOption
from orchestrator.terminal.messages import (
    Json,
    clear_count,
    count_delivered,
    count_methods,
    count_rows,
    print_json,
    tell,
)

if TYPE_CHECKING:
    from orchestrator.advice.advise import Advice

advise_app = typer.Typer()


@advise_app.command("advise")
def advise_command(
    file: JobArgument,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="6gpuh", help="Race the methods within this; 20000steps says it in steps."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Begin the race without asking.")] = False,
    gpu: GpuOption = None,
    sets: SetOption = None,
    cluster: ClusterOption = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the race's report to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Say which methods fit and what evidence supports; with a budget race them, and write the job that won."""
    from orchestrator.advice.advise import advise
    from orchestrator.errors import InputError

    if html and budget is None:
        raise InputError("--html: a report is of a race; allowed with --budget")
    if sets and budget:
        raise InputError("--set: a race is of the job as it is in its file; allowed without --budget")
    advice = advise(file, sets or (), progress=count_rows, cluster=cluster, gpu=gpu, begun=count_methods)
    clear_count()
    if budget is None:
        return _show_advice(advice, file, as_json)
    _agree_on_race(advice, file, budget, yes)
    return _race(file, cluster, html, as_json)


def _show_advice(advice: "Advice", file: Path, as_json: bool) -> None:
    """Print the candidates, the rules, and what to do next."""
    from orchestrator.advice.what_next import what_next

    step = what_next(advice, file)
    if as_json:
        return print_json({**advice.to_json(), "next": step})
    from rich.markup import escape

    from orchestrator.advice.table import ABOUT, candidates_table, rules_table
    from orchestrator.terminal.render import print_markup
    from trainer.dry_run.fit import LINE_MARGIN

    print_markup(candidates_table(advice))
    if advice.has_no_gpu:
        print_markup("[dim]?: not known without a GPU; --gpu H100 names one, --cluster one that has some[/]")
    if advice.has_rough_figures:
        print_markup(f"[dim]{ABOUT}: by a fitted line and {LINE_MARGIN:.0%} more; fleetune plan says it to 5 %[/]")
    print_markup("")
    print_markup(rules_table(advice))
    return print_markup(f"\n[bold]next[/]: {escape(step)}")


def _agree_on_race(advice: "Advice", file: Path, budget: str, yes: bool) -> None:
    """Write the race down, unless it was begun before, and have somebody agree to it; raises InputError."""
    from orchestrator.advice.advise import write_race
    from orchestrator.advice.race import race_file_of
    from orchestrator.errors import InputError

    path = race_file_of(file)
    race = write_race(advice, file, budget)
    if race is None:
        return tell(f"going on with the race in {path}; remove it to begin another one")
    names = ", ".join(race.methods)
    tell(f"{path} races {names}: at most {race.most_steps:,} steps, within the budget of {race.sweep['budget']:,}")
    if yes or (sys.stdin.isatty() and typer.confirm("Begin?", err=True)):
        return None
    path.unlink()
    raise InputError("--yes: found nothing; nothing was started")


def _race(file: Path, cluster: str | None, html: Path | None, as_json: bool) -> None:
    """Drive the race to its end, and show what came of it."""
    from orchestrator.advice.advise import write_advised_job
    from orchestrator.advice.race import race_file_of
    from orchestrator.sweeps.driver import SweepDriver
    from orchestrator.sweeps.result import conclude

    driver = SweepDriver.of(race_file_of(file), cluster)
    decision, found = driver.run(tell)
    if decision.why:
        tell(decision.why)
    result = conclude(driver, found, count_delivered)
    comparison = result.comparison
    advised = write_advised_job(driver, found, comparison, file)
    if html:
        from orchestrator.comparison.report import write_report

        write_report(comparison, html)
        print(f"the report is in {html}", file=sys.stderr)
    if as_json:
        cost = {"steps": result.steps, "device_hours": result.device_hours}
        return print_json({**comparison.to_json(), "job": str(advised), "cost": cost})
    from orchestrator.comparison.table import table
    from orchestrator.terminal.render import output_width, print_markup

    print_markup(table(comparison, output_width()))
    print(f"it took {result.steps:,} steps, {result.device_hours:.2g} hours of devices")
    return print(f"the job to submit is in {advised}: {comparison.verdict}")
