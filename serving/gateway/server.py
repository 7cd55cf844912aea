"""A gateway as a server: in front of one engine in this process, or of several through Ray Serve."""

import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from serving.engine import Engine
from serving.garbage import leave_to_no_collection
from serving.gateway.answering import Answering
from serving.gateway.app import create_app
from serving.gateway.engine_thread import EngineThread
from serving.gateway.idle import IdleConnections
from serving.gateway.replicas import Replicas
from serving.gateway.service import Allowed, Service
from serving.gateway.tenants import Tenants
from serving.gateway.text import Codec
from serving.gateway.usage import UsageFolder

CONNECTIONS = 2048
DRAIN_S = 60  # for answers that are under way when the server is told to end
TICKS = 10  # of uvicorn, in a second
SWITCH_S = 0.001  # a turn of a thread: the engine's must not keep the server's from its sockets


@dataclass(frozen=True)
class EngineSizes:
    """How much an engine has room for."""

    residents: int = 64
    rows: int = 256
    positions: int = 4096
    tokens: int = 65536
    adapter_bytes: int = 2**30


class Server(uvicorn.Server):
    """Uvicorn that refuses new requests once it is told to end, answers those that it has, and ends with 0."""

    def __init__(self, service: Service, host: str, port: int, drain_s: int = DRAIN_S) -> None:
        """Listen on a host's port; 0 is any that is free."""
        config = uvicorn.Config(
            create_app(service),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=drain_s,
            ws="none",
        )
        super().__init__(config)
        self.service = service
        self._idle = IdleConnections(service.allowed.head_s)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Drain; a second interruption ends at once."""
        self.service.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn does ten times a second; here, once a second, connections are left that are idle."""
        if counter % TICKS == 0:
            connections = list(self.server_state.connections)
            self._idle.look(connections, time.monotonic())  # type: ignore[arg-type]
        return await super().on_tick(counter)

    @property
    def address(self) -> str:
        """Where it listens, once it has started."""
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{port}"

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Begin to listen, and say where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            print(f"serving on {self.address}", flush=True)


def make_service(
    base: str | Path,
    adapters: Mapping[str, Path],
    tenants: Tenants | None = None,
    sizes: EngineSizes | None = None,
    allowed: Allowed | None = None,
    name: str | None = None,
    replicas: int = 1,
    usage: UsageFolder | None = None,
) -> Service:
    """A base with an operator's adapters, ready to be served; raises BaseRefused or AdapterRefused."""
    sizes = sizes or EngineSizes()
    answering: Answering
    if replicas > 1:
        answering = started_replicas(base, sizes, replicas)
    else:
        engine = Engine(base, **asdict(sizes))
        answering = EngineThread(engine)
    return service_before(answering, base, adapters, tenants, usage, allowed, name)


def service_before(
    answering: Answering,
    base: str | Path,
    adapters: Mapping[str, Path],
    tenants: Tenants | None,
    usage: UsageFolder | None,
    allowed: Allowed | None = None,
    name: str | None = None,
) -> Service:
    """A service before engines that are up, with an operator's adapters; raises AdapterRefused."""
    base_name = name or Path(base).name
    codec = Codec(base)
    allowed = allowed or Allowed()
    service = Service(answering, codec, base_name, tenants, allowed, usage)
    for adapter_name, folder in adapters.items():
        service.library.share(adapter_name, folder)
    return service


def started_replicas(base: str | Path, sizes: EngineSizes, count: int) -> Replicas:
    """So many replicas of a base through Ray Serve, each with a GPU where there are GPUs."""
    from serving.gateway.replica import start_replicas

    gpus = 1.0 if torch.cuda.is_available() else 0.0
    handles = start_replicas(str(base), asdict(sizes), count, gpus)
    positions, _ = handles[0].about.remote().result()
    return Replicas(handles, positions)


def usual_replicas() -> int:
    """One replica for each GPU; one on the CPU."""
    return max(1, torch.cuda.device_count())


def run_server(service: Service, host: str, port: int) -> None:
    """Serve until a signal says to end."""
    sys.setswitchinterval(SWITCH_S)
    leave_to_no_collection()
    Server(service, host, port).run()
