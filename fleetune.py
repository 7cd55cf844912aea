"""Fleetune in Python: the verbs of the command line, with plain data as answers.

    import fleetune

    run = fleetune.submit("job.yaml", overrides=["train.lr=3e-4"])
    print(fleetune.status(run.run_id).state)

What the user got wrong raises InputError, a cluster that cannot be reached raises Unreachable. Nothing is imported
before it is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusters.base import Unreachable
    from orchestrator.control import cancel, resume
    from orchestrator.describe import methods
    from orchestrator.doctor import Check, doctor
    from orchestrator.errors import InputError
    from orchestrator.job import Job
    from orchestrator.logs import logs
    from orchestrator.plan import Plan, plan
    from orchestrator.progress import wait
    from orchestrator.status import Status, list_runs, status
    from orchestrator.submit import Submission, dry_run, submit

_WHERE = {
    "Check": "orchestrator.doctor",
    "InputError": "orchestrator.errors",
    "Job": "orchestrator.job",
    "Plan": "orchestrator.plan",
    "Status": "orchestrator.status",
    "Submission": "orchestrator.submit",
    "Unreachable": "clusters.base",
    "cancel": "orchestrator.control",
    "doctor": "orchestrator.doctor",
    "dry_run": "orchestrator.submit",
    "list_runs": "orchestrator.status",
    "logs": "orchestrator.logs",
    "methods": "orchestrator.describe",
    "plan": "orchestrator.plan",
    "resume": "orchestrator.control",
    "status": "orchestrator.status",
    "submit": "orchestrator.submit",
    "wait": "orchestrator.progress",
}
__all__ = [  # noqa: PLE0604
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fleetune' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
