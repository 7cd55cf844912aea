"""Delivery to MLflow by the controller: while an attempt runs, and once its run is closed."""

import threading
from pathlib import Path

from clusters.controllers import is_collected
from runfolder.chain import Attempt, attempts
from runfolder.delivered import note_delivered
from runfolder.record import load_any_job
from runfolder.secrets import remove_secrets
from runfolder.snapshot import snapshot
from runfolder.staged_job import StagedJob
from runfolder.stages import stage_folders

TRACKING_TIMEOUT_S = 600.0  # how long it stays to deliver what an outage of MLflow held up
STAGE_TIMEOUT_S = 10.0  # the same of a stage, behind which others wait
_PUMP_S = 1.0


def deliver_rest(run_dir: Path) -> int:
    """Stay until MLflow has all of a closed run, but not for ever: any later command can do it too."""
    work = load_any_job(run_dir)
    if isinstance(work, StagedJob):
        for stage_dir in stage_folders(run_dir, work.stages).values():
            deliver_rest(stage_dir)
    deliver_run(run_dir, TRACKING_TIMEOUT_S)
    if is_collected():
        remove_secrets(run_dir)
    return 0


def deliver_run(run_dir: Path, timeout_s: float) -> None:
    """Have MLflow take all of a closed run, of which one without an attempt has nothing; raises Damaged."""
    from orchestrator.tracking.delivery import replay
    from orchestrator.tracking.store import is_left_to_others

    is_begun = bool(attempts(run_dir)) or snapshot(run_dir).attempt > 0  # a job of stages has those of its stages
    if not is_begun or is_left_to_others(run_dir):
        note_delivered(run_dir, None)
    else:
        replay(run_dir, timeout_s)


class Pump(threading.Thread):
    """Delivers to MLflow while an attempt runs, in a thread: an outage holds nobody up."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(daemon=True)
        self._attempt = attempt
        self._ended = threading.Event()

    def __enter__(self) -> "Pump":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(timeout=5)

    def run(self) -> None:
        """Deliver what is new, about once a second."""
        from orchestrator.tracking.delivery import Delivery

        delivery = Delivery(self._attempt.run_dir, self._attempt.number)
        while not self._ended.wait(_PUMP_S):
            delivery.pump()
