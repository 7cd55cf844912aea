"""What `fleetune serve` was asked for, checked before a model is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import InputError
from runfolder.files import Damaged
from runfolder.folders import home

if TYPE_CHECKING:
    from serving.gateway.tenants import Tenants
    from serving.gateway.usage import UsageFolder

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Serving:
    """What is served to whom, as the command line says it."""

    base: str
    adapters: tuple[str, ...]  # NAME=FOLDER_OR_RUN
    tenants_file: Path | None
    host: str
    port: int
    replicas: int | None  # None is one for each GPU
    folder: Path | None = None  # where what tenants used is kept; None is below FLEETUNE_HOME


def serve(serving: Serving) -> None:
    """Serve until a signal says to end; raises InputError."""
    tenants = _tenants(serving)
    folders = adapter_folders(serving.adapters)
    from serving.error import AdapterRefused, BaseRefused

    try:
        from serving.gateway import server
    except ModuleNotFoundError as error:
        raise InputError(f"found no {error.name}; it comes with: pip install 'fleetune[serve]'") from error
    try:
        replicas = serving.replicas or server.usual_replicas()
        usage = _usage(serving)
        service = server.make_service(serving.base, folders, tenants, replicas=replicas, usage=usage)
    except (AdapterRefused, BaseRefused) as error:
        raise InputError(str(error)) from error
    server.run_server(service, serving.host, serving.port)


def adapter_folders(texts: Iterable[str]) -> dict[str, Path]:
    """The folders by name in texts NAME=FOLDER_OR_RUN; raises InputError."""
    places = named_places(texts)
    from orchestrator.evaluation.adapters import resolve_adapters

    folders = {}
    for name, place in places.items():
        (source,) = resolve_adapters([place])
        folders[name] = source.folder
    return folders


def named_places(texts: Iterable[str]) -> dict[str, str]:
    """The folders or runs by name in texts NAME=FOLDER_OR_RUN; raises InputError."""
    places: dict[str, str] = {}
    for text in texts:
        name, sign, place = text.partition("=")
        if not sign or not name or not place:
            raise InputError(f"--adapters: found {text!r}; allowed: NAME=FOLDER, or NAME=RUN")
        if name in places:
            raise InputError(f"--adapters: found the name {name} twice")
        places[name] = place
    return places


def _tenants(serving: Serving) -> "Tenants | None":
    """The tenants of the file, if there is one; raises InputError where others would be let in without."""
    if serving.tenants_file is None:
        if serving.host not in LOOPBACK_HOSTS:
            allowed = ", ".join(LOOPBACK_HOSTS)
            raise InputError(f"--host: found {serving.host} without --tenants; allowed: {allowed}")
        return None
    return read_keys(serving.tenants_file)


def read_keys(tenants_file: Path) -> "Tenants":
    """The tenants of a file; raises InputError."""
    from serving.gateway.tenants import TenantsRefused, read_tenants

    try:
        return read_tenants(tenants_file)
    except TenantsRefused as error:
        raise InputError(str(error)) from error


def _usage(serving: Serving) -> "UsageFolder | None":
    """Where what tenants used is kept, if anybody has a key; raises InputError where that cannot be."""
    if serving.tenants_file is None:
        return None
    from serving.gateway.quota import day_now
    from serving.gateway.usage import UsageFolder

    folder = serving.folder or home() / "services" / Path(serving.base).name
    try:
        usage = UsageFolder(folder)
        usage.clear(day_now())
    except (OSError, Damaged) as error:
        raise InputError(f"--folder: {error}; allowed: a folder that can be written") from error
    return usage
