"""Delivery of a run's rows to its one MLflow run: nothing twice, nothing lost, nothing different.

What is sent is a function of the run folder alone (see history.py): a row goes out once, with the time at
which it was written, so whoever sends it again (after a lost answer, or woken in the middle of a request) sends the
same row, which MLflow ignores. Rows are read, then made durable, then the fence is checked, then they are sent: what
an attempt sends was in its file before it had a successor: it lies within its seal, and nobody reports it otherwise.
Each batch ends with a cursor as a tag of the MLflow run; the next attempt goes on from there, and an old cursor that
comes late only costs a repetition.
"""

import json
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.runs import run_ids, runs_folder
from orchestrator.tracking.environment import Sampler
from orchestrator.tracking.history import Row, Spool
from orchestrator.tracking.store import address, client, describe, open_run, upload
from orchestrator.tracking.trouble import Trouble, diagnose, held_up, note
from runfolder.appended import read_from
from runfolder.chain import Attempt, Fenced, attempts, last, last_slot, result
from runfolder.delivered import is_delivered, note_delivered
from runfolder.files import Damaged
from runfolder.record import load_job
from runfolder.snapshot import snapshot

STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
FILES = ("metrics.jsonl", "system.jsonl")
CURSOR = "fleetune.delivered"
COMPARED = ("loss", "lr", "grad_norm", "eval_loss", "eval_exact_match")
SAMPLE_S = 10.0
_BATCH = 900  # MLflow takes at most 1000 metrics, params and tags at once
_LONGEST_WAIT_S = 30.0


class Delivery:
    """Brings what an attempt, and those before it, wrote to MLflow. For one thread at a time."""

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self._run_dir = run_dir
        self._attempt = Attempt(run_dir, attempt)
        self._fence: Callable[[], None] = self._attempt.check
        self._compared: dict[str, int] = {}
        self._sampler: Sampler | None = None
        self._sampled = -math.inf
        self._wait_s, self._next_try = 0.0, -math.inf
        self._trouble: Trouble | None = None
        self._begin()

    def _begin(self) -> None:
        """Know nothing of MLflow yet, and have all rows before us."""
        self._spools = {file: Spool(partial(read_from, self._run_dir, file), self._attempt.number) for file in FILES}
        self._pending: deque[tuple[str, Row]] = deque()
        self._cursor: dict[str, int] = {}
        self._client: Any = None
        self._mlflow_run_id: str | None = None

    def pump(self) -> None:
        """Deliver what is new; in trouble return and try again at a later call, and when fenced do nothing."""
        if not self._attempt.is_live():
            return
        self._sample()
        self._read()
        if time.monotonic() >= self._next_try:
            self._tried(self._deliver)

    def finish(self, state: str, timeout_s: float) -> bool:
        """Deliver the rest, upload the artifacts and set the terminal status, after the run was closed.

        A closed run gets the status of its result, whatever `state` says. Returns False when MLflow did not take it
        in time (then `replay` does it later), or when the run goes on without this attempt.
        """
        deadline = time.monotonic() + timeout_s
        self._fence, self._wait_s = self._check_ended, 0.0
        self._read()
        while not self._tried(lambda: self._complete(state)):
            if time.monotonic() + self._wait_s >= deadline or not self._may_end():
                return False
            time.sleep(self._wait_s)
        return True

    def _complete(self, state: str) -> None:
        self._deliver()
        ended = result(self._run_dir)
        state = ended["state"] if ended else state
        describe(self._client, self._run_dir, str(self._mlflow_run_id), here=False)  # the plan is known by now
        self._fence()
        slot = last_slot(self._run_dir)
        end = Attempt(self._run_dir, slot).claim["time"] if ended else time.time()
        self._client.set_terminated(self._mlflow_run_id, STATUS[state], int(end * 1000))
        upload(self._client, self._run_dir, str(self._mlflow_run_id), state == "succeeded")
        if ended:
            note_delivered(self._run_dir, self._mlflow_run_id)

    def _deliver(self) -> None:
        self._open()
        for file, number in {(file, row.attempt) for file, row in self._pending}:
            # A row that a crash of the machine takes back must not have been reported.
            Attempt(self._run_dir, number).sync(file)
        while self._pending:
            self._send(self._batch())

    def _open(self) -> None:
        if self._mlflow_run_id:
            return
        self._client = client(self.uri)
        run = open_run(self._client, self._run_dir, self.uri, self._fence)
        self._fence()
        describe(self._client, self._run_dir, run.info.run_id, here=self._ran_here())
        if self._attempt.is_live() and run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._cursor = json.loads(run.data.tags.get(CURSOR, "{}"))
        self._pending = deque(item for item in self._pending if item[1].index >= self._cursor.get(item[0], 0))
        self._mlflow_run_id = run.info.run_id

    @property
    def uri(self) -> str:
        """The MLflow that gets the run, with its password."""
        return address(self._run_dir)

    def _ran_here(self) -> bool:
        claim = self._attempt.folder / "claim.json"
        return claim.exists() and self._attempt.claim["host"] == socket.gethostname()

    def _batch(self) -> list[tuple[str, Row]]:
        """The oldest rows that wait, with at most 900 metrics."""
        size = 0
        batch: list[tuple[str, Row]] = []
        for item in self._pending:
            size += len(item[1].fresh)
            if size > _BATCH and batch:
                break
            batch.append(item)
        return batch

    def _send(self, batch: list[tuple[str, Row]]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(key, value, int(row.time * 1000), row.step) for _, row in batch for key, value in row.fresh.items()
        ]
        cursor = {**self._cursor, **{file: row.index + 1 for file, row in batch}}
        self._fence()
        self._client.log_batch(self._mlflow_run_id, metrics=metrics, tags=[RunTag(CURSOR, json.dumps(cursor))])
        self._cursor = cursor
        for _ in batch:
            self._pending.popleft()

    def _read(self) -> None:
        for file, spool in self._spools.items():
            for row in spool.read():
                self._pending.append((file, row))
                if row.again and row.attempt == self._attempt.number and row.index >= self._compared.get(file, 0):
                    self._compare(row)
            self._compared[file] = max(self._compared.get(file, 0), spool.count)

    def _compare(self, row: Row) -> None:
        """Say in the log where a step that was done again came out otherwise; the first value stays."""
        tolerance = self._tolerance()
        for key in COMPARED:
            first, now = row.again.get(key, (0.0, 0.0))
            if differ(first, now, tolerance):
                self._event("redone_step_differs", step=row.step, key=key, reported=first, found=now)

    def _tolerance(self) -> float:
        job = load_job(self._run_dir)
        half = job.train.precision == "bf16" or (job.train.precision == "auto" and job.resources.gpus_per_node)
        return 5e-3 if half else 1e-6

    def _sample(self) -> None:
        if time.monotonic() - self._sampled < SAMPLE_S:
            return
        self._sampled = time.monotonic()
        self._sampler = self._sampler or Sampler()
        now = time.time()
        step = int(now - attempts(self._run_dir)[0].claim["time"])
        self._attempt.append("system.jsonl", {"step": step, "time": now, **self._sampler.sample()})

    def _tried(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Fenced:
            return False
        except Exception as error:
            self._hold_up(diagnose(error, self.uri))
            return False
        if self._trouble:
            self._event("tracking_restored")
        note(self._run_dir, None)
        self._wait_s, self._trouble = 0.0, None
        return True

    def _hold_up(self, trouble: Trouble) -> None:
        """Say what the trouble is, and choose when to try again."""
        before, self._trouble = self._trouble, trouble
        another = before is None or before.lasting != trouble.lasting
        if another:
            self._event("tracking_refused" if trouble.lasting else "tracking_outage", error=trouble.reason)
        if self._may_end() and trouble != before:
            note(self._run_dir, trouble)
        if trouble.lasting and not (another and self._mlflow_run_id):
            self._wait_s = _LONGEST_WAIT_S
        else:
            self._wait_s = min(_LONGEST_WAIT_S, self._wait_s * 2 or 0.5)
        if trouble.lasting:
            self._begin()  # what was open may be gone: opening it anew tells
            self._read()
        self._next_try = time.monotonic() + self._wait_s

    def _event(self, kind: str, **fields: Any) -> None:
        if self._attempt.is_live():
            self._attempt.event(kind, **fields)

    def _may_end(self) -> bool:
        """Whether this attempt leads the run, or is the last one of a run that is closed."""
        ended = result(self._run_dir) is not None and last(self._run_dir).number == self._attempt.number
        return ended or self._attempt.is_live()

    def _check_ended(self) -> None:
        if not self._may_end():
            raise Fenced(f"{self._run_dir.name} goes on without attempt {self._attempt.number}")


def replay(run_dir: Path, timeout_s: float = 60.0) -> bool:
    """Deliver what is missing of a closed run, from anywhere, any number of times; True when nothing is missing."""
    ended = result(run_dir)
    if ended is None:
        return False
    return is_delivered(run_dir) or Delivery(run_dir, last(run_dir).number).finish(ended["state"], timeout_s)


def deliver_late(timeout_s: float = 10.0) -> None:
    """Deliver what was held up of the closed runs of this home, newest first; a store that is down is tried once."""
    down: set[str] = set()
    for run_dir in undelivered():
        delivery = Delivery(run_dir, last(run_dir).number)
        if delivery.uri in down:
            continue
        if not delivery.finish(str((result(run_dir) or {})["state"]), timeout_s):
            trouble = held_up(run_dir)
            if trouble is None or not trouble.lasting:
                down.add(delivery.uri)


def undelivered() -> Iterator[Path]:
    """The closed runs of this home of which MLflow has not got all, newest first."""
    for run_id in reversed(run_ids()):
        run_dir = runs_folder() / run_id
        run = snapshot(run_dir)
        if run.result and run.attempt and not is_delivered(run_dir) and _has_job(run_dir):
            yield run_dir


def _has_job(run_dir: Path) -> bool:
    """Whether a run can be delivered: not one that is damaged, as `status` and `resume` say."""
    try:
        load_job(run_dir)
    except Damaged:
        return False
    return True


def all_held_up() -> dict[str, Trouble]:
    """What keeps the rows of runs of this home from MLflow, by run id."""
    found = {run_id: held_up(runs_folder() / run_id) for run_id in run_ids()}
    return {run_id: trouble for run_id, trouble in found.items() if trouble}


def differ(first: float, now: float, tolerance: float) -> bool:
    """Whether two values of one step differ by more than a relative tolerance; not-a-number equals itself."""
    if math.isnan(first) or math.isnan(now):
        return math.isnan(first) != math.isnan(now)
    return not math.isclose(first, now, rel_tol=tolerance)
