"""Which objectives there are, and where each is written: names alone, so that a laptop imports no torch.

Another package adds one by an entry point of the group `fleetune.objectives`: its name, and `module:Class`.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points

GROUP = "fleetune.objectives"
OBJECTIVES: Mapping[str, str] = {
    "sft": "trainer.objectives.sft:Supervised",
}


def known() -> dict[str, str]:
    """Every objective by its name, as `module:Class`; those of Fleetune cannot be replaced from outside."""
    outside = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**outside, **OBJECTIVES}


def place(name: str) -> str | None:
    """Where an objective is written, as `module:Class`; None where there is none of this name."""
    return OBJECTIVES.get(name) or known().get(name)
