"""A gateway in a thread of the tests, and what they send it."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from waiting import until

from serving.gateway.server import EngineSizes, Server, make_service
from serving.gateway.service import Allowed
from serving.gateway.tenants import Tenant, Tenants, hash_of

SMALL = EngineSizes(residents=4, rows=8, positions=256, tokens=4096, adapter_bytes=2**21)


@contextmanager
def gateway(
    base: Path,
    adapters: Mapping[str, Path],
    tenants: Tenants | None = None,
    sizes: EngineSizes = SMALL,
    allowed: Allowed | None = None,
    replicas: int = 1,
) -> Iterator[Server]:
    """A server on a free port of loopback, which ends with the block."""
    service = make_service(base, adapters, tenants, sizes, allowed, "tiny", replicas)
    server = Server(service, "127.0.0.1", 0, drain_s=5)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


KEYS = {name: f"ft-key-of-{name}" for name in ("alice", "bob", "eve", "operator")}


def tenants_of(**changes: dict[str, Any]) -> Tenants:
    """Alice and Bob, who bring adapters; Eve, who may use nothing; and an operator."""
    described: dict[str, dict[str, Any]] = {
        "alice": {"adapters": ["lora", "tiny"], "uploads": 3},
        "bob": {"adapters": ["dora"], "uploads": 3},
        "eve": {},
        "operator": {"operator": True},
    }
    tenants = []
    for name, description in described.items():
        description |= changes.get(name, {})
        tenants.append(Tenant(name=name, keys=[hash_of(KEYS[name])], **description))
    return Tenants(tenants)


def client_of(server: Server, name: str = "nobody") -> openai.OpenAI:
    """OpenAI's client with a tenant's key, which tries once."""
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEYS.get(name, name), max_retries=0)


def files_of(folder: Path) -> dict[str, Any]:
    """The form that an adapter's folder is brought with."""
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    return {
        "config": (config, (folder / config).read_bytes()),
        "weights": (weights, (folder / weights).read_bytes()),
    }
