"""The environment of a cluster: made once, on its own machine, after somebody has agreed."""

import sys

import typer

from clusters.config import SshLink
from clusters.kubernetes_config import KubernetesConfig
from clusters.remote.cluster import RemoteCluster
from clusters.remote.machine import EnvironmentMissing
from orchestrator.backends import config_of, far_machine, open_cluster
from orchestrator.errors import InputError


def set_up_cluster(name: str, yes: bool) -> bool:
    """Have the environment of a cluster made, unless it is there; gives whether it was not."""
    config = config_of(name)
    if isinstance(config, KubernetesConfig):
        raise InputError(
            f"cluster {name}: its image has the packages; prepare it: fleetune k8s install --cluster {name}"
        )
    if not isinstance(config.link, SshLink):
        raise InputError(f"cluster {name}: it is on this machine; install here: pip install 'fleetune[train]'")
    if config.python:
        raise InputError(
            f"cluster {name}: python: found {config.python!r}, which is used as it is; "
            "allowed: none, for an environment that Fleetune makes"
        )
    cluster = open_cluster(name)
    assert isinstance(cluster, RemoteCluster)
    try:
        cluster.far_side.start()
    except EnvironmentMissing as missing:
        make_environment(missing, yes)
        return True
    return False


def make_environment(missing: EnvironmentMissing, yes: bool) -> None:
    """Make what is missing, with its log on the terminal; raises it where nobody agrees."""
    name = missing.cluster
    config = config_of(name)
    size = "about 6 GB" if config.trains_with_python else "about 30 MB beside the container"
    question = f"cluster {name}: the packages that runs need are not there yet ({size}). Install them now?"
    if not yes and not (sys.stdin.isatty() and typer.confirm(question, err=True)):
        raise missing
    far_machine(name, config).set_up(_show)


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
