"""`fleetune serve --cluster`: a service as a run of a cluster, which lasts until somebody cancels it."""

from functools import partial
from pathlib import Path

from pydantic import ValidationError

from orchestrator.backends import make_request, open_cluster, open_to_submit
from orchestrator.errors import InputError
from orchestrator.evaluation.adapters import resolve_adapters
from orchestrator.planning.freeze import Sent, bringer, frozen_of
from orchestrator.runs import find, new_id
from orchestrator.serve import Serving, named_places, read_keys
from orchestrator.submit import Submission, clear_ending, submit_frozen
from runfolder.resources import Resources
from runfolder.service import ServiceSpec
from runfolder.site import Site
from runfolder.sources import ClusterFile, parse_source

LAST_ANSWERS_S = 60  # that answers under way may take when the service must end


def planned_service(serving: Serving, cluster: str, name: str, resources: Resources) -> str:
    """What would be submitted, with the places that the command line names; nothing is made. Raises InputError."""
    service = service_of(serving, name, resources)
    adapters = {}
    for adapter, place in service.adapters.items():
        adapters[adapter] = path_there(place)
    base = path_there(service.base)
    tenants = path_there(service.tenants)
    there = service.model_copy(update={"adapters": adapters, "base": base, "tenants": tenants})
    backend = open_cluster(cluster)
    request = make_request(backend, there, new_id(name))
    return request.text


@clear_ending()
def serve_on_cluster(
    serving: Serving,
    cluster: str,
    name: str,
    resources: Resources,
    sent: Sent = lambda _file, _bytes, _total: None,
) -> Submission:
    """Submit a service to a cluster; what lies here is sent there. Raises InputError or Unreachable."""
    named = service_of(serving, name, resources)
    tenants = named.tenants
    if path_there(tenants) == tenants:
        read_keys(Path(tenants))
    backend = open_to_submit(cluster)
    make_request(backend, named, new_id(name))  # what is refused is so before anything is sent
    service = brought_there(named, backend.site, cluster, sent)
    frozen = frozen_of(service, cluster, {})
    described = partial(Submission, cluster=cluster, warnings=())
    return submit_frozen(backend, service, frozen, described, run_id=None, announce=lambda _: None)


def service_resources(gpus: int | None, walltime: str | None) -> Resources:
    """What a service needs, as the command line says it; raises InputError."""
    wanted = {"gpus_per_node": gpus, "walltime": walltime, "grace": LAST_ANSWERS_S}
    try:
        return Resources.model_validate(wanted)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(f"--walltime: {problem['msg']}; allowed: like 90s, 30m, 8h, 2d") from None


def service_of(serving: Serving, name: str, resources: Resources) -> ServiceSpec:
    """The spec of a service, with the places that the command line names; raises InputError."""
    if serving.tenants_file is None:
        raise InputError("--tenants: missing; others reach the nodes of a cluster, so a service there needs keys")
    adapters = named_places(serving.adapters)
    try:
        tenants = str(serving.tenants_file)
        return ServiceSpec(name=name, base=serving.base, adapters=adapters, tenants=tenants, resources=resources)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"]))
        raise InputError(f"{field}: {problem['msg']}") from None


def brought_there(service: ServiceSpec, site: Site, cluster: str, sent: Sent) -> ServiceSpec:
    """The service with its files where it will run; raises InputError."""
    bring = bringer(site, sent)
    adapters = {}
    for name, place in service.adapters.items():
        there = place_there(place, cluster)
        if there is None:
            (source,) = resolve_adapters([place])
            there = bring(source.folder)
        adapters[name] = there
    base = path_there(service.base)
    if Path(base).is_dir():
        base = bring(Path(base))
    tenants = path_there(service.tenants)
    if tenants == service.tenants:
        tenants = bring(Path(tenants))
    return service.model_copy(update={"adapters": adapters, "base": base, "tenants": tenants})


def path_there(place: str) -> str:
    """The path in `cluster:/path`; any other place as it is."""
    source = parse_source(place)
    if isinstance(source, ClusterFile):
        return str(source.path)
    return place


def place_there(place: str, cluster: str) -> str | None:
    """The folder on a cluster of `cluster:/path`, or of a run that it has; None for what lies elsewhere."""
    source = parse_source(place)
    if isinstance(source, ClusterFile):
        return str(source.path)
    if Path(place).is_dir():
        return None
    run = find(place)
    if run.cluster_name != cluster:
        return None
    snapshot = run.snapshot()
    if not snapshot.has_output:
        raise InputError(f"run {run.run_id}: found no output; allowed: a run that has succeeded")
    return f"{snapshot.run_dir}/output"
