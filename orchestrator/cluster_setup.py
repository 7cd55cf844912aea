"""The environment of a cluster: made once, on its own machine, after somebody has agreed."""

import sys

import typer

from clusters.config import ClusterConfig, SshLink
from clusters.kubernetes_config import KubernetesConfig
from clusters.remote.cluster import RemoteCluster
from clusters.remote.machine import EnvironmentMissing
from orchestrator.backends import config_of, far_machine, open_cluster
from orchestrator.errors import InputError
from orchestrator.terminal.messages import tell


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
    if not yes and not (sys.stdin.isatty() and _agrees(name, config)):
        raise missing
    far_machine(name, config).set_up(_show)


def _agrees(name: str, config: ClusterConfig) -> bool:
    """Ask whether the packages of a cluster may be installed, after saying what that does and how long it takes."""
    tell(f"cluster {name}: the packages that runs need are not there yet.")
    root = config.root or "~/.fleetune"
    where = f"To install them makes a Python environment there, in {root}/environments, and changes nothing else;"
    if config.trains_with_python:
        size = "pip downloads PyTorch, DeepSpeed, Ray and more into it: about 6 GB, which takes 5 to 30 minutes."
    else:
        size = "pip downloads about 30 MB into it, which takes a minute or two; the rest is in the container."
    again = "It is done once for these versions. pip's log is shown, and it goes on there when the connection is cut."
    tell(f"{where} {size} {again}")
    return typer.confirm("Install them now?", err=True)


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
