"""What can be known to be wrong before anything is started. Reads files and headers; needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from clusters.base import Capacity
from clusters.machine import total_capacity
from orchestrator.errors import InputError
from orchestrator.planning import base, base_folder
from orchestrator.planning.answer_room import answer_warnings
from orchestrator.planning.model import Model
from orchestrator.planning.survey import Looked, SourceProgress, SourceRows, look, missing_packages, writes_date
from orchestrator.tracking.store import check_uri
from runfolder.job import Job
from runfolder.sources import ClusterFile, StageOutput, parse_source
from trainer.data.survey import Survey, row_warnings, unknown_id

_FEW_STEPS = 20  # below these, warm-up and schedule are a matter of chance
_ENOUGH_STEPS = 100


@dataclass(frozen=True)
class Findings:
    """What the checks learned on their way. Rows are None for a source that cannot be read from here."""

    model: Model
    train: SourceRows | None
    eval: SourceRows | None
    warnings: tuple[str, ...]


def check_job(
    job: Job,
    progress: SourceProgress = lambda _source, _rows: None,
    capacity: Capacity | None = None,
    is_here: bool = True,
    by_config: bool = False,
) -> Findings:
    """Look at data, base, batch and tracking; raises InputError with one line per problem.

    `progress` is called with a source and the number of its rows that are done. `capacity` is what the workers will
    find, by default this machine's; `is_here` says whether the cluster's files are this machine's. `by_config`: a
    folder with config.json and no weights does for the base.
    """
    if capacity is None:
        kind, total = total_capacity()
        capacity = Capacity(kind, total, total)
    model, base_problems = _checked_base(job, by_config)
    looked = look(job, model, progress, is_here)
    problems = list(looked.problems)
    if model is not None:
        problems += _unknown_ids(model, looked)
    problems += base_problems
    problems += _batch_problems(job)
    problems += _test_problems(job, looked)
    problems += _tracking_problems(job)
    if problems or model is None:
        lines = dict.fromkeys(problems)  # each once
        raise InputError("\n".join(lines))
    warnings = _layout_warnings(job, capacity)
    warnings += base.base_warnings(job, model)
    warnings += _data_warnings(job, model, looked)
    train = looked.rows["train"]
    evaluation = looked.rows["eval"]
    return Findings(model, train, evaluation, tuple(warnings))


def _checked_base(job: Job, by_config: bool) -> tuple[Model | None, list[str]]:
    """The base, and what is wrong with it for this job."""
    try:
        model = base.find_base(job.base, by_config)
    except InputError as error:
        return None, [str(error)]
    try:
        return model, base.misfits(job, model)
    except InputError as error:
        return model, [str(error)]


def _unknown_ids(model: Model, looked: Looked) -> Iterator[str]:
    """Tokens of the rows that the base has no embedding for."""
    for key, rows in looked.rows.items():
        if rows is None or not rows.survey:
            continue
        problem = unknown_id(rows.survey, model.embeddings)
        if problem:
            yield f"data.{key}, {problem}"


def _batch_problems(job: Job) -> list[str]:
    if job.train.batch_tokens >= job.data.seq_len:
        return []
    allowed = f"at least one sequence (data.seq_len {job.data.seq_len})"
    return [f"train.batch_tokens: found {job.train.batch_tokens}; allowed: {allowed}"]


def _test_problems(job: Job, looked: Looked) -> list[str]:
    """Why so small a share of the held-out rows has not one of them."""
    share = job.evaluation.test
    held_out = looked.rows["eval"]
    if not share or held_out is None:
        return []
    rows = held_out.survey.examples if held_out.survey else held_out.count
    rows = min(rows, job.evaluation.rows or rows)
    if rows * share >= 1 or not rows:
        return []
    allowed = f"0, or 1/{rows} and more"
    return [f"evaluation.test: found {share:g}, less than one of {rows} held-out rows; allowed: {allowed}"]


def _tracking_problems(job: Job) -> list[str]:
    try:
        check_uri(job.tracking.uri)
    except InputError as error:
        return [str(error)]
    return []


def has_gpus(job: Job, kind: str) -> bool:
    """Whether the workers of this job get GPUs: as it says, else as its cluster's kind of capacity is."""
    if kind == "gpu":
        return True
    return job.resources.gpus_per_node is not None


def _layout_warnings(job: Job, capacity: Capacity) -> list[str]:
    """What a user should know of the machine and the layout that the job asks for, and of its method on them."""
    warnings = []
    workers = job.resources.world_size
    if capacity.kind == "cpu" and workers > capacity.total:
        warnings.append(f"resources: {workers} workers share the {capacity.total} cores of this machine")
    if capacity.kind == "gpu" and workers > capacity.total > 0:
        warnings.append(f"resources: {workers} workers of one GPU each; there are {capacity.total} GPUs")
    if job.train.precision == "bf16" and not has_gpus(job, capacity.kind):
        warnings.append("train.precision: bf16 on a CPU can be twenty times slower than fp32")
    holds_all_state = job.sharding.zero == 0 and workers > 1
    if job.method.makes_model and holds_all_state:
        warnings.append("sharding.zero: 0 keeps the whole optimizer state on every worker; 1 shares it at no cost")
    if getattr(job.method, "dropout", 0) > 0:
        warnings.append("method.dropout: the masks depend on the layout, so runs on other layouts differ")
    if job.method.kind == "relora" and job.method.quantises:
        warnings.append("method.quantised: merges quantise anew; what is below a 4-bit step is mostly lost")
    return warnings


def _data_warnings(job: Job, model: Model, looked: Looked) -> Iterator[str]:
    """What a user should know of the rows before they are trained on."""
    for key, rows in looked.rows.items():
        if rows is None or not rows.survey:
            continue
        texts = row_warnings(rows.survey, job)
        for text in texts:
            yield f"data.{key}: {text}"
        duplicates = rows.survey.duplicates
        if duplicates and job.objective.rows != "answers":
            yield f"data.{key}: {duplicates} of {rows.survey.examples} preferences are equal to an earlier one"
    train = looked.rows["train"]
    if train is None:
        parsed = parse_source(job.data.train)
        if isinstance(parsed, StageOutput):
            return  # nobody can have looked at them yet
        source = "a hub dataset"
        if isinstance(parsed, ClusterFile):
            source = "a file of the cluster"
        yield f"data.train: {source}; its rows are first looked at by the workers"
        return
    if train.survey is None:
        reason = looked.failure or _why_not_looked_at(model)
        yield f"data: rows were not looked at as tokens ({reason}); the workers do it first"
    elif _writes_todays_date(job, model, train.survey):
        yield "data.date: the chat template writes the day of submission into every chat; say a date to fix it"
    if train.survey is not None:
        yield from answer_warnings(job, train.survey)
    yield from few_steps(job, train.tokens)


def _writes_todays_date(job: Job, model: Model, survey: Survey) -> bool:
    """Whether chats hold a date that is another on another day."""
    if not survey.number("chat"):
        return False
    return writes_date(model) and job.data.date is None


def _why_not_looked_at(model: Model) -> str:
    """Why the rows were not looked at as tokens, where nothing failed."""
    packages = missing_packages()
    if packages:
        names = ", ".join(packages)
        return f"{names} not installed: pip install 'fleetune[data]'"
    if model.folder is None:
        return "the base's tokenizer is on the hub: fleetune rows fetches it"
    if not base_folder.has_tokenizer(model.folder):
        return "no tokenizer lies beside the base's config.json"
    return "the file is large: fleetune rows takes its time"


def few_steps(job: Job, tokens: int) -> Iterator[str]:
    """Whether a run over rows of so many tokens has steps enough, and which batch would give them."""
    batch = job.train.batch_tokens
    epochs = job.train.epochs
    if batch > tokens:
        times = f"{batch / tokens:.1f} times"
        often = f"all rows have about {tokens} tokens, so a step holds each of them about {times}"
        yield f"train.batch_tokens: found {batch}; {often}" + _enough(job, tokens)
        return
    if epochs is None:
        return
    steps = ceil(epochs * tokens / batch)
    if steps < _FEW_STEPS:
        few = f"{epochs:g} epochs are {steps} steps, too few for a schedule"
        yield f"train.epochs: {few}" + _enough(job, tokens)


def _enough(job: Job, tokens: int) -> str:
    """The batch that gives enough steps, as far as it holds a sequence."""
    epochs = job.train.epochs
    if epochs is None:
        return ""
    all_tokens = epochs * tokens
    share = int(all_tokens / _ENOUGH_STEPS)
    batch = max(job.data.seq_len, share)
    steps = ceil(all_tokens / batch)
    return f"; train.batch_tokens: {batch} would give {steps} steps"
