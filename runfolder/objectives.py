"""Which objectives there are, and where each is written: names alone, so that a laptop imports no torch.

Another package adds one by an entry point of the group `fleetune.objectives`: its name, and `module:Class`.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points

OBJECTIVES_GROUP = "fleetune.objectives"
OBJECTIVES: Mapping[str, str] = {
    "sft": "trainer.objectives.sft:Supervised",
}


def known() -> dict[str, str]:
    """Every objective by its name, as `module:Class`; those of Fleetune cannot be replaced from outside."""
    outside = {}
    for point in entry_points(group=OBJECTIVES_GROUP):
        outside[point.name] = point.value
    return {**outside, **OBJECTIVES}


def is_known(name: str) -> bool:
    """Whether there is an objective of this name; what other packages have is read only where it must be."""
    if name in OBJECTIVES:
        return True
    return name in known()


def implementation_of(name: str) -> str:
    """Where an objective that is known is written, as `module:Class`."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    return known()[name]
