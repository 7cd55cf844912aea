"""`fleetune clusters`: the clusters of the clusters file, connections to them, and what is installed there."""

import subprocess
import sys
from typing import Annotated

import typer

from orchestrator.commands.arguments import YesOption
from orchestrator.terminal.messages import Json, print_json

clusters_app = typer.Typer()
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A cluster of the clusters file.")]


@clusters_app.callback(invoke_without_command=True)
def clusters_command(context: typer.Context) -> None:
    """List the clusters of the clusters file, connect to one, set one up."""
    if context.invoked_subcommand is None:
        list_clusters()


@clusters_app.command("list")
def list_clusters(as_json: Json = False) -> None:
    """Show the clusters with kind, capacity, and what is wrong."""
    from orchestrator.cluster_views import cluster_views

    views = cluster_views()
    if as_json:
        return print_json([view.dump() for view in views])
    from orchestrator.terminal.render import show_clusters

    return show_clusters(views)


@clusters_app.command("connect")
def connect_command(name: NameArgument) -> None:
    """Open the connection to a cluster in the foreground, which may ask for a password or a second factor."""
    from orchestrator.backends import config_of, link_of
    from orchestrator.errors import InputError

    link = link_of(name, config_of(name))
    command = link.foreground()
    if not command:
        raise InputError(f"cluster {name}: it is on this machine; there is nothing to connect to")
    ended = subprocess.run(command, check=False)
    raise typer.Exit(3 if ended.returncode else 0)


@clusters_app.command("setup")
def setup_command(name: NameArgument, yes: YesOption = False) -> None:
    """Install the packages that runs need on a cluster, once for each version of them."""
    from orchestrator.cluster_setup import set_up_cluster

    made_now = set_up_cluster(name, yes)
    done = "are there now" if made_now else "were there already"
    print(f"cluster {name}: the packages {done}", file=sys.stderr)


@clusters_app.command("prune")
def prune_command(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, it is only shown.")] = False,
    as_json: Json = False,
) -> None:
    """Show what killed clients and ended runs have left on a Kubernetes cluster, and remove it with --yes."""
    from orchestrator.prune import leftover_line, leftovers, plain_leftover, prune

    found = leftovers(name)
    removed = prune(name, found) if yes else []
    gone = {leftover.what for leftover in removed}
    if as_json:
        return print_json([plain_leftover(leftover, leftover.what in gone) for leftover in found])
    for leftover in found:
        verb = "removed " if leftover.what in gone else ""
        print(f"{verb}{leftover_line(leftover)}")
    if not found:
        print(f"cluster {name}: nothing is left over", file=sys.stderr)
    elif not yes:
        print(f"nothing was removed; to remove it: fleetune clusters prune {name} --yes", file=sys.stderr)
    return None
