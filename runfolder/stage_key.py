"""What a stage does, once what it takes of earlier ones is there: its job, the digests of its inputs, and its key."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from runfolder.digests import Digests, digests, generation_digests, of_stage
from runfolder.files import Record
from runfolder.group_objectives import GroupOptions
from runfolder.job import Job
from runfolder.staged_job import AnyStage, StagedJob, model_folder, references, with_inputs

_OF_PLACE = ("name", "resources", "tracking", "checkpoint", "env")  # sections that change nothing of what is learned


def stage_job(staged: StagedJob, stage: str, folders: dict[str, Path]) -> AnyStage:
    """The job of a stage, with paths where it names earlier ones; `folders` are the run folders of those."""
    job = staged.stages[stage]
    paths = {}
    for field, reference in references(job).items():
        folder = folders[reference.stage]
        if field == "base.model":
            path = model_folder(staged.stages[reference.stage], folder)
        else:
            path = folder / "output" / str(reference.file)
        paths[field] = str(path)
    return with_inputs(job, paths)


def stage_digests(staged: StagedJob, stage: str, record: Record, job: AnyStage) -> Digests:
    """The digests of what the job of a stage reads: as they were submitted, and of what earlier stages have left."""
    frozen = of_stage(record.get("digests") or {}, stage)
    from_stages = references(staged.stages[stage])
    if not from_stages:
        return frozen
    base = Path(job.base.model)
    place = base if base.is_dir() else None
    now = digests(job, place) if isinstance(job, Job) else generation_digests(job, place)
    for field in from_stages:
        digested = "base" if field == "base.model" else field
        frozen[digested] = now[digested]
    return frozen


def key_of_stage(job: AnyStage, of_inputs: Digests) -> str:
    """A digest of what a job learns, and from what: equal ones have equal outputs, wherever they lie."""
    texts = {}
    for field, digest in of_inputs.items():
        if digest is not None:
            text_field = "base.model" if field == "base" else field
            texts[text_field] = digest
    named = with_inputs(job, texts)
    if isinstance(job, Job) and isinstance(job.objective, GroupOptions):
        objective = _by_content(job.objective, texts)
        named = named.model_copy(update={"objective": objective})
    plain = named.dump()
    for section in _OF_PLACE:
        plain.pop(section, None)
    text = json.dumps([version("fleetune"), plain], sort_keys=True)
    hashed = hashlib.sha256(text.encode())
    return hashed.hexdigest()


def _by_content(objective: GroupOptions, texts: Mapping[str, str]) -> GroupOptions:
    """An objective with the digests of its reward's file and of its reward model in the place of their paths."""
    file = texts.get("objective.reward")
    if file is not None:
        objective = objective.with_reward_file(file)
    model = texts.get("objective.reward_model")
    if model is not None:
        objective = objective.with_reward_model(model)
    return objective
