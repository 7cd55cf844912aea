"""The controller of a run: `python -m orchestrator.controller RUN_DIR`. It takes the run one attempt further.

It claims the attempt, has a driver process start the workers with Ray, watches, delivers to MLflow, says how the
attempt ended, and closes the run or leaves it to the next attempt. Exit code 0: the run has its result, 1: start the
controller again here, 75: elsewhere, by the scheduler that ended it (where FLEETUNE_REQUEUED says that it does so).
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from clusters.environment import SECRETS
from orchestrator.verdict import Again, Final, Kind, Verdict, decide
from orchestrator.watch import Driver, Watch
from orchestrator.worker import redirect
from runfolder.chain import Attempt, Fenced, attempts, close, settle
from runfolder.files import Damaged, Record
from runfolder.record import load_job
from runfolder.requests import cancel_requested, last_reopened
from runfolder.secrets import read_secrets
from trainer.checkpoint.lineage import claim_from_newest, finished, step_of

TRACKING_PATIENCE_S = 600.0  # how long it stays to deliver what an outage of MLflow held up
DELIVERED = "the output is there, but the worker ended before it was checked (and merged, if that was asked for)"
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h
_PUMP_S = 1.0
_CANCELLED = Final("cancelled", "cancelled by request")


def main(run_dir: Path) -> int:
    """Bring a run one attempt further; gives the exit code."""
    if settle(run_dir) is None:
        decision = unreadable(run_dir) or next_step(run_dir)
        if not isinstance(decision, Final) and cancelled_within(run_dir, decision.delay_s):
            decision = _CANCELLED
        if not isinstance(decision, Final):
            # Started to close a cancelled run that was reopened meanwhile, it has no Ray to go to.
            return attend(run_dir) if os.environ.get("RAY_ADDRESS") else 1
        close(run_dir, result_of(run_dir, decision))
    return deliver_rest(run_dir)


def unreadable(run_dir: Path) -> Final | None:
    """The end of a run whose job cannot be read: it would only keep its place from others."""
    try:
        load_job(run_dir)
    except Damaged as error:
        return Final("failed", str(error))
    return None


def attend(run_dir: Path) -> int:
    """Claim an attempt, see it through, and close the run if that was its last one."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with Driver(run_dir) as driver:
        attempt = claim_from_newest(run_dir)
        if attempt is None:
            return 1
        redirect(attempt.folder / "logs" / "controller.log")
        with Pump(attempt):
            driver.begin(attempt)
            verdict = Watch(attempt, driver, stop).until_end()
            driver.kill()
        attempt.check()
    attempt.write_verdict(verdict.dump())
    decision = next_step(run_dir)
    if not isinstance(decision, Final):
        return REQUEUE if requeued() and verdict.kind in ("preemption", "walltime") else 1
    if not attempt.close(result_of(run_dir, decision)):
        return 1
    return deliver_rest(run_dir)


def cancelled_within(run_dir: Path, delay_s: float) -> bool:
    """Wait, and say whether somebody asked for the end of the run by then."""
    deadline = time.monotonic() + delay_s
    while not cancel_requested(run_dir):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.25)
    return True


def history(run_dir: Path) -> list[tuple[Kind, int]]:
    """How each attempt since the run was last (re)opened ended, and the steps its checkpoints took it further."""
    reopened = last_reopened(run_dir)
    tried = [attempt for attempt in attempts(run_dir) if attempt.number > reopened]
    starts = [attempt.start.step if attempt.start else 0 for attempt in tried]
    reached = [*starts[1:], *(_saved(attempt) for attempt in tried[-1:])]
    return [(_verdict(attempt)["kind"], b - a) for attempt, a, b in zip(tried, starts, reached, strict=True)]


def next_step(run_dir: Path) -> Again | Final:
    """What follows the attempts so far; a run whose last one delivered the output has not failed."""
    decision = decide(history(run_dir), requeued())
    failed = isinstance(decision, Final) and decision.state == "failed"
    if failed and (attempts(run_dir)[-1].folder / "output").exists():
        return Final("succeeded", DELIVERED)
    return decision


def requeued() -> bool:
    """Whether a scheduler starts the run again that it has ended."""
    return bool(os.environ.get("FLEETUNE_REQUEUED"))


def result_of(run_dir: Path, decision: Final) -> Record:
    """The final word on a run."""
    tried = attempts(run_dir)
    own = Verdict("cancelled" if decision.state == "cancelled" else "user_error", "").dump()
    found = _verdict(tried[-1]) if tried else own
    ended_so = decision.state != "cancelled" or found["kind"] in ("cancelled", "paused")
    verdict = found if ended_so else own  # cancelled between two attempts, it has nothing to do with the last one
    return {
        "state": decision.state,
        "reason": "; ".join(filter(None, [decision.reason, verdict["reason"], decision.mend])) or None,
        "verdict": verdict["kind"],
        "evidence": verdict["evidence"],
        "attempt": tried[-1].number if tried else 0,
        "output_dir": "output" if decision.state == "succeeded" else None,
        "time": time.time(),
    }


def deliver_rest(run_dir: Path) -> int:
    """Stay until MLflow has all of a closed run, but not for ever: any later command can do it too."""
    from orchestrator.tracking.delivery import replay

    if attempts(run_dir) and unreadable(run_dir) is None:
        replay(run_dir, TRACKING_PATIENCE_S)
    return 0


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


def _verdict(attempt: Attempt) -> Record:
    """How an attempt ended; one without a verdict had its controller killed."""
    lost = Verdict("node_lost", "", f"attempts/{attempt.number} has no verdict")
    return attempt.verdict or lost.dump()


def _saved(attempt: Attempt) -> int:
    """The last step of which this attempt left a checkpoint; its start when there is none."""
    start = attempt.start.step if attempt.start else 0
    return max(map(step_of, finished(attempt)), default=start)


if __name__ == "__main__":
    try:
        secrets = read_secrets(Path(sys.argv[1]))
        os.environ.update({name: secrets[name] for name in SECRETS if name in secrets})
        code = main(Path(sys.argv[1]))
    except Fenced as fenced:
        code = 1
        print(fenced, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for a thread that waits for MLflow
