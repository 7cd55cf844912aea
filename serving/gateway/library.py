"""The adapters that have names: those of the operator, which are shared, and those that tenants brought.

A name never becomes a path. What a tenant brings is written into a new folder of a random name, read, and removed;
the operator's folders are given when the server starts. A tenant's names are its own: two may have one each.
"""

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.error import AdapterRefused
from serving.gateway.adapter_files import AdapterFiles, check_config
from serving.gateway.answering import Answering, Loaded
from serving.gateway.refusal import ApiRefusal, invalid, unknown_model
from serving.gateway.tenants import Tenant

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Registered:
    """An adapter that has a name."""

    name: str
    owner: str  # a tenant; "" of the operator's
    loaded: Loaded
    created: int

    @property
    def digest(self) -> str:
        """The sha256 of its weights and config."""
        return self.loaded.digest

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

    def __init__(self, answering: Answering, base_name: str) -> None:
        """`base_name` is what the base itself is called."""
        self.answering = answering
        self.base_name = base_name
        self.created = int(time.time())
        self._by_key: dict[str, Registered] = {}
        self._changing = asyncio.Lock()  # one adapter after the other comes and goes

    def share(self, name: str, folder: Path) -> Registered:
        """Register an adapter of the operator's, before the engine's thread starts; raises AdapterRefused."""
        is_taken = name == self.base_name
        if is_taken or not ADAPTER_NAME.fullmatch(name):
            raise AdapterRefused(f"adapter: found the name {name!r}; allowed: letters, digits, dot, dash, underscore")
        loaded = self.answering.load_folder(f"/{name}", folder)
        since = int(time.time())
        registered = Registered(name, "", loaded, since)
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

    async def bring(self, tenant: Tenant, name: str, files: AdapterFiles) -> Registered:
        """Register an adapter that a tenant brings, in the place of its own of that name; raises ApiRefusal."""
        check_config(files.config)
        async with self._changing:
            self._check_name(tenant, name)
            try:
                loaded = await self.answering.load_files(f"{tenant.name}/{name}", files)
            except AdapterRefused as error:
                raise invalid(str(error)) from error
            registered = Registered(name, tenant.name, loaded, int(time.time()))
            self._by_key[registered.key] = registered
            return registered

    async def forget(self, tenant: Tenant, name: str) -> Registered:
        """Forget an adapter of a tenant's own; raises ApiRefusal."""
        async with self._changing:
            registered = self._by_key.pop(f"{tenant.name}/{name}", None)
            if registered is None:
                raise unknown_model(name)
            await self.answering.unload(registered.key)
            return registered

    async def residency(self) -> list[tuple[str, str, bool]]:
        """Of each adapter its owner, its name, and whether it is on the device."""
        resident = await self.answering.resident()
        found: list[tuple[str, str, bool]] = []
        for adapter in self._by_key.values():
            is_resident = adapter.digest in resident
            found.append((adapter.owner, adapter.name, is_resident))
        return found

    def holds(self, adapter: Registered) -> bool:
        """Whether an adapter's name is still there."""
        return adapter.key in self._by_key

    def _check_name(self, tenant: Tenant, name: str) -> None:
        """Raise ApiRefusal where a tenant may not have one more adapter, of this name."""
        if not ADAPTER_NAME.fullmatch(name):
            raise invalid("name: allowed: up to 64 letters, digits, dots, dashes and underscores")
        is_shared = f"/{name}" in self._by_key
        is_taken = is_shared and tenant.may_use(name)
        if is_taken or name == self.base_name:
            raise ApiRefusal(409, f"name: found {name}, which is a shared adapter's", "name_taken")
        if f"{tenant.name}/{name}" in self._by_key:
            return
        own = 0
        for adapter in self._by_key.values():
            own += adapter.owner == tenant.name
        if own >= tenant.uploads:
            message = f"adapters: found {own}; allowed: {tenant.uploads} of your own"
            raise ApiRefusal(403, message, "too_many")
