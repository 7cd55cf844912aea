"""Which of several clusters gets a run: the one that would start it first.

The choice is written down before anything is made on the cluster, in FLEETUNE_HOME/choices, until the submission is
known to have come through: who repeats it after a cut, or after the client was killed, goes on with the same cluster.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clusters.base import Unreachable
from orchestrator.backends import CLUSTERS, config_of, expected_start, make_request, open_cluster
from orchestrator.errors import InputError, JobRefused, RunEnded
from orchestrator.runs import new_id
from runfolder.files import write_once
from runfolder.folders import home
from runfolder.job import Job

Done = TypeVar("Done")


@dataclass(frozen=True)
class ClusterChoice:
    """A cluster for a run, and why that one, in one line."""

    cluster: str
    why: str


def cluster_names(clusters: str) -> list[str]:
    """The names in `a,b`; raises InputError for one that is not known, whichever of them would get a run."""
    names = [name.strip() for name in clusters.split(",")]
    for name in names:
        if name not in CLUSTERS:
            config_of(name)
    return names


def planned_cluster(names: Sequence[str], job: Job) -> ClusterChoice:
    """The cluster of these that would get a job now; nothing is kept."""
    note = _note_of(names, job, None)
    if note.exists():
        return _written_choice(note)
    return _first_to_start(names, job, {})


def on_chosen_cluster(
    names: Sequence[str], job: Job, run_id: str | None, submit_to: Callable[[ClusterChoice], Done]
) -> Done:
    """Submit a job to the cluster of these that gets it, which is kept for repetitions until that has come through.

    Where it refuses the job, the next one gets it. A refusal where an earlier try may have been taken forgets
    nothing: another cluster would make a second run. A run whose id is given stays where it is. Raises InputError
    where no cluster takes the job, Unreachable where it cannot be known.
    """
    if run_id is not None and (cluster := _cluster_with(names, run_id)):
        return submit_to(ClusterChoice(cluster, "it has this run already"))
    note = _note_of(names, job, run_id)
    refusals: dict[str, str] = {}
    while True:
        is_new = not note.exists() and _note_choice(note, _first_to_start(names, job, refusals))
        choice = _written_choice(note)
        try:
            done = submit_to(choice)
        except InputError as error:
            if not is_new and not isinstance(error, RunEnded):
                kept = f"cluster {choice.cluster} may have taken an earlier try of this"
                kept += "; on another one it is another run"
                raise InputError(f"{error}\n{kept}") from None
            note.unlink(missing_ok=True)
            if run_id is not None or not isinstance(error, JobRefused):
                raise
            refusals[choice.cluster] = str(error)
        else:
            note.unlink(missing_ok=True)
            return done


def _cluster_with(names: Sequence[str], run_id: str) -> str | None:
    """The cluster that has a run; None where none of them has it. Each must answer, or it might."""
    for name in names:
        if open_cluster(name).site.snapshots([run_id]):
            return name
    return None


def _first_to_start(names: Sequence[str], job: Job, refusals: Mapping[str, str]) -> ClusterChoice:
    """The cluster that would start a job first; of those that do not say, the first that is named.

    `refusals`: what clusters said that have refused it when it was submitted.
    """
    waits: dict[str, float] = {}  # in seconds: clocks of several machines differ
    answers = dict(refusals)
    refused = list(refusals)
    for name in names:
        if name in refusals:
            continue
        try:
            cluster = open_cluster(name)
            wait_s = expected_start(cluster, make_request(cluster, job, new_id(job.name)))
        except (InputError, Unreachable) as error:
            answers[name] = str(error)
            if isinstance(error, InputError):
                refused.append(name)
            continue
        waits[name] = math.inf if wait_s is None else wait_s
        answers[name] = _in_words(wait_s)
    reasons = "; ".join(f"{name}: {answer}" for name, answer in answers.items())
    if waits:
        return ClusterChoice(min(waits, key=lambda name: waits[name]), reasons)
    if len(refused) == len(names):
        raise InputError(f"--cluster: no cluster takes this job: {reasons}")
    raise Unreachable(f"no cluster can be asked that would take this job: {reasons}")


def _in_words(wait_s: float | None) -> str:
    if wait_s is None:
        return "does not say when it would start"
    if wait_s <= 60:
        return "would start now"
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + wait_s))
    return f"would start at {at}"


def _note_of(names: Sequence[str], job: Job, run_id: str | None) -> Path:
    """Where the choice for a job is written down."""
    plain = [names, job.dump(), run_id]
    identity = json.dumps(plain, sort_keys=True, default=str)
    hashed = hashlib.sha256(identity.encode())
    digest = hashed.hexdigest()
    folder = home() / "choices"
    return folder / digest[:20]


def _written_choice(note: Path) -> ClusterChoice:
    """The choice that was written down."""
    cluster, _, why = note.read_text().partition("\n")
    return ClusterChoice(cluster, why)


def _note_choice(note: Path, choice: ClusterChoice) -> bool:
    """Write a choice down; False where another client of this machine has chosen meanwhile."""
    text = f"{choice.cluster}\n{choice.why}"
    return write_once(note, text)
