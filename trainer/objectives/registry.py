"""From the name in a job to the objective."""

from importlib import import_module

from runfolder.objectives import place
from trainer.objectives.base import Objective, Setup


def create(name: str, setup: Setup) -> Objective:
    """The objective of a job; its module is imported now."""
    module, _, kind = place(name).partition(":")
    objective: Objective = getattr(import_module(module), kind)(setup)
    return objective
