"""Tenants: whose a key is, and what its owner may do. Keys are known by their hashes alone.

Keys are 256 random bits, so one round of sha256 hides them: there is nothing to guess.
"""

import hashlib
import secrets
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

KEY_PREFIX = "ft-"
Hash = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
Amount = Annotated[int, Field(ge=0)]


class TenantsRefused(ValueError):
    """A tenants file that says something that is not allowed."""


class Tenant(BaseModel):
    """What one tenant may do; None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
    keys: list[Hash] = []
    adapters: list[str] = []  # names, or patterns like support-*; the base's too
    uploads: Amount = 0  # adapters of its own at once
    tokens_per_day: Amount | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    answers_at_once: Annotated[int, Field(ge=1)] = 64  # so that nobody fills the queue for all
    operator: bool = False  # may read metrics

    def may_use(self, name: str) -> bool:
        """Whether a shared adapter, or the base, is among those that it may use."""
        matches = [fnmatchcase(name, pattern) for pattern in self.adapters]
        return any(matches)


EVERYBODY = Tenant(name="local", adapters=["*"], uploads=10**6, answers_at_once=10**6, operator=True)


class Tenants:
    """Finds the tenant of a key."""

    def __init__(self, tenants: list[Tenant]) -> None:
        """Raise TenantsRefused where two have one name, or one key."""
        self.by_name: dict[str, Tenant] = {}
        self._by_hash: dict[str, Tenant] = {}
        for tenant in tenants:
            if tenant.name in self.by_name:
                raise TenantsRefused(f"found the tenant {tenant.name} twice")
            self.by_name[tenant.name] = tenant
            for key_hash in tenant.keys:
                if key_hash in self._by_hash:
                    other = self._by_hash[key_hash]
                    raise TenantsRefused(f"found one key of {other.name} and {tenant.name}")
                self._by_hash[key_hash] = tenant

    def of_key(self, key: str) -> Tenant | None:
        """The tenant of a key; None where it is nobody's."""
        return self._by_hash.get(hash_of(key))


class TenantsFile(BaseModel):
    """What a tenants file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tenants: Annotated[list[Tenant], Field(min_length=1)]


def read_tenants(path: Path) -> Tenants:
    """The tenants of a YAML file; raises TenantsRefused, with the place and what is allowed."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TenantsRefused(f"{path}: {error}") from error
    try:
        parsed = TenantsFile.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise TenantsRefused(f"{path}: {place}: {problem['msg']}") from error
    try:
        return Tenants(parsed.tenants)
    except TenantsRefused as error:
        raise TenantsRefused(f"{path}: {error}") from error


def new_key() -> str:
    """A key that nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What a tenants file says of a key."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass"))
    return f"sha256:{digest.hexdigest()}"
