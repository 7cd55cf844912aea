"""Where a job would run: a cluster, this machine, or GPUs that somebody only speaks of."""

from typing import NamedTuple

from clusters.base import Capacity, Cluster, Unreachable
from clusters.local import Local
from clusters.machine import total_capacity
from orchestrator.backends import CLUSTERS, config_of, make_request, open_cluster
from orchestrator.errors import InputError, JobRefused
from orchestrator.planning.device import Device, planned_device
from orchestrator.planning.earlier import earlier_costs
from orchestrator.planning.sizes import host_bytes
from orchestrator.runs import new_id
from runfolder.costs import Costs
from runfolder.job import Job
from trainer.devices import bytes_of

UNTOLD = Capacity("gpu", 0, 0)  # GPUs, and nobody tells how many


class PlannedPlace(NamedTuple):
    """Where a job would run: what workers find there, whether its files are this machine's, and what it is given.

    `host` is the memory of a node in bytes, None where it is not known; `earlier` is what the newest runs there have
    cost.
    """

    capacity: Capacity
    device: Device
    host: int | None
    is_here: bool
    request: str | None
    earlier: list[Costs]
    warnings: tuple[str, ...] = ()


def planned_place(job: Job, cluster: str | None, said: Device) -> PlannedPlace:
    """The place of a job on a cluster; without one this machine, which is asked nothing.

    With a GPU that somebody says, a cluster that does not answer, or would not take the job, is a warning.
    """
    if cluster is None:
        return _without_cluster(said)
    backend = open_cluster(cluster)
    said = _with_configured_memory(said, cluster)
    is_said = said != Device()
    warnings = []
    try:
        request = make_request(backend, job, new_id(job.name)).text
    except JobRefused as error:
        if not is_said:
            raise
        request = None
        warnings.append(f"{cluster} would not take this job: {error}")
    capacity, problem = _capacity_of(backend, cluster, is_said)
    if problem:
        warnings.append(problem)
    site = backend.site
    device = planned_device(capacity, site.is_here, said)
    host = host_bytes() if isinstance(backend, Local) and not is_said else None
    return PlannedPlace(capacity, device, host, site.is_here, request, earlier_costs(site), tuple(warnings))


def _without_cluster(said: Device) -> PlannedPlace:
    """This machine, or GPUs of which nobody says where they are."""
    capacity = UNTOLD
    host = None
    if said == Device():
        kind, total = total_capacity()
        capacity = Capacity(kind, total, total)
        host = host_bytes()
    device = planned_device(capacity, True, said)
    earlier = earlier_costs(open_cluster("local").site)
    return PlannedPlace(capacity, device, host, True, None, earlier)


def _with_configured_memory(said: Device, cluster: str) -> Device:
    """The GPU that somebody says; else with the memory that the clusters file gives it."""
    if said != Device() or cluster in CLUSTERS:
        return said
    gib = config_of(cluster).gpu_gib
    if gib is None:
        return said
    return Device(None, bytes_of(gib))


def _capacity_of(backend: Cluster, cluster: str, is_said: bool) -> tuple[Capacity, str | None]:
    """What a cluster has for workers, and a warning where it does not tell; raises InputError where nobody does."""
    try:
        capacity = backend.capacity()
    except Unreachable as error:
        if not is_said:
            raise InputError(f"{error}; --gpu H100 plans without its answer") from None
        return UNTOLD, f"planned without an answer of {cluster}: {error}"
    if is_said and capacity.kind == "cpu":
        return UNTOLD, None
    return capacity, None
