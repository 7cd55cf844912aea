"""What can be known to be wrong before anything is started. Reads files and headers; needs no torch."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from clusters.machine import room
from orchestrator.errors import InputError
from orchestrator.job import Job
from orchestrator.planning import base
from orchestrator.planning.model import Model
from orchestrator.tracking.store import check_uri

_CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English, for estimates alone


@dataclass(frozen=True)
class Rows:
    """What a data source holds: the number of rows, and an estimate of their tokens after cutting at seq_len."""

    count: int
    tokens: int


@dataclass(frozen=True)
class Findings:
    """What the checks learned on their way. Rows are None for a source that cannot be read from here."""

    model: Model
    train: Rows | None
    eval: Rows | None
    warnings: tuple[str, ...]


def check(job: Job) -> Findings:
    """Look at data, base, batch and tracking; raises InputError with one line per problem."""
    problems: list[str] = []
    surveys: dict[str, Rows | None] = {"train": None, "eval": None}
    for key, source in (("train", job.data.train), ("eval", job.data.eval)):
        try:
            surveys[key] = survey(source, job.data.seq_len) if source else None
        except ValueError as error:
            problems.append(f"data.{key}: {error}")
    model: Model | None = None
    try:
        model = base.find_model(job)
        problems += base.misfits(job, model)
    except InputError as error:
        problems.append(str(error))
    problems += _tracking(job)
    if problems or model is None:
        raise InputError("\n".join(problems))
    warnings = [*_warnings(job, surveys["train"]), *base.warnings(job, model)]
    return Findings(model, surveys["train"], surveys["eval"], tuple(warnings))


def survey(source: str, seq_len: int) -> Rows | None:
    """Read every row; raises RowError at the first bad one. None: a hub dataset, and no library to read it."""
    from trainer.data.rows import rows

    if not Path(source).is_absolute() and importlib.util.find_spec("datasets") is None:
        return None
    count = tokens = 0
    for row in rows(source):
        text = len(row.prompt) + len(row.completion) + sum(len(m["content"]) for m in row.messages)
        count += 1
        tokens += min(seq_len, -(-text // _CHARACTERS_PER_TOKEN))
    return Rows(count, tokens)


def _tracking(job: Job) -> list[str]:
    try:
        check_uri(job.tracking.uri)
    except InputError as error:
        return [str(error)]
    return []


def has_gpus(job: Job) -> bool:
    """Whether the workers of this job get GPUs: as it says, else as this machine has them."""
    return job.resources.gpus_per_node is not None or room()[0] == "gpu"


def _warnings(job: Job, train: Rows | None) -> list[str]:
    warnings = []
    if train is None:
        warnings.append("data.train: a hub dataset; its rows are first looked at by the workers")
    if job.train.batch_tokens < job.data.seq_len:
        warnings.append("train.batch_tokens: less than data.seq_len; a longer example is a batch of its own")
    if job.train.precision == "bf16" and not has_gpus(job):
        warnings.append("train.precision: bf16 on a CPU can be twenty times slower than fp32")
    if job.method.makes_model and job.sharding.zero == 0 and job.resources.world > 1:
        warnings.append("sharding.zero: 0 keeps the whole optimizer state on every worker; 1 shares it at no cost")
    if getattr(job.method, "dropout", 0) > 0:
        warnings.append("method.dropout: the masks depend on the layout, so runs on other layouts differ")
    if job.method.kind == "relora" and job.method.quantises:
        warnings.append("method.quantised: merges quantise anew; what is below a 4-bit step is mostly lost")
    return warnings
