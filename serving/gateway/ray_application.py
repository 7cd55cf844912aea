"""The gateway and its engines as one application of Ray Serve, for clusters where something else keeps Ray Serve up.

`serving.gateway.ray_application:build` is its import path; its arguments are a service's spec, how many engines there
are, and the folder for what tenants used.
"""

import asyncio
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from runfolder.service import ServiceSpec
from serving.gateway.app import create_app
from serving.gateway.quota import day_now
from serving.gateway.replica import ANSWERS_OF_REPLICA, EngineReplica
from serving.gateway.replicas import Replicas
from serving.gateway.server import EngineSizes, service_before
from serving.gateway.service import Service
from serving.gateway.tenants import read_tenants
from serving.gateway.usage import UsageFolder

CONNECTIONS_OF_GATEWAY = 2048


def build(arguments: dict[str, Any]) -> Any:
    """The application; raises ValidationError for arguments that are none."""
    plain = dict(arguments)
    engines = int(plain.pop("engines"))
    usage = str(plain.pop("usage"))
    sizes = EngineSizes(**plain.pop("sizes", {}))
    spec = ServiceSpec.model_validate(plain)
    gpus = 1.0 if spec.resources.gpus_per_node else 0.0
    engine = serve.deployment(EngineReplica).options(
        num_replicas=1,
        max_ongoing_requests=ANSWERS_OF_REPLICA,
        ray_actor_options={"num_gpus": gpus, "num_cpus": 0 if gpus else 1},
        health_check_period_s=1,
        graceful_shutdown_timeout_s=1,
    )
    handles = []
    for number in range(engines):
        handle = engine.options(name=f"engine-{number}").bind(spec.base, asdict(sizes))
        handles.append(handle)
    gateway = serve.deployment(RayGateway).options(
        num_replicas=1, max_ongoing_requests=CONNECTIONS_OF_GATEWAY, ray_actor_options={"num_cpus": 0}
    )
    return gateway.bind(spec.dump(), usage, handles)


@serve.ingress()
class RayGateway:
    """The gateway, as what Ray Serve's proxies hand requests to."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, plain: dict[str, Any], usage: str, handles: list[Any]
    ) -> None:
        """Serve the spec in plain data with these engines; what tenants used is in a folder."""
        torch.set_num_threads(1)  # it computes nothing but checks of adapters
        spec = ServiceSpec.model_validate(plain)
        self._service = await asyncio.to_thread(service_of_spec, spec, Path(usage), handles)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Ray Serve's proxies speak to."""
        return create_app(self._service)


def service_of_spec(spec: ServiceSpec, usage_folder: Path, handles: list[Any]) -> Service:
    """A service before engines that others start and end; raises what is wrong with files that it names."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    positions, _ = handles[0].about.remote().result()
    tenants = read_tenants(Path(spec.tenants))
    usage = UsageFolder(usage_folder)
    usage.clear(day_now())
    replicas = Replicas(handles, positions, owned=False)
    adapters = {}
    for name, folder in spec.adapters.items():
        adapters[name] = Path(folder)
    return service_before(replicas, spec.base, adapters, tenants, usage)
