"""What can be known to be wrong before anything is started. Reads files and headers; needs no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from clusters.machine import room
from orchestrator.errors import InputError
from orchestrator.planning import base
from orchestrator.planning.model import Model
from orchestrator.planning.survey import Looked, Progress, Rows, look, missing, writes_date
from orchestrator.tracking.store import check_uri
from runfolder.job import Job
from trainer.data.survey import unknown_id
from trainer.data.survey import warnings as row_warnings

_FEW_STEPS = 20  # below these, warm-up and schedule are a matter of chance
_ENOUGH_STEPS = 100


@dataclass(frozen=True)
class Findings:
    """What the checks learned on their way. Rows are None for a source that cannot be read from here."""

    model: Model
    train: Rows | None
    eval: Rows | None
    warnings: tuple[str, ...]


def check(job: Job, progress: Progress = lambda _source, _rows: None) -> Findings:
    """Look at data, base, batch and tracking; raises InputError with one line per problem.

    `progress` is called with a source and the number of its rows that are done.
    """
    model, problems = _base(job)
    looked = look(job, model, progress)
    found = looked.found
    problems = [*looked.problems, *_unknown_ids(model, found), *problems, *_batch(job), *_tracking(job)]
    if problems or model is None:
        raise InputError("\n".join(dict.fromkeys(problems)))
    warnings = [*_warnings(job), *base.warnings(job, model), *_about_rows(job, model, looked)]
    return Findings(model, found["train"], found["eval"], tuple(warnings))


def _base(job: Job) -> tuple[Model | None, list[str]]:
    """The base, and what is wrong with it for this job."""
    try:
        model = base.find_model(job)
    except InputError as error:
        return None, [str(error)]
    try:
        return model, base.misfits(job, model)
    except InputError as error:
        return model, [str(error)]


def _unknown_ids(model: Model | None, found: Mapping[str, Rows | None]) -> Iterator[str]:
    """Tokens of the rows that the base has no embedding for."""
    for key, those in found.items():
        if model and those and those.survey and (problem := unknown_id(those.survey, model.embeddings)):
            yield f"data.{key}, {problem}"


def _batch(job: Job) -> list[str]:
    if job.train.batch_tokens >= job.data.seq_len:
        return []
    allowed = f"at least one sequence (data.seq_len {job.data.seq_len})"
    return [f"train.batch_tokens: found {job.train.batch_tokens}; allowed: {allowed}"]


def _tracking(job: Job) -> list[str]:
    try:
        check_uri(job.tracking.uri)
    except InputError as error:
        return [str(error)]
    return []


def has_gpus(job: Job) -> bool:
    """Whether the workers of this job get GPUs: as it says, else as this machine has them."""
    return job.resources.gpus_per_node is not None or room()[0] == "gpu"


def _warnings(job: Job) -> list[str]:
    warnings = []
    kind, total = room()
    if kind == "cpu" and job.resources.world > total:
        warnings.append(f"resources: {job.resources.world} workers share the {total} cores of this machine")
    if job.train.precision == "bf16" and not has_gpus(job):
        warnings.append("train.precision: bf16 on a CPU can be twenty times slower than fp32")
    if job.method.makes_model and job.sharding.zero == 0 and job.resources.world > 1:
        warnings.append("sharding.zero: 0 keeps the whole optimizer state on every worker; 1 shares it at no cost")
    if getattr(job.method, "dropout", 0) > 0:
        warnings.append("method.dropout: the masks depend on the layout, so runs on other layouts differ")
    if job.method.kind == "relora" and job.method.quantises:
        warnings.append("method.quantised: merges quantise anew; what is below a 4-bit step is mostly lost")
    return warnings


def _about_rows(job: Job, model: Model, looked: Looked) -> Iterator[str]:
    """What a user should know of the rows before they are trained on."""
    for key, those in looked.found.items():
        if those and those.survey:
            yield from (f"data.{key}: {warning}" for warning in row_warnings(those.survey, job.data.seq_len))
    train = looked.found["train"]
    if train is None:
        yield "data.train: a hub dataset; its rows are first looked at by the workers"
        return
    if train.survey is None:
        why = looked.failure or _why_not(model)
        yield f"data: rows were not looked at as tokens ({why}); the workers do it first"
    elif train.survey.number("chat") and writes_date(model) and job.data.date is None:
        yield "data.date: the chat template writes the day of submission into every chat; say a date to fix it"
    yield from few_steps(job, train.tokens)


def _why_not(model: Model) -> str:
    if missing():
        return f"{', '.join(missing())} not installed: pip install 'fleetune[data]'"
    if model.folder is None:
        return "the base's tokenizer is on the hub: fleetune rows fetches it"
    return "the file is large: fleetune rows takes its time"


def few_steps(job: Job, tokens: int) -> Iterator[str]:
    """Whether a run over rows of so many tokens has steps enough, and which batch would give them."""
    batch, epochs = job.train.batch_tokens, job.train.epochs
    if batch > tokens:
        often = f"all rows have about {tokens} tokens, so a step holds each of them about {batch / tokens:.0f} times"
        yield f"train.batch_tokens: found {batch}; {often}" + _enough(job, tokens)
    elif epochs is not None and ceil(epochs * tokens / batch) < _FEW_STEPS:
        steps = ceil(epochs * tokens / batch)
        yield f"train.epochs: {epochs:g} epochs are {steps} steps, too few for a schedule" + _enough(job, tokens)


def _enough(job: Job, tokens: int) -> str:
    """The batch that gives enough steps, as far as it holds a sequence."""
    epochs = job.train.epochs
    if epochs is None:
        return ""
    batch = max(job.data.seq_len, int(epochs * tokens / _ENOUGH_STEPS))
    return f"; train.batch_tokens: {batch} would give {ceil(epochs * tokens / batch)} steps"
