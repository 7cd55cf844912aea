"""The lock: which packages, and which versions of them, the environment of a cluster has."""

import hashlib
import re
from collections.abc import Container
from dataclasses import dataclass
from functools import cache
from importlib.metadata import requires
from pathlib import Path

_MARKERS = (
    "",
    'extra == "data"',
    'extra == "train"',
    'extra == "serve"',
)  # of what a run needs; the first: everybody
_LOCK_DIGITS = 16  # of the digest in the name of a folder


@dataclass(frozen=True)
class Lock:
    """What pip is asked for, and the versions that it may take: as texts of pip's files."""

    requirements: str
    constraints: str

    @property
    def digest(self) -> str:
        """What tells one lock from another."""
        texts = f"{self.requirements}\0{self.constraints}"
        hexadecimal = hashlib.sha256(texts.encode()).hexdigest()
        return hexadecimal[:_LOCK_DIGITS]

    @property
    def ray_version(self) -> str:
        """The version of Ray that runs have."""
        pinned = re.search(r"^ray==(\S+)", self.constraints, re.MULTILINE)
        assert pinned
        return pinned[1]


@cache
def installed_lock() -> Lock:
    """The lock of the Fleetune that is installed here, with what runs need."""
    return _lock_of(_MARKERS)


@cache
def plain_lock() -> Lock:
    """The lock of the Fleetune that is installed here, without what runs need: they have it elsewhere."""
    return _lock_of(_MARKERS[:1])


def _lock_of(markers: Container[str]) -> Lock:
    """The lock of the requirements that have one of these markers."""
    requirements = []
    for line in requires("fleetune") or ():
        requirement, _, marker = line.partition(";")
        if marker.strip() in markers and not requirement.startswith("fleetune["):
            requirements.append(f"{requirement}\n")
    constraints = Path(__file__).with_name("constraints.txt")
    once = dict.fromkeys(requirements)  # several extras may have the same
    return Lock("".join(once), constraints.read_text())
