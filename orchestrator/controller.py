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
from collections.abc import Sequence
from pathlib import Path

from clusters.controllers import REQUEUE, is_requeued
from orchestrator.delivering import STAGE_TIMEOUT_S, Pump, deliver_rest, deliver_run
from orchestrator.service import ServedAttempt, has_served
from orchestrator.stages.work import next_of_stages
from orchestrator.verdict import Again, Final, Verdict, VerdictKind, decide
from orchestrator.watch import Driver, Watch
from orchestrator.worker import redirect
from runfolder.chain import Attempt, Fenced, attempts, claim_next, close, settle
from runfolder.files import Damaged, Record
from runfolder.outcome import final_word
from runfolder.record import load_any_job
from runfolder.requests import cancel_requested, last_reopened, why_cancelled
from runfolder.secrets import read_secrets
from runfolder.service import ServiceSpec
from runfolder.snapshot import snapshot
from runfolder.staged_job import StagedJob
from runfolder.variables import flaw_of_variable
from trainer.checkpoint.lineage import claim_from_newest, finished, step_of

DELIVERED = "the output is there, but the worker ended before it was checked (and merged, if that was asked for)"
_BEGAN = time.time()  # when this process did


def main(run_dir: Path) -> int:
    """Bring a run one attempt further; gives the exit code.

    A run that is damaged is closed, rather than to keep its workers from others for ever; where not even its newest
    slot can be read, it stays as it is: raises Damaged.
    """
    try:
        take_secrets(run_dir)
        return take_further(run_dir)
    except Damaged as damage:
        close(run_dir, _end_of_damaged(run_dir, str(damage)))
        return 0


def _end_of_damaged(run_dir: Path, damage: str) -> Record:
    """The final word on a run that cannot be read, perhaps as another version of Fleetune has written it."""
    attempt = snapshot(run_dir).attempt
    if cancel_requested(run_dir):
        cancelled = Verdict("cancelled", "").dump()
        return final_word("cancelled", f"cancelled by request; {damage}", cancelled, attempt)
    user_error = Verdict("user_error", "").dump()
    return final_word("failed", damage, user_error, attempt)


def take_secrets(run_dir: Path) -> None:
    """Take those secrets of a run that are variables into the environment."""
    for name, value in read_secrets(run_dir).items():
        if flaw_of_variable(name, value) is None:
            os.environ[name] = value


def take_further(run_dir: Path) -> int:
    """Make the next attempt of a run, or close it, and deliver what there is then; gives the exit code."""
    code = advance(run_dir, threading.Event())
    if code is not None:
        return code
    return deliver_rest(run_dir)


def advance(run_dir: Path, told: threading.Event) -> int | None:
    """Make the next attempt of a run, or close it; gives the exit code, None for a run that is closed.

    `told` is set when whoever started this process wants it to end.
    """
    if settle(run_dir) is None:
        work = load_any_job(run_dir)
        if isinstance(work, StagedJob):
            return next_of_stages(run_dir, work, lambda stage_dir: advance_stage(stage_dir, told))
        decision = next_step(run_dir)
        if not isinstance(decision, Final) and cancelled_within(run_dir, decision.delay_s):
            decision = Final("cancelled", why_cancelled(run_dir))
        if not isinstance(decision, Final):
            if not os.environ.get("RAY_ADDRESS"):
                return 1  # started to close a cancelled run that was reopened meanwhile: it has no Ray to go to
            if isinstance(work, ServiceSpec):
                return serve_attempt(run_dir, work, told)
            return run_attempt(run_dir, told)
        close(run_dir, result_of(run_dir, decision))
    return None


def advance_stage(stage_dir: Path, told: threading.Event) -> int | None:
    """The same of a stage, of which MLflow gets what it takes at once: the rest comes when all stages are done."""
    code = advance(stage_dir, told)
    if code is None:
        deliver_run(stage_dir, STAGE_TIMEOUT_S)
    return code


def run_attempt(run_dir: Path, told: threading.Event) -> int | None:
    """Claim an attempt, see it through, and close the run if that was its last one."""
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    with Driver(run_dir) as driver:
        attempt = claim_from_newest(run_dir)
        if attempt is None:
            return 1
        attempt.event("claimed", controller_began=_BEGAN)
        redirect(attempt.folder / "logs" / "controller.log")
        with Pump(attempt):
            driver.begin(attempt)
            verdict = watched(attempt, driver, told)
            driver.kill()
        attempt.check()
    return concluded(attempt, verdict)


def serve_attempt(run_dir: Path, service: ServiceSpec, told: threading.Event) -> int | None:
    """Claim an attempt at a service, serve as long as it lasts, and close the run if that was its last one."""
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    attempt = claim_next(run_dir, None)
    if attempt is None:
        return 1
    attempt.event("claimed", controller_began=_BEGAN)
    redirect(attempt.folder / "logs" / "controller.log")
    verdict = ServedAttempt(attempt, service, told).until_end()
    attempt.check()
    return concluded(attempt, verdict)


def concluded(attempt: Attempt, verdict: Verdict) -> int | None:
    """Write down how an attempt ended, and close the run if that was its last one; gives what `advance` does."""
    run_dir = attempt.run_dir
    attempt.write_verdict(verdict.dump())
    decision = next_step(run_dir)
    if not isinstance(decision, Final):
        if is_requeued() and verdict.kind in ("preemption", "walltime"):
            return REQUEUE
        return 1
    is_closed = attempt.close(result_of(run_dir, decision))
    return None if is_closed else 1


def watched(attempt: Attempt, driver: Driver, told: threading.Event) -> Verdict:
    """How an attempt ended; raises Fenced when another one took over."""
    try:
        return Watch(attempt, driver, told).until_end()
    except Damaged as damage:
        return Verdict("user_error", str(damage))


def cancelled_within(run_dir: Path, delay_s: float) -> bool:
    """Wait, and say whether somebody asked for the end of the run by then."""
    deadline = time.monotonic() + delay_s
    while not cancel_requested(run_dir):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.25)
    return True


def attempt_endings(run_dir: Path) -> list[tuple[VerdictKind, int]]:
    """How each attempt since the run was last (re)opened ended, and the steps its checkpoints took it further."""
    reopened = last_reopened(run_dir)
    tried = []
    starts = []
    for attempt in attempts(run_dir):
        if attempt.number > reopened:
            tried.append(attempt)
            starts.append(_start_step(attempt))
    ends = starts[1:]  # a successor starts from the newest checkpoint
    if tried:
        newest = tried[-1]
        ends.append(_last_saved_step(newest))
    endings: list[tuple[VerdictKind, int]] = []
    for attempt, start, end in zip(tried, starts, ends, strict=True):
        kind: VerdictKind = _verdict_of(attempt)["kind"]
        steps = end - start + has_served(attempt)
        endings.append((kind, steps))
    return endings


def next_step(run_dir: Path) -> Again | Final:
    """What follows the attempts so far; a run whose last one delivered the output has not failed."""
    decision = decide(attempt_endings(run_dir), is_requeued())
    if isinstance(decision, Final) and decision.state == "failed":
        newest = attempts(run_dir)[-1]
        output = newest.folder / "output"
        if output.exists():
            return Final("succeeded", DELIVERED)
    return decision


def result_of(run_dir: Path, decision: Final) -> Record:
    """The final word on a run."""
    tried = attempts(run_dir)
    verdict = _deciding_verdict(tried, decision)
    reasons = filter(None, [decision.reason, verdict["reason"], decision.hint])
    reason = "; ".join(reasons)
    attempt = 0
    if tried:
        attempt = tried[-1].number
    return final_word(decision.state, reason, verdict, attempt)


def _deciding_verdict(tried: Sequence[Attempt], decision: Final) -> Record:
    """The verdict that a result quotes: the last attempt's, where that has to do with how the run ends."""
    cancelled = decision.state == "cancelled"
    kind: VerdictKind = "cancelled" if cancelled else "user_error"
    without_attempt = Verdict(kind, "").dump()
    if not tried:
        return without_attempt
    verdict = _verdict_of(tried[-1])
    if cancelled and verdict["kind"] not in ("cancelled", "paused"):
        return without_attempt  # cancelled between two attempts
    return verdict


def _verdict_of(attempt: Attempt) -> Record:
    """How an attempt ended; one without a verdict had its controller killed."""
    lost = Verdict("node_lost", "", f"attempts/{attempt.number} has no verdict")
    written = attempt.verdict
    if written is None:
        return lost.dump()
    return {"reason": "", "evidence": "", **written}


def _start_step(attempt: Attempt) -> int:
    """The step of the checkpoint that an attempt starts from; 0 when there is none."""
    start = attempt.start
    if start is None:
        return 0
    return start.step


def _last_saved_step(attempt: Attempt) -> int:
    """The last step of which this attempt left a checkpoint; its start when there is none."""
    start = _start_step(attempt)
    saved_steps = map(step_of, finished(attempt))
    return max(saved_steps, default=start)


if __name__ == "__main__":
    try:
        code = main(Path(sys.argv[1]))
    except (Fenced, Damaged) as error:
        code = 1
        print(error, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for a thread that waits for MLflow
