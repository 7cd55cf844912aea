"""The command that drives a sweep."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.arguments import ClusterOption
from orchestrator.terminal.messages import Json, count_delivered, print_json, tell

sweep_app = typer.Typer()


@sweep_app.command("sweep")
def sweep_command(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.YAML", help="The sweep.")],
    cluster: ClusterOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done now; nothing is submitted.")
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Run many trials of a job by a rule, within a budget; start it again where it was ended."""
    from orchestrator.sweeps.driver import SweepDriver
    from orchestrator.sweeps.result import conclude

    driver = SweepDriver.of(file, cluster)
    if dry_run:
        driver.check_begun()
        found, _ = driver.look()
        decision = driver.plan.decide(found)
        for line in driver.shown(decision, found):
            print(line)
        if decision.why:
            tell(decision.why)
        return None
    decision, found = driver.run(tell)
    if decision.why:
        tell(decision.why)
    result = conclude(driver, found, count_delivered)
    comparison = result.comparison
    tell(f"all trials took {result.steps:,} steps, {result.device_hours:.2g} hours of devices")
    if html:
        from orchestrator.comparison.report import write_report

        write_report(comparison, html)
        print(f"the report is in {html}", file=sys.stderr)
    if as_json:
        return print_json(comparison.to_json())
    from orchestrator.comparison.table import table
    from orchestrator.terminal.render import output_width, print_markup

    return print_markup(table(comparison, output_width()))
