"""Where a job would run: a cluster, this machine, or GPUs that somebody only speaks of."""

from typing import NamedTuple

from clusters.base import Capacity, Unreachable
from clusters.local import Local
from clusters.machine import total_capacity
from orchestrator.backends import CLUSTERS, config_of, make_request, open_cluster
from orchestrator.errors import JobRefused
from orchestrator.planning.device import Device, planned_device
from orchestrator.planning.earlier import earlier_costs
from orchestrator.planning.sizes import host_bytes
from orchestrator.runs import new_id
from runfolder.costs import Costs
from runfolder.job import Job
from trainer.devices import bytes_of, memory_of_name

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

    With a GPU that somebody says, or the clusters file, a cluster that does not answer is a warning; with one that
    somebody says, so is one that would not take the job. Raises JobRefused and Unreachable otherwise.
    """
    if cluster is None:
        return _without_cluster(said)
    backend = open_cluster(cluster)
    site = backend.site
    known = said if said != Device() else _configured_device(cluster)
    warnings = []
    request = None
    capacity = UNTOLD
    earlier: list[Costs] = []
    try:
        try:
            request = make_request(backend, job, new_id(job.name)).text
        except JobRefused as error:
            if said == Device():
                raise
            warnings.append(f"{cluster} would not take this job: {error}")
        capacity = backend.capacity()
        earlier = earlier_costs(site)
    except Unreachable as error:
        if known == Device():
            raise Unreachable(f"{_in_full(error, cluster)}; --gpu H100 plans without its answer") from None
        warnings.append(f"planned without an answer: {_in_full(error, cluster)}")
    if known.memory is not None and capacity.kind == "cpu":
        capacity = UNTOLD
    if capacity.kind == "gpu" and not _gives_gpus_unasked(cluster) and job.resources.gpus_per_node is None:
        asked = f"so what is sent to {cluster} asks for no GPU; 1 or more does"
        warnings.append(f"resources.gpus_per_node: found nothing, {asked}")
    device = planned_device(capacity, site.is_here, known)
    host = host_bytes() if isinstance(backend, Local) and said == Device() else None
    return PlannedPlace(capacity, device, host, site.is_here, request, earlier, tuple(warnings))


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


def _gives_gpus_unasked(cluster: str) -> bool:
    """Whether each worker gets a GPU there, where there are some, whatever its job says."""
    if cluster in CLUSTERS:
        return True
    config = config_of(cluster)
    return config.kind == "local"


def _configured_device(cluster: str) -> Device:
    """The GPU of a cluster as far as the clusters file says it."""
    if cluster in CLUSTERS:
        return Device()
    config = config_of(cluster)
    name = getattr(config, "gpu_type", None)
    if config.gpu_gib is not None:
        return Device(name, bytes_of(config.gpu_gib))
    if name is None:
        return Device()
    return Device(name, memory_of_name(name))


def _in_full(error: Unreachable, cluster: str) -> str:
    """What an error says, with the cluster's name where it leaves that out."""
    said = str(error)
    if cluster in said:
        return said
    return f"cluster {cluster}: {said}"
