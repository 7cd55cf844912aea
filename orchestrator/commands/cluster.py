"""`fleetune cluster`: start, stop and look at the cluster on this machine."""

import typer

from orchestrator.terminal.messages import Json, print_json

cluster_app = typer.Typer(help="Start, stop and look at the cluster on this machine.", no_args_is_help=True)


@cluster_app.command("start")
def start_command() -> None:
    """Start the supervisor of this machine; a job that is submitted does so too."""
    from clusters.local import Local

    Local.here().start()


@cluster_app.command("stop")
def stop_command() -> None:
    """End supervisor, controllers and Ray; runs that are not done go on at the next start."""
    from clusters.local import Local

    Local.here().stop()


@cluster_app.command("status")
def cluster_status_command(as_json: Json = False) -> None:
    """Show what of the cluster on this machine is alive."""
    from dataclasses import asdict

    from clusters.local import Local

    state = Local.here().state()
    if as_json:
        return print_json({**state, "capacity": asdict(state["capacity"])})
    from orchestrator.cluster_state import state_lines
    from orchestrator.terminal.render import show_fields

    return show_fields(dict(state_lines(state)))
