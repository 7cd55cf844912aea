"""Which linear layers of the base an adapter's folder changes."""

from collections.abc import Iterator
from dataclasses import dataclass

from serving.adapter import Place
from serving.base import Base, Site
from serving.folder import Folder

PREFIX = "base_model.model."  # of the names in PEFT's files


@dataclass(frozen=True)
class Target:
    """A linear layer of the base that an adapter changes."""

    place: Place
    module: str  # its name in the base
    site: Site

    @property
    def out(self) -> int:
        """Number of its outputs."""
        return self.site.stop - self.site.start


def targets(folder: Folder, base: Base, suffix: str) -> Iterator[Target]:
    """The linear layers that have a tensor whose name ends so, and those that the config lists."""
    named = folder.config.get("target_modules")
    wanted = tuple(named) if isinstance(named, list) else ()
    names = set(folder.names)
    for layer, site in base.linears():
        module = f"model.layers.{layer}.{site.module}.{site.name}"
        if f"{PREFIX}{module}.{suffix}" in names or listed(module, wanted):
            yield Target((layer, site.name), module, site)


def listed(module: str, wanted: tuple[str, ...]) -> bool:
    """Whether a module has one of these names, whole or behind a dot."""
    return any(module == name or module.endswith(f".{name}") for name in wanted)
