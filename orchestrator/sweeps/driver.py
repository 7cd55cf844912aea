"""Drives a sweep: looks at the run folders of its trials, and does what the rule says. It keeps nothing itself.

It may be killed at any moment and started again, also from another laptop: what it does is submitted under run ids
that are digests of trials, and is safe to repeat.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clusters.machine import cores
from orchestrator.clusters_file import default_cluster
from orchestrator.control import resume
from orchestrator.errors import InputError, RunEnded
from orchestrator.planning.freeze import absolute, read_job
from orchestrator.planning.spec import PlainJob, load_yaml, validate
from orchestrator.runs import Handle
from orchestrator.status import Status, statuses
from orchestrator.submit import submit
from orchestrator.sweeps.checks import check_reads_same, steps_of
from orchestrator.sweeps.progress import Decision, Move, Reached, TrialState
from orchestrator.sweeps.rules import SweepPlan
from orchestrator.sweeps.spec import Sweep, read_sweep
from orchestrator.sweeps.trials import METHOD_KEY, Trial, Variant
from orchestrator.tracking.history import RowReader
from runfolder.appended import Chunk, Position
from runfolder.cooling import COOLED
from runfolder.resources import Resources

_METRICS = "metrics.jsonl"
_THREADS = "OMP_NUM_THREADS"
_DIGEST_LENGTH = 16
Say = Callable[[str], None]
FoundTrials = dict[Trial, Reached]
StatusByTrial = dict[Trial, Status]


@dataclass(frozen=True)
class SweepDriver:
    """A sweep, its job as it was written and as it is submitted, and the cluster that it runs on."""

    sweep: Sweep
    plan: SweepPlan
    written: PlainJob
    submitted: PlainJob
    cluster: str

    @classmethod
    def of(cls, path: Path, cluster: str | None) -> "SweepDriver":
        """The driver of the sweep in a file; raises InputError."""
        sweep = read_sweep(path)
        job_path = path.absolute().parent / sweep.job
        job, folder = read_job(job_path)
        steps = steps_of(sweep, job, path, job_path)
        plan = SweepPlan(sweep, steps)
        if not plan.rungs and sweep.rule in ("asha", "race"):
            raise InputError(
                f"{path}: rungs: found {sweep.rungs}; allowed: a share that is before the last of {steps} steps"
            )
        written = load_yaml(job_path)
        with_paths = absolute(job, folder)
        submitted = with_paths.dump()
        for trial in plan.trials({}):
            settings = trial.job(sweep, submitted, None)
            validate(settings, source=f"{path}, {_described(trial)}")
        chosen = cluster or default_cluster()
        return cls(sweep, plan, written, submitted, chosen)

    def run_id(self, trial: Trial) -> str:
        """The run id of a trial."""
        sweep = self.sweep.name
        return trial.run_id(sweep, self.written)

    def look(self) -> tuple[FoundTrials, StatusByTrial]:
        """What the trials that were begun have come to, as their folders say."""
        found: FoundTrials = {}
        by_trial: StatusByTrial = {}
        place = Handle("", self.cluster)
        existing = set(place.site.ids())
        looked_at: set[Trial] = set()
        while True:
            trials = self.plan.trials(found)
            new = [trial for trial in trials if trial not in looked_at]
            if not new:
                return found, by_trial
            looked_at.update(new)
            begun = []
            handles = []
            for trial in new:
                run_id = self.run_id(trial)
                if run_id in existing:
                    handle = Handle(run_id, self.cluster)
                    handles.append(handle)
                    begun.append(trial)
            known = statuses(handles)
            for trial, handle, status in zip(begun, handles, known, strict=True):
                by_trial[trial] = status
                state = _state_of(status)
                scores = scores_of(handle, self.sweep.measure)
                found[trial] = Reached(state, status.step, scores)

    def check_begun(self) -> None:
        """Raise InputError where the trials that were begun read other rows, or another base."""
        site = Handle("", self.cluster).site
        existing = set(site.ids())
        for trial in self.plan.trials({}):  # the first that was begun stands for all
            run_id = self.run_id(trial)
            if run_id in existing:
                job = trial.job(self.sweep, self.submitted, None)
                check_reads_same(job, run_id, site)
                return

    def tick(self, say: Say = lambda _: None) -> tuple[Decision, FoundTrials]:
        """Look once, and do what is to be done now. Raises Unreachable, after which it can be repeated."""
        found, by_trial = self.look()
        with self._shared_cores():
            self._finish_moves(found, by_trial)
            decision = self.plan.decide(found)
            lines = self.shown(decision, found)
            for move, line in zip(decision.moves, lines, strict=True):
                begun = move.trial in found
                self._do(move, begun)
                say(line)
        return decision, found

    @property
    def _is_here(self) -> bool:
        """Whether trials run on the cluster of this machine."""
        return self.cluster == "local"

    @contextmanager
    def _shared_cores(self) -> Iterator[None]:
        """Within it, a run that begins here gets a share of the cores, of which it would take all: others run too."""
        if not self._is_here or _THREADS in os.environ:
            yield
            return
        resources = Resources.model_validate(self.submitted["resources"])
        workers = self.sweep.parallel * resources.world_size
        threads = max(1, cores() // workers)
        os.environ[_THREADS] = str(threads)
        try:
            yield
        finally:
            del os.environ[_THREADS]

    def judged(self, found: FoundTrials) -> set[str]:
        """The run ids of trials that succeeded; of a race those alone whose configuration was run with all seeds."""
        by_configuration: dict[Variant, list[Trial]] = {}
        for trial, reached in found.items():
            if reached.state == "succeeded":
                trials = by_configuration.setdefault(trial.configuration, [])
                trials.append(trial)
        run_ids: set[str] = set()
        seeds = len(self.sweep.seeds)
        for trials in by_configuration.values():
            is_whole = len(trials) == seeds
            if is_whole or self.sweep.rule != "race":
                whole = map(self.run_id, trials)
                run_ids.update(whole)
        return run_ids

    def _finish_moves(self, found: FoundTrials, by_trial: StatusByTrial) -> None:
        """Do again what a driver that died may have left half done: a submission, or the pause of a resumed run."""
        going = {}
        for trial, reached in found.items():
            if reached.state == "going":
                run_id = self.run_id(trial)
                going[run_id] = trial
        place = Handle("", self.cluster)
        site = place.site
        folders = site.snapshots(going)
        for run_id, trial in going.items():
            pause = self.plan.pause_of(trial, found)
            status = by_trial[trial]
            begun = status.attempt > 0
            folder = folders[run_id]
            is_asked = folder.asked is not None
            if status.state == "unknown":
                self._do(Move(trial, pause), begun)
            elif begun and pause is not None and not is_asked:
                site.ask(run_id, "pause", pause)

    def shown(self, decision: Decision, found: FoundTrials) -> list[str]:
        """What a decision does, in a line for each trial."""
        lines = []
        for move in decision.moves:
            goal = move.until or self.plan.steps
            verb = "resume" if move.trial in found else "submit"
            run_id = self.run_id(move.trial)
            settings = _described(move.trial)
            line = f"{verb} {run_id} up to step {goal}: {settings}"
            lines.append(line)
        return lines

    @property
    def digest(self) -> str:
        """What tells this sweep from others: its name, and its job as it was written."""
        content = [self.sweep.name, self.written]
        text = json.dumps(content, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode())
        hexadecimal = digest.hexdigest()
        return hexadecimal[:_DIGEST_LENGTH]

    def run(self, say: Say, period_s: float = 5.0) -> tuple[Decision, FoundTrials]:
        """Tick until all is done; gives the last decision, and what the trials have come to."""
        self.check_begun()
        while True:
            decision, found = self.tick(say)
            if decision.done:
                return decision, found
            self._keep_up()
            time.sleep(period_s)

    def _keep_up(self) -> None:
        """Start the cluster of this machine where it has ended: trials that are queued would wait for ever."""
        if self._is_here:
            from clusters.local import Local

            Local.here().start()

    def _do(self, move: Move, begun: bool) -> None:
        """Let a trial begin, or go on, up to a step."""
        run_id = self.run_id(move.trial)
        if begun:
            resume(run_id, self.cluster, move.until)
            return
        every = None
        if self.plan.rungs:
            every = self.plan.every
        job = move.trial.job(self.sweep, self.submitted, every)
        try:
            submit(job, cluster=self.cluster, run_id=run_id, pause_at=move.until)
        except RunEnded:
            return  # another driver was faster, and the trial has paused already


def scores_of(run: Handle, measure: str) -> dict[int, float]:
    """What a run was judged by after each step that was evaluated: where it paused, after its cool-down."""
    reader = RowReader(_METRICS, partial(_read_since, run))
    scores = {}
    cooled = {}
    of_branch = COOLED + measure.removeprefix("eval_")
    for row in reader.read():
        if measure in row.fresh:
            scores[row.step] = row.fresh[measure]
        if of_branch in row.fresh:
            cooled[row.step] = row.fresh[of_branch]
    return scores | cooled


def _read_since(run: Handle, position: Position) -> Iterable[Chunk]:
    """What was appended to the metrics of a run since a position."""
    by_file = run.site.read(run.run_id, {_METRICS: position})
    return by_file[_METRICS]


def _state_of(status: Status) -> TrialState:
    """What a run's state means for its trial."""
    if status.state == "succeeded":
        return "succeeded"
    if status.state == "cancelled" and status.verdict == "paused":
        return "paused"
    if status.state in ("failed", "cancelled"):
        return "failed"
    return "going"


def _described(trial: Trial) -> str:
    """A trial for people: its settings and its seed."""
    parts = []
    for key, value in trial.configuration.settings.items():
        if key == METHOD_KEY:
            value = trial.configuration.method
        _, _, name = key.rpartition(".")
        parts.append(f"{name} {value}")
    parts.append(f"seed {trial.seed}")
    return ", ".join(parts)
