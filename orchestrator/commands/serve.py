"""`fleetune serve`, and what it needs: keys for tenants, and adapters that are combined of others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.evaluate import BaseOption, SeveralValues
from orchestrator.errors import InputError
from orchestrator.terminal.messages import (
    Json,
    announce_submission,
    clear_count,
    count_answers,
    count_bytes,
    print_json,
    warn,
)

serve_app = typer.Typer()
LISTENS = "127.0.0.1"
LISTENS_AT = 8000

NamedAdaptersOption = Annotated[
    list[str] | None,
    typer.Option("--adapters", metavar="NAME=FOLDER_OR_RUN", help="An adapter and its name; repeatable."),
]
TenantsOption = Annotated[
    Path | None, typer.Option("--tenants", metavar="FILE", help="Who has keys; without it, this machine alone.")
]
ReplicasOption = Annotated[
    int | None, typer.Option("--replicas", min=1, help="Engines, through Ray Serve; one for each GPU without it.")
]
UsageOption = Annotated[Path | None, typer.Option("--folder", metavar="DIR", help="Where what tenants used is kept.")]
ThereOption = Annotated[
    str | None, typer.Option("--cluster", metavar="NAME", help="Serve there, until fleetune cancel ends it.")
]
GpusOption = Annotated[int | None, typer.Option("--gpus", min=1, help="On a cluster: GPUs, an engine on each.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what a cluster would get; make nothing.")]


@serve_app.command("serve")
def serve_command(
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="The model: a folder, or a hub id.")],
    adapters: NamedAdaptersOption = None,
    tenants: TenantsOption = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = LISTENS,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 is any that is free.")] = LISTENS_AT,
    replicas: ReplicasOption = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="One engine, in this process.")] = False,
    folder: UsageOption = None,
    cluster: ThereOption = None,
    name: Annotated[str | None, typer.Option("--name", help="On a cluster: of the service.")] = None,
    gpus: GpusOption = None,
    walltime: Annotated[str | None, typer.Option("--walltime", help="On a cluster: of its job, like 8h.")] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Serve a base and its adapters through OpenAI's API; the page at / tries them side by side."""
    from orchestrator.serve import Serving, serve

    here = {"--host": host != LISTENS, "--port": port != LISTENS_AT, "--replicas": replicas, "--no-ray": no_ray}
    here["--folder"] = folder is not None
    _check_place(cluster, here, {"--name": name, "--gpus": gpus, "--walltime": walltime, "--dry-run": dry_run})
    named = tuple(adapters or ())
    serving = Serving(base, named, tenants, host, port, 1 if no_ray else replicas, folder)
    if cluster is None:
        return serve(serving)
    from orchestrator.serve_on_cluster import planned_service, serve_on_cluster, service_resources

    resources = service_resources(gpus, walltime)
    name = name or "service"
    if dry_run:
        return print(planned_service(serving, cluster, name, resources), end="")
    return announce_submission(serve_on_cluster(serving, cluster, name, resources, count_bytes))


def _check_place(cluster: str | None, here: Mapping[str, object], there: Mapping[str, object]) -> None:
    """Raise InputError where options that are for this machine, or for a cluster, stand where they say nothing."""
    wrong = [option for option, given in (here if cluster else there).items() if given]
    if not wrong:
        return
    found = ", ".join(wrong)
    if cluster:
        raise InputError(f"--cluster: found with {found}; allowed: without, as the cluster says these")
    raise InputError(f"{found}: allowed: with --cluster")


@serve_app.command("key")
def key_command() -> None:
    """Make an API key: prints it, for its owner, and what the tenants file says of it."""
    from serving.gateway.tenants import hash_of, new_key

    key = new_key()
    print(f"key:             {key}")
    print(f"tenants file:    {hash_of(key)}")


@serve_app.command("combine", cls=SeveralValues)
def combine_command(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER:WEIGHT...", help="LoRA adapters: folders or runs, with weights.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new adapter's folder.")],
    how: Annotated[str, typer.Option("--how", help="linear, cat, svd, ties or dare.")] = "cat",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of the result, for svd, ties and dare.")] = None,
    density: Annotated[
        float, typer.Option("--density", min=0.01, max=1, help="What ties and dare keep of the updates.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Which numbers dare drops.")] = 0,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="TASK.YAML...", help="What parents and result are evaluated on."),
    ] = None,
    base: BaseOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Rows of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Combine LoRA adapters of one base into one, which serves and evaluates like any other."""
    from orchestrator.combine import combine_adapters, report_lines
    from orchestrator.mixture import MixtureTasks

    asked = MixtureTasks(tuple(tasks or ()), base, limit)
    report = combine_adapters(out, adapters, how, rank, density, seed, asked, count_answers)
    clear_count()
    for warning in report.get("evaluation", {}).get("warnings", []):
        warn(warning)
    if as_json:
        print_json(report)
        return
    for line in report_lines(report):
        print(line)
