"""From the name in a job to the objective."""

from importlib import import_module

from runfolder.objectives import place
from trainer.objectives.base import Objective, Setup


def create(name: str, setup: Setup) -> Objective:
    """The objective of a job; its module is imported now."""
    module_name, _, class_name = place(name).partition(":")
    module = import_module(module_name)
    kind = getattr(module, class_name)
    objective: Objective = kind(setup)
    return objective
