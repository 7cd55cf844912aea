"""What the clusters file says of a cluster of any kind. Unknown keys are errors, as in a job."""

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, field_validator

from runfolder.resources import Section
from runfolder.variables import Variables, is_secret

_DESTINATION = re.compile(r"[A-Za-z0-9_][\w.@:%+\[\]-]*")
_WITH_PORT = re.compile(r"^[^:]*:\d+$")  # an address of IPv6 has more colons
_ASSIGNMENT = re.compile(r"\b(\w++)=[\"']?([^\s\"'$`;&|]+)")  # of a text, not of what a command prints
_PLACE = re.compile(r"[^-\x00-\x1f\x7f][^\x00-\x1f\x7f]{0,4095}")
MOST_GIB = 10**6  # of the memory of a GPU that somebody says


def _refuse_secrets(variables: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError for a variable that is a secret."""
    for name, value in variables:
        if is_secret(name, value):
            raise ValueError(f"{name} is a secret, and would stand in every script; export it where you submit")


class SshLink(Section):
    """An OpenSSH destination, like `me@login.example.org` or a host of ~/.ssh/config."""

    ssh: str = Field(min_length=1, max_length=255, description="user@host, or a host alias of ~/.ssh/config")

    @field_validator("ssh")
    @classmethod
    def _is_destination(cls, destination: str) -> str:
        if not _DESTINATION.fullmatch(destination):
            raise ValueError("must be user@host or a host alias: letters, digits and . _ - @ : only")
        if _WITH_PORT.search(destination):
            raise ValueError("must be without a port; say `Port` of the host in ~/.ssh/config")
        return destination


class ClusterConfig(Section):
    """What clusters of all kinds have; a backend adds its own fields, and its `kind`."""

    kind: str
    link: Literal["local"] | SshLink = Field("local", description="local, or {ssh: user@host} for another machine")
    root: str | None = Field(
        None, description="the FLEETUNE_HOME there, for runs and code; null: ~/.fleetune of that user"
    )
    python: str | None = Field(
        None, description="a Python there that has Fleetune's packages; null: Fleetune makes an environment for them"
    )
    setup: tuple[str, ...] = Field((), description="shell lines before Python starts, like `module load python/3.12`")
    gpu_gib: float | None = Field(
        None,
        gt=0,
        le=MOST_GIB,
        description="memory of a GPU there, for plans; null: as the cluster says, where it does",
    )
    env: Variables = Field({}, description="variables for every run there; those of the job come before them")

    @property
    def trains_with_python(self) -> bool:
        """Whether `python`, or the environment in its place, trains, and so needs the packages of runs."""
        return True

    @field_validator("root", "python")
    @classmethod
    def _is_place(cls, place: str | None) -> str | None:
        if place is not None and not _PLACE.fullmatch(place):
            raise ValueError("must be one line of at most 4096 characters that does not begin with -")
        if place is not None and "$" in place:  # no shell ever sees it as more than a value
            raise ValueError("must be written out, without $; ~/ is the home there")
        return place

    @field_validator("root")
    @classmethod
    def _is_absolute(cls, root: str | None) -> str | None:
        if root is not None and not root.startswith(("/", "~/")):
            raise ValueError("must be an absolute path, or one that begins with ~/, the home there")
        return root

    @field_validator("setup", mode="before")
    @classmethod
    def _as_lines(cls, lines: object) -> object:
        """A text stands for its lines."""
        if isinstance(lines, str):
            return tuple(lines.splitlines())
        return lines

    @field_validator("setup")
    @classmethod
    def _are_lines(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        if any("\0" in line for line in lines):
            raise ValueError("must be shell lines without NUL")
        _refuse_secrets(_ASSIGNMENT.findall("\n".join(lines)))
        return lines

    @field_validator("env")
    @classmethod
    def _are_public(cls, env: dict[str, str]) -> dict[str, str]:
        _refuse_secrets(env.items())
        return env
