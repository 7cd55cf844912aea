"""The adapters that have names: those of the operator, which are shared, and those that tenants brought.

A name never becomes a path. What a tenant brings is written into a new folder of a random name, read, and removed;
the operator's folders are given when the server starts. A tenant's names are its own: two may have one each.
"""

import asyncio
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from serving.error import AdapterRefused
from serving.gateway.engine_thread import EngineThread
from serving.gateway.refusal import ApiRefusal, invalid, unknown_model
from serving.gateway.tenants import Tenant
from serving.packed import Packed

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CONFIG_BYTES = 64 * 2**10
# Patterns of a config are regular expressions. Without groups and with few repetitions they cannot take for ever.
PATTERN = re.compile(r"[A-Za-z0-9_.\\^$|*+?-]{1,200}")
MOST_REPETITIONS = 2
MOST_PATTERNS = 1000
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")
FILES_OF_KIND = {
    "adapter_config.json": "adapter_model.safetensors",
    "bottleneck_config.json": "bottleneck.safetensors",
}


@dataclass(frozen=True)
class Registered:
    """An adapter that has a name."""

    name: str
    owner: str  # a tenant; "" of the operator's
    digest: str
    created: int

    @property
    def key(self) -> str:
        """Its name in the engine's pool, which is nobody else's: names have no slash."""
        return f"{self.owner}/{self.name}"

    def to_json(self) -> dict[str, Any]:
        """The adapter as an entry of /v1/models."""
        owner = self.owner or "shared"
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": owner,
            "digest": self.digest,
        }


class Library:
    """Registers adapters, finds them by name for a tenant, and forgets them."""

    def __init__(self, thread: EngineThread, base_name: str) -> None:
        """`base_name` is what the base itself is called."""
        self.thread = thread
        self.base_name = base_name
        self.created = int(time.time())
        self._by_key: dict[str, Registered] = {}
        self._loader = ThreadPoolExecutor(1, "loader")
        self._changing = asyncio.Lock()  # one adapter after the other comes and goes

    def share(self, name: str, folder: Path) -> Registered:
        """Register an adapter of the operator's, before the engine's thread starts; raises AdapterRefused."""
        if not ADAPTER_NAME.fullmatch(name) or name == self.base_name:
            raise AdapterRefused(f"adapter: found the name {name!r}; allowed: letters, digits, dot, dash, underscore")
        registered = Registered(name, "", self.thread.engine.load(f"/{name}", folder), int(time.time()))
        self._by_key[registered.key] = registered
        return registered

    def visible(self, tenant: Tenant) -> list[Registered]:
        """The adapters that a tenant may use."""
        found: list[Registered] = []
        for registered in self._by_key.values():
            shared = not registered.owner and tenant.may_use(registered.name)
            if shared or registered.owner == tenant.name:
                found.append(registered)
        return found

    def find(self, tenant: Tenant, name: str) -> Registered | None:
        """What a name means for a tenant; None is the base. Raises ApiRefusal where it means nothing."""
        if name == self.base_name and tenant.may_use(name):
            return None
        own = self._by_key.get(f"{tenant.name}/{name}")
        if own is not None:
            return own
        shared = self._by_key.get(f"/{name}")
        if shared is not None and tenant.may_use(name):
            return shared
        raise unknown_model(name)

    async def bring(self, tenant: Tenant, name: str, config_name: str, config: bytes, weights: bytes) -> Registered:
        """Register an adapter that a tenant brings, in the place of its own of that name; raises ApiRefusal."""
        check_config(config)
        async with self._changing:
            self._check_name(tenant, name)
            loop = asyncio.get_running_loop()
            try:
                packed = await loop.run_in_executor(self._loader, self._prepare, config_name, config, weights)
                await self.thread.call(lambda: self.thread.engine.give(f"{tenant.name}/{name}", packed))
            except AdapterRefused as error:
                raise invalid(str(error)) from error
            registered = Registered(name, tenant.name, packed.digest, int(time.time()))
            self._by_key[registered.key] = registered
            return registered

    async def forget(self, tenant: Tenant, name: str) -> Registered:
        """Forget an adapter of a tenant's own; raises ApiRefusal."""
        async with self._changing:
            registered = self._by_key.pop(f"{tenant.name}/{name}", None)
            if registered is None:
                raise unknown_model(name)
            await self.thread.call(lambda: self.thread.engine.unload(registered.key))
            return registered

    async def residency(self) -> list[tuple[str, str, bool]]:
        """Of each adapter its owner, its name, and whether it is in a slot."""
        resident = await self.thread.call(lambda: self.thread.engine.pool.resident)
        found: list[tuple[str, str, bool]] = []
        for adapter in self._by_key.values():
            found.append((adapter.owner, adapter.name, adapter.digest in resident))
        return found

    def holds(self, adapter: Registered) -> bool:
        """Whether an adapter's name is still there."""
        return adapter.key in self._by_key

    def close(self) -> None:
        """End the thread that reads adapters."""
        self._loader.shutdown()

    def _check_name(self, tenant: Tenant, name: str) -> None:
        """Raise ApiRefusal where a tenant may not have one more adapter, of this name."""
        if not ADAPTER_NAME.fullmatch(name):
            raise invalid("name: allowed: up to 64 letters, digits, dots, dashes and underscores")
        if name == self.base_name or (f"/{name}" in self._by_key and tenant.may_use(name)):
            raise ApiRefusal(409, f"name: found {name}, which is a shared adapter's", "name_taken")
        own = [adapter for adapter in self._by_key.values() if adapter.owner == tenant.name]
        is_new = f"{tenant.name}/{name}" not in self._by_key
        if is_new and len(own) >= tenant.uploads:
            raise ApiRefusal(403, f"adapters: found {len(own)}; allowed: {tenant.uploads} of your own", "too_many")

    def _prepare(self, config_name: str, config: bytes, weights: bytes) -> Packed:
        """An adapter on the host from the bytes of its files; raises AdapterRefused that names no folder."""
        with tempfile.TemporaryDirectory(prefix="fleetune-adapter-") as scratch:
            folder = Path(scratch)
            (folder / config_name).write_bytes(config)
            (folder / FILES_OF_KIND[config_name]).write_bytes(weights)
            packed = reading(lambda: self.thread.engine.pool.prepare(folder), f"{scratch}/")
        check_finite(packed)
        return packed


def reading(read: Callable[[], Packed], hidden: str) -> Packed:
    """What a reader of untrusted files gives; raises AdapterRefused for whatever it raises, without a path in it."""
    try:
        return read()
    except AdapterRefused as error:
        message = str(error).replace(hidden, "").replace(hidden.rstrip("/"), "adapter")
        raise AdapterRefused(message) from error
    except Exception as error:
        logging.getLogger(__name__).info("an adapter could not be read", exc_info=True)
        kind = type(error).__name__
        raise AdapterRefused(f"adapter_config.json: found values that no adapter has ({kind})") from error


def check_config(raw: bytes) -> None:
    """Raise ApiRefusal where a config is too large, or has patterns that could take for ever."""
    if len(raw) > CONFIG_BYTES:
        raise invalid(f"config: found {len(raw)} bytes; allowed: {CONFIG_BYTES}")
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise invalid("config: found no JSON") from error
    if not isinstance(config, dict):
        raise invalid("config: allowed: an object")
    for key in PATTERN_KEYS:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise invalid(f"config.{key}: allowed: an object of at most {MOST_PATTERNS}")
        for pattern in patterns:
            repetitions = sum(pattern.count(sign) for sign in "*+?")
            if not PATTERN.fullmatch(pattern) or repetitions > MOST_REPETITIONS:
                raise invalid(f"config.{key}: allowed: names of modules, and patterns without groups")


def check_finite(packed: Packed) -> None:
    """Raise AdapterRefused where numbers have become infinite in the base's type, or by their scale."""
    adapter = packed.adapter
    tensors: list[Tensor | None] = [packed.block, adapter.prefix_L2VHE, adapter.prompt_VD]
    tensors += [adapter.embed_VD, adapter.head_VD]
    for tensor in tensors:
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise AdapterRefused("adapter: found values that are not finite in the base's type")
