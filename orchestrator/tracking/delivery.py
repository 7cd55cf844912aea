"""Delivery of a run's rows to its one MLflow run: nothing twice, nothing lost, nothing different.

What is sent is a function of the run folder alone (see history.py): a row goes out once, with the time at which it
was written, so whoever sends it again (after a lost answer, or woken in a request) sends the same row, which MLflow
ignores. Rows are read, then made durable, then the fence is checked, then they are sent. So every row that an attempt
sends was in its file before it had a successor: it lies below the seal that the successor writes, and whoever reads
the file later gets the same row. Each batch ends with a cursor as a tag of the MLflow run; the next attempt goes on
from there, and an old cursor that comes late only costs a repetition.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.runs import run_ids, runs_folder
from orchestrator.tracking.artifacts import upload
from orchestrator.tracking.environment import Utilisation, machine_tags
from orchestrator.tracking.facts import MACHINE, STATUSES
from orchestrator.tracking.history import AppendedRow, RowReader
from orchestrator.tracking.outbox import FileRow, Outbox
from orchestrator.tracking.redone import COMPARED, differ, relative_tolerance
from orchestrator.tracking.store import address, client, describe_run, is_left_to_others, open_run, sqlite_file
from orchestrator.tracking.trouble import Trouble, diagnose, note_trouble, trouble_of_run
from runfolder.appended import read_from
from runfolder.chain import Attempt, Fenced, last_attempt, last_slot, result
from runfolder.delivered import is_delivered, note_delivered
from runfolder.files import Damaged
from runfolder.record import load_any_job
from runfolder.snapshot import snapshot

DELIVERED_FILES = ("metrics.jsonl", "system.jsonl")
CURSOR = "fleetune.delivered"
_LONGEST_WAIT_S = 30.0


class Delivery:
    """Brings what an attempt, and those before it, wrote to MLflow. For one thread at a time."""

    def __init__(self, run_dir: Path, attempt: int, leads: bool = True) -> None:
        """`leads`: this process takes the attempt further; one that does not writes nothing into its folder."""
        self._run_dir = run_dir
        self._leads = leads
        self._attempt = Attempt(run_dir, attempt)
        self._fence: Callable[[], None] = self._attempt.check
        self._compared: dict[str, int] = {}  # by file, how many of its rows were looked at by `_compare`
        self._utilisation = Utilisation(self._attempt)
        self._is_described = False  # in an event, what machine this is
        self._wait_s = 0.0
        self._next_try = -math.inf
        self._trouble: Trouble | None = None
        self._uri = ""  # that MLflow was asked by
        self._start_over()

    def _start_over(self) -> None:
        """Know nothing of MLflow yet, and have all rows before us."""
        self._readers: dict[str, RowReader] = {}
        for file in DELIVERED_FILES:
            source = partial(read_from, self._run_dir, file)
            self._readers[file] = RowReader(file, source, self._attempt.number)
        self._outbox = Outbox()
        self._damage: Damaged | None = None  # why no more rows can be read
        self._client: Any = None
        self._mlflow_run_id: str | None = None

    def pump(self) -> None:
        """Deliver what is new; in trouble return and try again at a later call, and when fenced do nothing."""
        if not self._attempt.is_live():
            return
        self._utilisation.sample()
        self._read()
        if is_left_to_others(self._run_dir):
            self._leave()
        elif time.monotonic() >= self._next_try:
            self._succeeds(self._deliver)

    def _leave(self) -> None:
        """Leave the rows to whoever compares, with what only this machine can say of itself."""
        self._outbox = Outbox()
        if not self._is_described:
            self._event(MACHINE, tags=machine_tags())
            self._is_described = True

    def catch_up(self, timeout_s: float) -> bool:
        """Deliver what there is of a run that another process leads, its end too; whether MLflow took it."""
        ended = result(self._run_dir)
        if ended:
            return self.finish(ended["state"], timeout_s)
        self._read()
        return self._succeeds(self._deliver)

    def finish(self, state: str, timeout_s: float) -> bool:
        """Deliver the rest, upload the artifacts and set the terminal status, after the run was closed.

        A closed run gets the status of its result, whatever `state` says. Returns False when MLflow did not take it
        in time (then `replay` does it later), or when the run goes on without this attempt.
        """
        deadline = time.monotonic() + timeout_s
        self._fence = self._check_may_end
        self._wait_s = 0.0
        self._read()
        while not self._succeeds(lambda: self._complete(state)):
            if time.monotonic() + self._wait_s >= deadline or not self._may_end():
                return False
            time.sleep(self._wait_s)
        return True

    def _complete(self, state: str) -> None:
        self._deliver()
        mlflow_run_id = str(self._mlflow_run_id)
        ended = result(self._run_dir)
        if ended:
            state = ended["state"]
        describe_run(self._client, self._run_dir, mlflow_run_id, here=False)  # the plan is known by now
        self._fence()
        closing = Attempt(self._run_dir, last_slot(self._run_dir))
        end = closing.claim["time"] if ended else time.time()
        end_ms = int(end * 1000)
        self._client.set_terminated(mlflow_run_id, STATUSES[state], end_ms)
        upload(self._client, self._run_dir, mlflow_run_id, state == "succeeded")
        if ended:
            note_delivered(self._run_dir, self._mlflow_run_id)

    def _deliver(self) -> None:
        if self._damage:
            raise self._damage
        self._open()
        # A row that a crash of the machine takes back must not have been reported.
        for file, number in self._outbox.sources():
            Attempt(self._run_dir, number).sync(file)
        while self._outbox:
            self._send(self._outbox.batch())

    def _open(self) -> None:
        """Open the MLflow run, unless it is open, and drop the rows that it has."""
        if self._mlflow_run_id:
            return
        self._uri = self.uri
        self._client = client(self._uri)
        run = open_run(self._client, self._run_dir, self._uri, self._fence)
        mlflow_run_id = run.info.run_id
        self._fence()
        describe_run(self._client, self._run_dir, mlflow_run_id, here=self._ran_here())
        # Else somebody may have said meanwhile, in the same MLflow, that the run has ended.
        says_status = self._leads or sqlite_file(self.uri) is not None
        if says_status and self._attempt.is_live() and run.info.status != "RUNNING":
            self._client.update_run(mlflow_run_id, status="RUNNING")
        cursor = run.data.tags.get(CURSOR, "{}")
        self._outbox.go_on_from(json.loads(cursor))
        self._mlflow_run_id = mlflow_run_id

    @property
    def uri(self) -> str:
        """The MLflow that gets the run, with its password."""
        return address(self._run_dir)

    def _ran_here(self) -> bool:
        if not self._leads or not (self._attempt.folder / "claim.json").exists():
            return False
        host: str = self._attempt.claim["host"]
        return host == socket.gethostname()

    def _send(self, batch: list[FileRow]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = []
        for _, row in batch:
            timestamp_ms = int(row.time * 1000)
            for name, value in row.fresh.items():
                metrics.append(Metric(name, value, timestamp_ms, row.step))
        cursor = self._outbox.cursor_after(batch)
        tag = RunTag(CURSOR, json.dumps(cursor))
        self._fence()  # after the rows were made durable: they lie below the seal that a successor writes
        self._client.log_batch(self._mlflow_run_id, metrics=metrics, tags=[tag])
        self._outbox.remove(batch)

    def _read(self) -> None:
        """Queue the rows that are new, and compare those of this attempt with what they repeat."""
        try:
            self._read_spools()
        except Damaged as damage:
            self._damage = damage

    def _read_spools(self) -> None:
        own = self._attempt.number
        for file, reader in self._readers.items():
            compared = self._compared.get(file, 0)
            for row in reader.read():
                self._outbox.add(file, row)
                is_own = row.attempt == own
                if is_own and row.again and row.index >= compared:
                    self._compare(row)
            self._compared[file] = max(compared, reader.count)

    def _compare(self, row: AppendedRow) -> None:
        """Say in the log where a step that was done again came out otherwise; the first value stays."""
        job = load_any_job(self._run_dir)
        tolerance = relative_tolerance(job)
        for metric in COMPARED:
            first, now = row.again.get(metric, (0.0, 0.0))
            if differ(first, now, tolerance):
                self._event("redone_step_differs", step=row.step, key=metric, reported=first, found=now)

    def _succeeds(self, action: Callable[[], None]) -> bool:
        """Do something with MLflow; False where that failed, after which `_next_try` and `_wait_s` say when again."""
        try:
            action()
        except Fenced:
            return False
        except Exception as error:
            self._hold_up(diagnose(error, self._uri))
            return False
        if self._trouble:
            self._event("tracking_restored")
        note_trouble(self._run_dir, None)
        self._wait_s = 0.0
        self._trouble = None
        return True

    def _hold_up(self, trouble: Trouble) -> None:
        """Say what the trouble is, and choose when to try again."""
        before = self._trouble
        self._trouble = trouble
        another = before is None or before.lasting != trouble.lasting
        if another:
            kind = "tracking_refused" if trouble.lasting else "tracking_outage"
            self._event(kind, error=trouble.reason)
        if self._may_end() and trouble != before:
            note_trouble(self._run_dir, trouble)
        reopen_soon = another and self._mlflow_run_id
        if trouble.lasting and not reopen_soon:
            self._wait_s = _LONGEST_WAIT_S
        else:
            self._wait_s = min(_LONGEST_WAIT_S, self._wait_s * 2 or 0.5)
        if trouble.lasting:
            self._start_over()  # what was open may be gone: opening it anew tells
            self._read()
        self._next_try = time.monotonic() + self._wait_s

    def _event(self, kind: str, **fields: Any) -> None:
        attempt = self._attempt
        if self._leads and attempt.is_live():
            attempt.event(kind, **fields)

    def _may_end(self) -> bool:
        """Whether this attempt leads the run, or is the last one of a run that is closed."""
        if result(self._run_dir) is not None:
            newest = last_attempt(self._run_dir)
            if newest.number == self._attempt.number:
                return True
        return self._attempt.is_live()

    def _check_may_end(self) -> None:
        if not self._may_end():
            run_id = self._run_dir.name
            raise Fenced(f"{run_id} goes on without attempt {self._attempt.number}")


def replay(run_dir: Path, timeout_s: float = 60.0) -> bool:
    """Deliver what is missing of a closed run, from anywhere, any number of times; True when nothing is missing."""
    ended = result(run_dir)
    if ended is None:
        return False
    return is_delivered(run_dir) or Delivery(run_dir, last_attempt(run_dir).number).finish(ended["state"], timeout_s)


def deliver_held_up(timeout_s: float = 10.0) -> None:
    """Deliver what was held up of the closed runs of this home, newest first; a store that is down is tried once."""
    down: set[str] = set()
    for run_dir in undelivered():
        try:
            _deliver_held_up(run_dir, down, timeout_s)
        except Damaged as damage:
            note_trouble(run_dir, diagnose(damage, ""))


def _deliver_held_up(run_dir: Path, down: set[str], timeout_s: float) -> None:
    """Deliver what was held up of one closed run, unless its store is down; raises Damaged."""
    delivery = Delivery(run_dir, last_attempt(run_dir).number)
    if delivery.uri in down:
        return
    ended = result(run_dir) or {}
    if not delivery.finish(str(ended["state"]), timeout_s):
        trouble = trouble_of_run(run_dir)
        if trouble is None or not trouble.lasting:
            down.add(delivery.uri)


def undelivered() -> Iterator[Path]:
    """The closed runs of this home of which MLflow has not got all, newest first."""
    for run_id in reversed(run_ids()):
        run_dir = runs_folder() / run_id
        run = snapshot(run_dir)
        if run.result and run.attempt and not run.delivered:
            yield run_dir
