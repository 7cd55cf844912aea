"""From the name in a job to the objective."""

from importlib import import_module

from runfolder.objectives import place
from trainer.objectives.base import Objective, Setup


def create(name: str, setup: Setup) -> Objective:
    """The objective of this name; its module is imported now."""
    found = place(name)
    if found is None:
        raise ValueError(f"objective: found {name!r}; it is not installed here")
    module, _, kind = found.partition(":")
    objective: Objective = getattr(import_module(module), kind)(setup)
    return objective
