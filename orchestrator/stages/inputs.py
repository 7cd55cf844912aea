"""What a stage reads, whether it trains or writes: paths, checks, digests, and its files where it is done."""

from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.generation.principles import principles_of
from orchestrator.generation.written import WrittenRow, check_columns, read_written
from orchestrator.planning.base import find_base
from orchestrator.planning.freeze import (
    Sent,
    absolute,
    absolute_base,
    absolute_source,
    bringer,
    brought,
    input_digests,
    places_before,
)
from orchestrator.planning.model import Model
from orchestrator.planning.preflight import Findings
from orchestrator.planning.survey import today, with_date, writes_date
from runfolder.digests import Digests, generation_digests
from runfolder.job import Job
from runfolder.site import Site
from runfolder.sources import ClusterFile, SubmitterFile, parse_source
from runfolder.staged_job import AnyStage, references, with_inputs

CheckJob = Callable[[Job], Findings]


def absolute_stage(job: AnyStage, folder: Path) -> AnyStage:
    """The job with its paths made absolute: relative to `folder` if they exist there, else to the current one."""
    if isinstance(job, Job):
        return absolute(job, folder)
    texts = {}
    for field, source in job.sources.items():
        texts[field] = absolute_source(source, folder)
    moved = with_inputs(job, texts)
    base = absolute_base(job.base, folder)
    return moved.model_copy(update={"base": base})


def check_stage_inputs(job: AnyStage, is_here: bool, check: CheckJob) -> tuple[Model, tuple[str, ...]]:
    """The base of a stage, and warnings; raises InputError where something is wrong with what it reads.

    What earlier stages make is not there yet. `check` is that of a job that trains.
    """
    if isinstance(job, Job):
        found = check(job)
        return found.model, found.warnings
    model = find_base(job.base)
    generate = job.generate
    if _is_readable(generate.principles or "", is_here):
        principles = principles_of(job)
        rows = readable_rows(generate.rows, is_here)
        check_columns(generate, rows or (), principles)
    return model, ()


def marked_of_stage(stage: str, texts: Iterable[str]) -> list[str]:
    """Texts that say of which stage they are."""
    marked = []
    for text in texts:
        marked.append(f"stages.{stage}: {text}")
    return marked


def _is_readable(source: str, is_here: bool) -> bool:
    """Whether a file is one of this machine, which is there before any stage is done."""
    parsed = parse_source(source)
    if isinstance(parsed, ClusterFile):
        return is_here
    return isinstance(parsed, SubmitterFile)


def readable_rows(source: str, is_here: bool) -> list[WrittenRow] | None:
    """The rows of a file that is there before any stage is done, None: it is not; raises InputError."""
    if not _is_readable(source, is_here):
        return None
    try:
        return read_written(source)
    except ValueError as error:  # a RowError
        raise InputError(f"generate.rows: {error}") from None


def dated_stage(job: AnyStage, model: Model) -> AnyStage:
    """The job with today's date where a chat template writes one, and the job says none."""
    if not writes_date(model):
        return job
    if isinstance(job, Job):
        return with_date(job)
    if job.generate.date is not None:
        return job
    generate = job.generate.model_copy(update={"date": today()})
    return job.model_copy(update={"generate": generate})


def digests_of_stage(job: AnyStage, model: Model, site: Site) -> Digests:
    """The digests of what a stage reads, as far as it is there; raises InputError."""
    base = None if "base.model" in references(job) else model.folder
    if isinstance(job, Job):
        return input_digests(job, base, site)
    try:
        return generation_digests(job, base, site.digest)
    except ValueError as error:
        raise InputError(f"generate: {error}") from None


def brought_stage(job: AnyStage, model: Model, site: Site, sent: Sent) -> tuple[AnyStage, dict[str, str]]:
    """The job with its files where the runs are, as paths there, and where they lay before, by field."""
    if isinstance(job, Job):
        there = brought(job, model, site, sent)
        before = places_before(job, there)
        return there.at_width(model.hidden_size), before
    bring = bringer(site, sent)
    texts = {}
    for field, source in job.sources.items():
        parsed = parse_source(source)
        if isinstance(parsed, SubmitterFile):
            texts[field] = bring(source)
    if model.folder is not None and Path(job.base.model).is_dir():
        texts["base.model"] = bring(model.folder)
    inputs = {"base.model": job.base.model, **job.sources}
    before = {}
    for field, text in texts.items():
        if inputs[field] != text:
            before[field] = inputs[field]
    return with_inputs(job, texts), before
