"""`fleetune cluster`: start, stop and look at the cluster on this machine."""

import typer

from orchestrator.terminal import Json, print_json

app = typer.Typer(help="Start, stop and look at the cluster on this machine.", no_args_is_help=True)


@app.command("start")
def start() -> None:
    """Start the supervisor of this machine; a job that is submitted does so too."""
    from clusters.local import Local

    Local.here().start()


@app.command("stop")
def stop() -> None:
    """End supervisor, controllers and Ray; runs that are not done go on at the next start."""
    from clusters.local import Local

    Local.here().stop()


@app.command("status")
def status(as_json: Json = False) -> None:
    """Show what of the cluster on this machine is alive."""
    from dataclasses import asdict

    from clusters.local import Local

    state = Local.here().state()
    fields = {**state, "capacity": asdict(state["capacity"])}
    if as_json:
        return print_json(fields)
    from orchestrator.render import show_fields

    return show_fields(fields)
