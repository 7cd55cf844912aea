"""From the options in a job to the objective."""

from importlib import import_module

from runfolder.objectives import implementation_of
from trainer.objectives.base import Objective, ObjectiveSetup


def create_objective(setup: ObjectiveSetup) -> Objective:
    """The objective of a job; its module is imported now."""
    options = setup.job.objective
    implementation = implementation_of(options.kind)
    module_name, _, class_name = implementation.partition(":")
    module = import_module(module_name)
    kind = getattr(module, class_name)
    objective: Objective = kind(setup)
    return objective
