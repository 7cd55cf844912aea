"""Fleetune in Python: the verbs of the command line, with plain data as answers.

    import fleetune

    run = fleetune.submit("job.yaml", overrides=["train.lr=3e-4"])
    print(fleetune.wait(run.run_id).state)

What the user got wrong raises InputError, a cluster that cannot be reached Unreachable. Nothing is imported before it
is needed. Modules of yours that are called like Fleetune's folders (`trainer`, say) are not taken for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fleetune_start import first

if TYPE_CHECKING:
    from clusters.base import Unreachable as Unreachable
    from clusters.checks import Check as Check
    from orchestrator.comparison.compare import Comparison as Comparison
    from orchestrator.comparison.compare import compare as compare
    from orchestrator.control import cancel as cancel
    from orchestrator.control import fetch as fetch
    from orchestrator.control import pause as pause
    from orchestrator.control import resume as resume
    from orchestrator.describe import methods as methods
    from orchestrator.doctor import doctor as doctor
    from orchestrator.errors import InputError as InputError
    from orchestrator.evaluation.evaluate import evaluate as evaluate
    from orchestrator.evaluation.report import EvaluationReport as EvaluationReport
    from orchestrator.logs import logs as logs
    from orchestrator.planning.plan import Plan as Plan
    from orchestrator.planning.plan import plan as plan
    from orchestrator.progress import wait as wait
    from orchestrator.rows import RowsView as RowsView
    from orchestrator.rows import rows as rows
    from orchestrator.status import Status as Status
    from orchestrator.status import list_runs as list_runs
    from orchestrator.status import status as status
    from orchestrator.submit import Submission as Submission
    from orchestrator.submit import dry_run as dry_run
    from orchestrator.submit import submit as submit
    from runfolder.job import Job as Job

_MODULES = {
    "clusters.base": ("Unreachable",),
    "clusters.checks": ("Check",),
    "orchestrator.comparison.compare": ("Comparison", "compare"),
    "orchestrator.control": ("cancel", "fetch", "pause", "resume"),
    "orchestrator.describe": ("methods",),
    "orchestrator.doctor": ("doctor",),
    "orchestrator.errors": ("InputError",),
    "orchestrator.evaluation.evaluate": ("evaluate",),
    "orchestrator.evaluation.report": ("EvaluationReport",),
    "runfolder.job": ("Job",),
    "orchestrator.logs": ("logs",),
    "orchestrator.planning.plan": ("Plan", "plan"),
    "orchestrator.progress": ("wait",),
    "orchestrator.rows": ("RowsView", "rows"),
    "orchestrator.status": ("Status", "list_runs", "status"),
    "orchestrator.submit": ("Submission", "dry_run", "submit"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_WHERE)

first()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fleetune' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
