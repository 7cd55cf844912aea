"""Commands that look and change nothing: a job's plan and rows, comparison, methods, this machine, MLflow's pages."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.arguments import ClusterOption, GpuOption, JobArgument, RunArgument, SetOption
from orchestrator.terminal.messages import (
    Json,
    clear_count,
    count_delivered,
    count_rows,
    print_json,
    warn_of_undelivered,
)

if TYPE_CHECKING:
    from orchestrator.stages.planned import StagePlan

look_app = typer.Typer()


@look_app.command("plan")
def plan_command(
    file: JobArgument,
    cluster: ClusterOption = None,
    gpu: GpuOption = None,
    sets: SetOption = None,
    as_json: Json = False,
) -> None:
    """Show what would run: layout, batches, sizes, and whether a worker fits on its GPU."""
    from orchestrator.planning.plan import plan
    from orchestrator.stages.planned import plan_stages

    plans = plan_stages(file, sets or (), count_rows, cluster, gpu)
    if plans is not None:
        return _show_stages(plans, as_json)
    job_plan = plan(file, sets or (), count_rows, cluster, gpu)
    clear_count()
    if as_json:
        return print_json(job_plan.dump())
    from orchestrator.terminal.render import show_plan

    return show_plan(job_plan)


def _show_stages(plans: "dict[str, StagePlan]", as_json: bool) -> None:
    """Show the plans of the stages of a job, one below another."""
    from orchestrator.stages.shown import show_stage

    clear_count()
    if as_json:
        by_stage = {stage: plan.dump() for stage, plan in plans.items()}
        return print_json({"stages": by_stage})
    for number, stage in enumerate(plans, start=1):
        print(f"stage {number} of {len(plans)}: {stage}")
        show_stage(plans[stage])
        print()
    return None


@look_app.command("rows")
def rows_command(
    file: JobArgument,
    row: Annotated[int | None, typer.Option("--row", min=1, help="Show this row; the first ones without it.")] = None,
    evaluation: Annotated[bool, typer.Option("--eval", help="Show the evaluation rows.")] = False,
    sets: SetOption = None,
    as_json: Json = False,
) -> None:
    """Show rows of the data as the trainer sees them: text, tokens, and what is learned."""
    from orchestrator.rows import rows

    view = rows(file, overrides=sets or (), row=row, evaluation=evaluation, progress=count_rows)
    clear_count()
    if as_json:
        return print_json(view.dump())
    from orchestrator.terminal.row_text import show_rows

    return show_rows(view)


@look_app.command("samples")
def samples_command(
    run: RunArgument,
    step: Annotated[int | None, typer.Option("--step", min=1, help="Which step; the last one without it.")] = None,
    cluster: ClusterOption = None,
    as_json: Json = False,
) -> None:
    """Show what a model wrote in a step to one of its prompts, and what each answer was worth."""
    from orchestrator.samples import sample_lines, samples

    shown = samples(run, step, cluster)
    if as_json:
        return print_json(shown)
    for line in sample_lines(shown):
        print(line)
    return None


@look_app.command("compare")
def compare_command(
    experiment: Annotated[str | None, typer.Option("--experiment", help="Only runs of this experiment.")] = None,
    uri: Annotated[str | None, typer.Option("--uri", help="Another MLflow than the default one.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report to this file.")] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The run or method that others are held against: lora.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="One ranking, also of other data, budgets and versions.")
    ] = False,
    cluster: ClusterOption = None,
    as_json: Json = False,
) -> None:
    """Show what runs differ in, and what came of it."""
    from orchestrator.tracking.store import check_mlflow

    check_mlflow()  # with it comes what comparing needs
    from orchestrator.comparison.compare import compare
    from orchestrator.comparison.places import RankingWish

    wish = RankingWish(reference, together)
    comparison = compare(experiment, uri, cluster, count_delivered, wish)
    warn_of_undelivered(comparison.undelivered)
    if html:
        from orchestrator.comparison.report import write_report

        write_report(comparison, html)
        print(f"the report is in {html}", file=sys.stderr)
    if as_json:
        return print_json(comparison.to_json())
    from orchestrator.comparison.sparks import spark_lines
    from orchestrator.comparison.table import table
    from orchestrator.terminal.render import output_width, print_markup

    width = output_width()
    print_markup(table(comparison, width))
    for line in spark_lines(comparison):
        print_markup(line)
    return None


@look_app.command("methods")
def methods_command(
    kind: Annotated[str | None, typer.Argument(help="one method; all without it")] = None, as_json: Json = False
) -> None:
    """List the methods; of one show its options and defaults, and at which ZeRO stages it was seen to work."""
    from orchestrator.describe import methods

    descriptions = methods(kind)
    if as_json:
        return print_json(descriptions)
    from orchestrator.terminal.render import show_method, show_methods

    if kind is None:
        return show_methods(descriptions)
    return show_method(descriptions[0])


@look_app.command("doctor")
def doctor_command(
    cluster: ClusterOption = None,
    test_job: Annotated[
        bool, typer.Option("--test-job", help="See what GPUs a job of one minute sees on the cluster.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what of this machine, or of a cluster, is usable, and how to mend what is not."""
    from dataclasses import asdict

    from orchestrator.doctor import doctor

    checks = doctor(cluster, test_job)
    if as_json:
        return print_json([asdict(check) for check in checks])
    from orchestrator.terminal.render import show_checks

    return show_checks(checks)


@look_app.command("mlflow")
def mlflow_command(
    uri: Annotated[str | None, typer.Option("--uri", help="Another store than the default one.")] = None,
    cluster: ClusterOption = None,
) -> None:
    """Open the pages of MLflow; end them with Ctrl-C."""
    import os

    from orchestrator.tracking.collect import deliver_all
    from orchestrator.tracking.store import ui_command

    command, settings = ui_command(uri)
    warn_of_undelivered(deliver_all(cluster, count_delivered))
    os.execvpe(command[0], command, {**os.environ, **settings})
