"""An evaluation as a job on a cluster: submitted once, waited for, and its answers brought here."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clusters.base import Cluster
from orchestrator.backends import make_request, open_to_submit
from orchestrator.begun import identity_of
from orchestrator.control import fetch
from orchestrator.errors import JobFailed, JobStopped, RunEnded
from orchestrator.evaluation.adapters import AdapterSource
from orchestrator.evaluation.delivered import delivered_answers
from orchestrator.evaluation.process import AllAnswers, EvaluationProgress
from orchestrator.planning import spec
from orchestrator.planning.freeze import Sent, bringer, frozen_of
from orchestrator.progress import watch
from orchestrator.runs import find, new_id
from orchestrator.submit import Submission, clear_ending, submit_frozen
from runfolder.evaluation_job import EVALUATION_NAME, EvaluationJob
from runfolder.files import sha256, write_json, write_once
from runfolder.folders import home
from runfolder.job import Base

Frozen = dict[str, Any]


@dataclass(frozen=True)
class ClusterEvaluation:
    """Where an evaluation is done, what its job has beside the questions, and who is told of it."""

    cluster: str
    overrides: Sequence[str]
    sent: Sent
    announce: Callable[[Submission], None]
    base: Base
    sources: Sequence[AdapterSource]

    def answers(self, request: Mapping[str, Any], progress: EvaluationProgress) -> AllAnswers:
        """What the cluster answers to a request that is meant for this machine, merged into the files here."""
        run_id = self._submit(request).run_id
        for status, _ in watch(find(run_id, self.cluster)):
            if status.steps:
                progress(status.step, status.steps)
        if status.state == "cancelled":
            raise JobStopped(f"{run_id} {status.shown_state}: {status.reason}")
        if status.state == "failed":
            raise JobFailed(f"{run_id} failed: {status.reason}\nsee: fleetune logs {run_id}")
        to = home() / "fetched" / run_id
        folder = fetch(run_id, to, self.cluster)
        out = Path(request["out"])
        return delivered_answers(folder / "output", out)

    @clear_ending()
    def _submit(self, request: Mapping[str, Any]) -> Submission:
        """Submit the job, or find the one that was submitted for the same; one that has failed is made anew."""
        backend = open_to_submit(self.cluster)
        questions = _questions_file(request)
        job = self._job(questions)
        make_request(backend, job, new_id(job.name))  # what is refused is so before anything is sent
        there = self._brought(backend, job)
        frozen = self._frozen(job, there, request["base_digest"])
        submit = partial(
            submit_frozen,
            backend,
            there,
            frozen,
            partial(Submission, cluster=self.cluster, warnings=()),
            announce=self.announce,
        )
        note = home() / "evaluating" / identity_of(frozen)
        try:
            return submit(run_id=_noted_id(note, job.name))
        except RunEnded:
            note.unlink(missing_ok=True)
            return submit(run_id=_noted_id(note, job.name))

    def _job(self, questions: Path) -> EvaluationJob:
        """The job with paths of this machine; raises InputError."""
        adapters = {}
        for source in self.sources:
            adapters[source.label] = str(source.folder)
        base = self.base.model_dump(mode="json")
        plain = {"name": EVALUATION_NAME, "base": base, "adapters": adapters, "questions": str(questions)}
        return spec.validated(EvaluationJob, plain, self.overrides, "evaluate")

    def _brought(self, backend: Cluster, job: EvaluationJob) -> EvaluationJob:
        """The job with its files where it runs, as paths there."""
        bring = bringer(backend.site, self.sent)
        adapters = {}
        for source in self.sources:
            folder = str(source.folder)
            if not source.is_there:
                folder = bring(source.folder)
            adapters[source.label] = folder
        base = job.base
        if Path(base.model).is_dir():
            base = base.model_copy(update={"model": bring(Path(base.model))})
        questions = bring(Path(job.questions))
        return job.model_copy(update={"adapters": adapters, "base": base, "questions": questions})

    def _frozen(self, job: EvaluationJob, there: EvaluationJob, base_digest: str) -> Frozen:
        """What RUN_DIR/job.yaml says beside the run id; nothing in it is secret."""
        before = {}
        if job.base != there.base:
            before["base.model"] = job.base.model
        is_folder = Path(job.base.model).is_dir()
        digests = {"questions": sha256(Path(job.questions)), "base": base_digest if is_folder else None}
        frozen = frozen_of(there, self.cluster, digests)
        frozen["sent"] = before
        return frozen


def _questions_file(request: Mapping[str, Any]) -> Path:
    """The file of what is asked, by its digest: it stays, as the job may be on this machine."""
    asked = {"base_digest": request["base_digest"], "tasks": request["tasks"]}
    folder = home() / "evaluations" / "questions"
    folder.mkdir(parents=True, exist_ok=True)
    unnamed = folder / f".{uuid.uuid4().hex}"
    write_json(unnamed, asked)
    path = folder / f"{sha256(unnamed)}.json"
    unnamed.replace(path)
    return path


def _noted_id(note: Path, name: str) -> str:
    """The run id that an evaluation has on this machine, however often it is asked for."""
    write_once(note, new_id(name))
    return note.read_text()
