"""What killed clients and ended runs have left on a cluster, and its removal."""

from typing import Any

from clusters.kubernetes import Kubernetes
from clusters.kubernetes_leftovers import Leftover, leftovers_of, remove_found
from orchestrator.backends import open_cluster
from orchestrator.errors import InputError


def leftovers(name: str) -> list[Leftover]:
    """What is left over on a cluster of this name; raises InputError for one of another kind, and Unreachable."""
    return leftovers_of(_kubernetes(name))


def prune(name: str, found: list[Leftover]) -> list[Leftover]:
    """Remove what was found, if it is left over still; gives what was removed. Raises Unreachable."""
    return remove_found(_kubernetes(name), found)


def plain_leftover(leftover: Leftover, is_removed: bool) -> dict[str, Any]:
    """A leftover as plain data, for JSON."""
    return {
        "what": leftover.what,
        "why": leftover.why,
        "size": leftover.size,
        "by_hand": leftover.by_hand,
        "removed": is_removed,
    }


def leftover_line(leftover: Leftover) -> str:
    """A leftover in one line."""
    line = f"{leftover.what}: {leftover.why}"
    if leftover.size:
        megabytes = leftover.size / 1e6
        line += f", {megabytes:,.1f} MB"
    if leftover.by_hand:
        line += f"; remove it with: {leftover.by_hand}"
    return line


def _kubernetes(name: str) -> Kubernetes:
    cluster = open_cluster(name)
    if not isinstance(cluster, Kubernetes):
        raise InputError(f"clusters prune: found {name!r}; allowed: a cluster of kind kubernetes")
    return cluster
