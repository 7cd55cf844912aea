"""The command line.

Exit codes: 0 done, 1 the job failed, 2 the input is wrong, 3 the cluster cannot be reached, 4 the job was cancelled
or paused.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands import advise, cluster, clusters, evaluate, k8s, look, serve, sweep
from orchestrator.commands.arguments import ClusterOption, JobArgument, RunArgument, SetOption, YesOption
from orchestrator.terminal.messages import (
    Json,
    announce_json,
    announce_submission,
    clear_count,
    count_bytes,
    count_rows,
    print_json,
    tell,
    warn,
)

if TYPE_CHECKING:
    from orchestrator.logs import LogReader
    from orchestrator.runs import Handle

app = typer.Typer(
    name="fleetune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half of the time of --help
)
app.add_typer(cluster.cluster_app, name="cluster")
app.add_typer(clusters.clusters_app, name="clusters")
app.add_typer(k8s.k8s_app, name="k8s")
app.add_typer(look.look_app)
app.add_typer(evaluate.evaluate_app)
app.add_typer(serve.serve_app)
app.add_typer(sweep.sweep_app)
app.add_typer(advise.advise_app)


@app.callback()
def general_options(
    clusters: Annotated[
        Path | None,
        typer.Option("--clusters", metavar="FILE", help="The clusters file; FLEETUNE_CLUSTERS says the same."),
    ] = None,
) -> None:
    """Fine-tune language models with any method on any cluster, from one job.yaml."""
    if clusters:
        os.environ["FLEETUNE_CLUSTERS"] = str(clusters)


def main() -> None:
    """Run the command line and turn what goes wrong into its exit code."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nobody is left to tell
    except Exception as error:
        user_error = _user_error(error)
        if user_error is None:
            raise
        exit_code, message = user_error
        clear_count()
        tell(message)
        sys.exit(exit_code)


def _user_error(error: Exception) -> tuple[int, str] | None:
    """Exit code and message for what a user can fix; None for a bug."""
    from clusters.base import Unreachable
    from orchestrator.errors import InputError, JobFailed, JobStopped
    from runfolder.files import Damaged

    match error:
        case JobFailed():
            return 1, str(error)
        case InputError() | Damaged():
            return 2, str(error)
        case Unreachable() | ConnectionError():
            return 3, str(error)
        case JobStopped():
            return 4, str(error)
        case OSError() if error.filename:
            return 2, f"{error.filename}: {error.strerror}"
        case OSError():
            return 2, str(error)
    return None


@app.command("submit")
def submit_command(
    file: JobArgument,
    cluster: ClusterOption = None,
    sets: SetOption = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Stay until the run has ended, and show its progress.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the job and print what would be submitted.")
    ] = False,
    run_id: Annotated[str | None, typer.Option("--run-id", help="Use this run id; repeat it safely.")] = None,
    yes: YesOption = False,
    as_json: Json = False,
) -> None:
    """Check a job and submit it; prints the run id."""
    from clusters.remote.machine import EnvironmentMissing
    from orchestrator import submit as submission

    if dry_run:
        print(submission.dry_run(file, cluster=cluster, overrides=sets or (), warn=warn))
        return
    submit = partial(
        submission.submit,
        file,
        cluster=cluster,
        overrides=sets or (),
        run_id=run_id,
        progress=count_rows,
        sent=count_bytes,
        announce=announce_json if as_json else announce_submission,
    )
    try:
        submitted = submit()
    except EnvironmentMissing as missing:
        from orchestrator.cluster_setup import make_environment

        make_environment(missing, yes)
        submitted = submit()
    if wait:
        from orchestrator.runs import find

        _follow(find(submitted.run_id), None)


@app.command("list")
def list_command(cluster: ClusterOption = None, as_json: Json = False) -> None:
    """List the runs of a cluster, or all that this machine has or knows of; newest first."""
    from orchestrator.status import list_runs

    runs = list_runs(cluster)
    if as_json:
        return print_json([run.dump() for run in runs])
    from orchestrator.terminal.render import show_runs

    return show_runs(runs)


@app.command("status")
def status_command(run: RunArgument, cluster: ClusterOption = None, as_json: Json = False) -> None:
    """Show where a run stands."""
    from orchestrator.status import status

    run_status = status(run, cluster)
    if as_json:
        return print_json(run_status.dump())
    from orchestrator.terminal.render import show_run

    return show_run(run_status)


@app.command("logs")
def logs_command(
    run: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Which worker; 0 without it.")] = None,
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="All workers; each line says whose it is.")] = False,
    cluster: ClusterOption = None,
    as_json: Json = False,
) -> None:
    """Print the log of a worker or of all, attempt after attempt."""
    from orchestrator.errors import InputError
    from orchestrator.logs import LogReader, logs
    from orchestrator.runs import find

    if all_ranks and rank is not None:
        raise InputError(f"--rank: found {rank} beside --all-ranks; allowed: one of the two")
    worker = None if all_ranks else rank or 0
    if follow:
        handle = find(run, cluster)
        return _follow(handle, LogReader(handle, worker))
    text = logs(run, worker, cluster)
    if as_json:
        run_id = find(run, cluster).run_id
        return print_json({"run_id": run_id, "rank": worker, "text": text})
    sys.stdout.write(text)
    if not text:
        tell("no worker has written anything yet")
    return None


@app.command("cancel", help="End a run.")
def cancel_command(
    run: RunArgument,
    save: Annotated[bool, typer.Option("--save", help="Let it save a checkpoint first.")] = False,
    cluster: ClusterOption = None,
) -> None:
    """Ask for the end of a run, and print its id."""
    from orchestrator.control import cancel

    print(cancel(run, save, cluster))


@app.command("pause")
def pause_command(
    run: RunArgument,
    at: Annotated[
        int | None, typer.Option("--at", min=1, metavar="STEP", help="After this step; the current one without it.")
    ] = None,
    cluster: ClusterOption = None,
) -> None:
    """Let a run save and end; resume goes on from there."""
    from orchestrator.control import pause

    print(pause(run, at, cluster))


@app.command("resume")
def resume_command(run: RunArgument, cluster: ClusterOption = None) -> None:
    """Let a run that failed, was cancelled or paused go on from its newest checkpoint."""
    from orchestrator.control import resume

    print(resume(run, cluster))


@app.command("fetch")
def fetch_command(
    run: RunArgument,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="The folder to bring it into; the run id without it.")
    ] = None,
    cluster: ClusterOption = None,
) -> None:
    """Bring the output of a run, its result and its job here; repeated, it brings what lacks."""
    from orchestrator.control import fetch
    from runfolder.loading import loading_lines

    folder = fetch(run, to, cluster)
    print(folder)
    for line in loading_lines(folder):
        print(line, file=sys.stderr)


def _follow(run: "Handle", reader: "LogReader | None") -> None:
    """Show a run until it has ended; raises JobFailed where it failed, JobStopped where somebody ended it."""
    from orchestrator.errors import JobFailed, JobStopped
    from orchestrator.progress import follow

    ended = follow(run, reader)
    reason = ended.reason or "no reason was given"
    message = f"{ended.run_id} {ended.shown_state}: {reason}"
    if ended.state == "cancelled":
        raise JobStopped(message)
    if ended.state == "failed":
        look = "status" if reader else "logs"  # what was not shown yet
        raise JobFailed(f"{message}\nsee: fleetune {look} {ended.run_id}")
    print(f"{ended.run_id} succeeded: {ended.output_dir}", file=sys.stderr)


if __name__ == "__main__":  # python -m orchestrator.cli
    from fleetune_start import main as start

    start()
