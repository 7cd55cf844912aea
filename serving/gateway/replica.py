"""Engines as replicas of Ray Serve, one on each GPU.

Each replica is a deployment of its own, so that who gets a request is decided by `replicas.py`: Ray Serve starts it,
looks after its health and starts it again when it has died.
"""

import logging
import os
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import ray
from ray import serve

from serving.engine import Engine
from serving.error import AdapterRefused
from serving.gateway.adapter_files import AdapterFiles
from serving.gateway.answering import Loaded
from serving.gateway.engine_thread import EngineThread
from serving.gateway.refusal import ApiRefusal
from serving.sequence import Request

ANSWERS_OF_REPLICA = 4096  # that Ray Serve hands to it at once; the engine has its own queue


class Saying(NamedTuple):
    """What a replica says of an answer: first that it takes the request, or why not, then tokens."""

    tokens: list[int]
    lacks_adapter: bool = False
    refusal: str = ""


class EngineReplica:
    """An engine in a process of its own. Adapters are known here by their digests."""

    def __init__(self, base: str, sizes: dict[str, int]) -> None:
        engine = Engine(base, **sizes)
        self._thread = EngineThread(engine)
        self._thread.start()

    async def answer(self, request: Request) -> AsyncIterator[Saying]:
        """The tokens of an answer, as they come."""
        try:
            (stream,) = await self._thread.submit([request])
        except ApiRefusal as refusal:
            yield refused_saying(refusal)
            return
        yield Saying([])
        try:
            async for tokens in stream.tokens():
                yield Saying(tokens)
        except ApiRefusal as refusal:
            yield refused_saying(refusal)
        finally:
            self._thread.cancel(stream)

    async def load(self, files: AdapterFiles) -> Loaded | str:
        """Read an adapter, or say why it is refused."""
        name = f"new/{id(files)}"
        engine = self._thread.engine
        try:
            loaded = await self._thread.load_files(name, files)
        except AdapterRefused as refusal:
            return str(refusal)
        packed = engine.pool.packed_of(name)
        await self._thread.call(lambda: engine.give(loaded.digest, packed))
        await self._thread.unload(name)
        return loaded

    async def forget(self, digest: str) -> None:
        """Forget an adapter that no name means any more."""
        if digest in self._thread.engine.pool.names:
            await self._thread.unload(digest)

    async def resident(self) -> set[str]:
        """The digests of the adapters on the device."""
        return await self._thread.resident()

    async def about(self) -> tuple[int, int]:
        """Positions of a sequence at most, and the id of this process."""
        process = os.getpid()
        return self._thread.positions, process

    def check_health(self) -> None:
        """Tell Ray Serve to start another one where the engine has failed."""
        if self._thread.broken:
            raise RuntimeError("the engine has failed")


def refused_saying(refusal: ApiRefusal) -> Saying:
    """What is said of a refusal; raises RuntimeError where it is the engine that fails: another one may answer."""
    if refusal.status >= 500:
        raise RuntimeError(refusal.message)
    return Saying([], refusal.status == 404, refusal.message)


def start_replicas(base: str, sizes: dict[str, int], count: int, gpus: float) -> list[Any]:
    """Start so many replicas of a base with so many GPUs each, and wait until they are up; gives their handles."""
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")  # without one, Ray would join whatever runs on this machine
        ray.init(address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"location": "NoServer"})
    deployment = serve.deployment(EngineReplica).options(
        num_replicas=1,
        max_ongoing_requests=ANSWERS_OF_REPLICA,
        ray_actor_options={"num_gpus": gpus, "num_cpus": 0},
        health_check_period_s=1,
        graceful_shutdown_timeout_s=1,
    )
    targets = []
    for number in range(count):
        application = deployment.options(name=f"engine-{number}").bind(base, sizes)
        targets.append(serve.RunTarget(application, name=f"fleetune-{number}", route_prefix=None))
    handles: list[Any] = serve.run_many(targets)  # all of them load the base at once
    return handles


def end_replicas() -> None:
    """End all replicas that were started, and with them a Ray that was started for them."""
    serve.shutdown()
    ray.shutdown()
