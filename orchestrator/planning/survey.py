"""A job's rows as its trainer will see them: as tokens where the base's tokenizer is at hand, else as characters.

Tokens are made by a child process, `python -m trainer.data`, so that a command imports nothing heavy; what came of it
is remembered.
"""

import datetime
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path

from orchestrator.child import asked_child
from orchestrator.planning.base_folder import has_tokenizer
from orchestrator.planning.model import Model
from runfolder.folders import cache_folder
from runfolder.job import Job
from runfolder.sources import ClusterFile, StageOutput, file_of, parse_source
from trainer.data.date import asks_for_date
from trainer.data.files import digest, reject
from trainer.data.preferences import read_answers
from trainer.data.rows import Row, asks, read_rows
from trainer.data.survey import Survey

READER = [sys.executable, "-P", "-m", "trainer.data"]  # the child, which gets a request and prints answers
_NEEDED = ("transformers", "pyarrow", "numpy", "jinja2")
_LARGEST = 256 << 20  # bytes of a file that is looked at as tokens before a run: a minute or two
_CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English, for estimates alone
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_SURVEY_FORMAT = 4  # of the surveys that are remembered

SurveyResults = dict[str, Survey | str]  # by the key of a source: its survey, or what is wrong with it
SourceProgress = Callable[[str, int], None]  # a source, and the number of its rows that are done


@dataclass(frozen=True)
class SourceRows:
    """What a data source holds: rows, and their tokens, which are an estimate where there is no `survey`."""

    count: int
    tokens: int
    survey: Survey | None = None


RowsByKey = dict[str, SourceRows | None]  # by the key of a source


@dataclass(frozen=True)
class Looked:
    """What came of a look at the rows of a job, by the field of each source.

    `rows` has None where there is no such source, or it is a hub dataset and no library to read it is here.
    `problems` are what is wrong with them, one line each; `failure` is why they were not looked at as tokens.
    """

    rows: RowsByKey
    problems: list[str]
    failure: str | None


def look(job: Job, model: Model | None, progress: SourceProgress, is_here: bool = True) -> Looked:
    """Look at what the sources of a job hold; `is_here`: the cluster's files are this machine's."""
    rows_by_key: RowsByKey = {"train": None, "eval": None}  # what a plan asks for, whether it is there or not
    problems = []
    failure = None
    answers: SurveyResults = {}
    try:
        if model:
            answers = _as_tokens(job, model, progress)
    except ChildProcessError as error:
        failure = str(error)
    for key, source in job.data.sources.items():
        answer = answers.get(key)
        if isinstance(answer, str):
            problems.append(answer)
            continue
        parsed = parse_source(source)
        is_elsewhere = isinstance(parsed, ClusterFile) and not is_here
        if is_elsewhere or isinstance(parsed, StageOutput):
            continue
        try:
            rows_by_key[key] = _source_rows(job, source, answer)
        except ValueError as error:
            problems.append(f"data.{key}: {error}")
    return Looked(rows_by_key, problems, failure)


def _source_rows(job: Job, source: str, survey: Survey | None) -> SourceRows | None:
    """What a source holds, by its survey or as an estimate; None for a hub dataset that nothing here can read."""
    if job.objective.generates and file_of(source):
        _check_prompt(job, source)
    if survey:
        return SourceRows(survey.rows, survey.tokens, survey)
    if file_of(source) or importlib.util.find_spec("datasets"):
        return _estimate(job, source)
    return None


def _check_prompt(job: Job, source: str) -> None:
    """Raise RowError where the first row asks a model nothing, as rows of plain text; all others have its shape."""
    for row in read_rows(source, job.data.columns):
        if not asks(row):
            reject(f"{source}, row {row.number}", "no prompt", "rows with a prompt to answer")
        return


def missing_packages() -> list[str]:
    """What is not installed of the packages that look at rows as tokens."""
    names = []
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            names.append(name)
    return names


def today() -> datetime.date:
    """The day of a submission, on the clock of whoever submits."""
    return datetime.date.today()


def with_date(job: Job) -> Job:
    """The job with today's date, unless it has one."""
    if job.data.date is not None:
        return job
    data = job.data.model_copy(update={"date": today()})
    return job.model_copy(update={"data": data})


def writes_date(model: Model) -> bool:
    """Whether the base's chat template asks for today's date, as far as its files are here."""
    if model.folder is None:
        return True
    for name in _TEMPLATE_FILES:
        path = model.folder / name
        if not path.is_file():
            continue
        template = path.read_text(errors="replace")
        if asks_for_date(template):
            return True
    return False


def _as_tokens(job: Job, model: Model, progress: SourceProgress) -> SurveyResults:
    """The survey of each source that can be looked at as tokens from here, or what is wrong with it."""
    if model.folder is None or not has_tokenizer(model.folder) or missing_packages():
        return {}
    job = with_date(job)
    answers: SurveyResults = {}
    unknown: dict[str, str] = {}
    notes: dict[str, Path] = {}
    for key, source in job.data.sources.items():
        if not _is_quick(source):
            continue
        note = _note_path(job, source, model.folder)
        notes[key] = note
        remembered = _remembered_survey(note)
        if remembered:
            answers[key] = remembered
        else:
            unknown[key] = source
    new_answers = _ask_child(job, model.folder, unknown, progress)
    for key, answer in new_answers.items():
        answers[key] = answer
        if isinstance(answer, Survey):
            _remember(notes[key], answer)
    return answers


def _is_quick(source: str) -> bool:
    """Whether a source is a file here, small enough to be looked at as tokens before a run."""
    file = file_of(source)
    if file is None or not file.is_file():
        return False
    return file.stat().st_size <= _LARGEST


def _remembered_survey(note: Path) -> Survey | None:
    """The survey of an earlier look; None where there is none, or it was written by half."""
    try:
        plain = json.loads(note.read_text())
        return Survey.load(plain)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _remember(note: Path, survey: Survey) -> None:
    """Write a survey down for the next look, which takes as long as this one where that fails."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(survey.dump())
        note.write_text(text)


def _note_path(job: Job, source: str, folder: Path) -> Path:
    """Where the survey of a source is remembered, by a digest of all that it depends on."""
    surveys = cache_folder() / "surveys"
    data = job.data.model_dump(mode="json", exclude={"train", "eval", "retain", "packing"})
    virtual_tokens = job.method.virtual_tokens
    rows_read = job.objective.rows
    facts = (_SURVEY_FORMAT, digest(source), data, virtual_tokens, rows_read)
    transformers_version = version("transformers")
    total = hashlib.sha256(repr(facts).encode())
    total.update(transformers_version.encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in _TOKENIZER_FILES:
            name = path.name.encode()
            content = path.read_bytes()
            total.update(name + content)
    key = total.hexdigest()[:32]
    return surveys / f"{key}.json"


def _ask_child(job: Job, folder: Path, wanted: Mapping[str, str], progress: SourceProgress) -> SurveyResults:
    """Have a child process look at sources: a survey, or what is wrong, for those that it came to.

    Raises ChildProcessError with its last line where it fails.
    """
    if not wanted:
        return {}
    request = {"job": job.dump(), "folder": str(folder), "sources": wanted}
    request_text = json.dumps(request)
    answers: SurveyResults = {}
    with asked_child(READER) as child:
        with suppress(BrokenPipeError):  # it has failed already
            child.questions.write(request_text)
            child.questions.close()
        for line in child.answers:
            answer = json.loads(line)
            key = answer["key"]
            if "done" in answer:
                progress(wanted[key], answer["done"])
            elif "problem" in answer:
                answers[key] = answer["problem"]
            else:
                answers[key] = Survey.load(answer["survey"])
        code = child.process.wait()
        if code:
            child.errors.seek(0)
            lines = child.errors.read().strip().splitlines()
            last = f"exit code {code}"
            if lines:
                last = lines[-1]
            raise ChildProcessError(f"looking at them failed: {last}")
    return answers


def _estimate(job: Job, source: str) -> SourceRows:
    """The rows of a source, and their tokens by the characters that they have."""
    count = 0
    tokens = 0
    last = 0
    rows_read = job.objective.rows
    for row in read_answers(rows_read, source, job.data.columns):
        count += row.number != last
        last = row.number
        row_tokens = ceil(_characters(row) / _CHARACTERS_PER_TOKEN)
        tokens += min(job.data.seq_len, row_tokens)
    return SourceRows(count, tokens)


def _characters(row: Row) -> int:
    characters = len(row.prompt) + len(row.completion)
    for message in row.messages:
        characters += len(message["content"])
    return characters
