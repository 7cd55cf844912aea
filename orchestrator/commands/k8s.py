"""`fleetune k8s`: what a Kubernetes cluster has before its first run."""

import sys
from typing import Annotated

import typer

k8s_app = typer.Typer(help="Prepare a namespace of a Kubernetes cluster for runs.", no_args_is_help=True)
EntryOption = Annotated[str, typer.Option("--cluster", metavar="NAME", help="A cluster of the clusters file.")]
SizeOption = Annotated[
    str | None, typer.Option("--storage", metavar="SIZE", help="The size of the volume, like 2Ti; 500Gi without it.")
]
ClassOption = Annotated[
    str | None,
    typer.Option("--storage-class", metavar="NAME", help="What many nodes can write; the default class without it."),
]


@k8s_app.command("manifests")
def manifests_command(cluster: EntryOption, storage: SizeOption = None, storage_class: ClassOption = None) -> None:
    """Print what is applied once: namespace, accounts, access, volume and network policies."""
    from k8s.text import manifests_text
    from orchestrator.k8s_install import manifests_for

    print(manifests_text(manifests_for(cluster, storage, storage_class)), end="")


@k8s_app.command("keeper")
def keeper_command(cluster: EntryOption) -> None:
    """Print a CronJob that submits open runs again that nothing carries any more, for whoever wants one."""
    from k8s.text import manifests_text
    from orchestrator.k8s_install import keeper_for

    print(manifests_text(keeper_for(cluster)), end="")


@k8s_app.command("install")
def install_command(
    cluster: EntryOption,
    storage: SizeOption = None,
    storage_class: ClassOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be applied, in order.")] = False,
    take_over: Annotated[bool, typer.Option("--take-over", help="Change, too, what others have made.")] = False,
) -> None:
    """Apply what `manifests` prints; repeating it is safe."""
    from orchestrator.k8s_install import install, plan_of_install

    if dry_run:
        print("\n".join(plan_of_install(cluster, storage, storage_class)))
        return
    install(cluster, storage, storage_class, print, take_over)
    print(f"look at it with: fleetune doctor --cluster {cluster}", file=sys.stderr)
