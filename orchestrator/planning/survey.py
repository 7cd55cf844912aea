"""A job's rows as its trainer will see them: as tokens where the base's tokenizer is at hand, else as characters.

Tokens are made by a child process, `python -m trainer.data`, so that a command imports nothing heavy; what came of it
is remembered.
"""

import datetime
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fleetune_start import unshadowed
from orchestrator.planning.model import Model
from runfolder.folders import cache_folder
from runfolder.job import Job
from runfolder.sources import file_of
from trainer.data.date import asks_for_date
from trainer.data.files import digest
from trainer.data.rows import Row, rows
from trainer.data.survey import Survey

_NEEDED = ("transformers", "pyarrow", "numpy", "jinja2")
_LARGEST = 256 << 20  # bytes of a file that is looked at as tokens before a run: a minute or two
_CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English, for estimates alone
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_FORMAT = 2  # of the figures that are remembered

Progress = Callable[[str, int], None]  # a source, and the number of its rows that are done


@dataclass(frozen=True)
class Rows:
    """What a data source holds: rows, and their tokens, which are an estimate where there is no `survey`."""

    count: int
    tokens: int
    survey: Survey | None = None


@dataclass(frozen=True)
class Looked:
    """What came of a look at `train` and `eval`.

    `found` has None where there is no such source, or it is a hub dataset and no library to read it is here.
    `problems` are what is wrong with them, one line each; `failure` is why they were not looked at as tokens.
    """

    found: Mapping[str, Rows | None]
    problems: list[str]
    failure: str | None


def look(job: Job, model: Model | None, progress: Progress) -> Looked:
    """Look at what `train` and `eval` of a job hold."""
    found: dict[str, Rows | None] = {"train": None, "eval": None}
    problems, failure = [], None
    tokenised: dict[str, Survey | str] = {}
    try:
        tokenised = _as_tokens(job, model, progress) if model else {}
    except ChildProcessError as error:
        failure = str(error)
    for key, source in sources(job).items():
        answer = tokenised.get(key)
        try:
            if isinstance(answer, str):
                problems.append(answer)
            elif answer:
                found[key] = Rows(answer.rows, answer.tokens, answer)
            elif file_of(source) or importlib.util.find_spec("datasets"):
                found[key] = _estimate(job, source)
        except ValueError as error:
            problems.append(f"data.{key}: {error}")
    return Looked(found, problems, failure)


def sources(job: Job) -> dict[str, str]:
    """The data sources of a job by their keys."""
    return {"train": job.data.train, **({"eval": job.data.eval} if job.data.eval else {})}


def missing() -> list[str]:
    """What is not installed of the packages that look at rows as tokens."""
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def with_date(job: Job) -> Job:
    """The job with today's date, unless it has one."""
    if job.data.date is not None:
        return job
    return job.model_copy(update={"data": job.data.model_copy(update={"date": datetime.date.today()})})


def writes_date(model: Model) -> bool:
    """Whether the base's chat template asks for today's date, as far as its files are here."""
    if model.folder is None:
        return True
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    files = [model.folder / name for name in names if (model.folder / name).is_file()]
    return any(asks_for_date(path.read_text(errors="replace")) for path in files)


def _as_tokens(job: Job, model: Model, progress: Progress) -> dict[str, Survey | str]:
    """The figures of each source that can be looked at as tokens from here, or what is wrong with it."""
    if model.folder is None or missing():
        return {}
    job = with_date(job)
    found: dict[str, Survey | str] = {}
    notes: dict[str, Path] = {}
    for key, source in sources(job).items():
        file = file_of(source)
        if file and file.is_file() and file.stat().st_size <= _LARGEST:
            notes[key] = cache_folder() / "surveys" / f"{_key(job, source, model.folder)}.json"
            if remembered := _remembered(notes[key]):
                found[key] = remembered
    wanted = {key: source for key, source in sources(job).items() if key in notes and key not in found}
    for key, answer in _ask_child(job, model.folder, wanted, progress).items():
        found[key] = answer
        if isinstance(answer, Survey):
            with suppress(OSError):  # then the next look takes as long
                notes[key].parent.mkdir(parents=True, exist_ok=True)
                notes[key].write_text(json.dumps(answer.dump()))
    return found


def _remembered(note: Path) -> Survey | None:
    """The figures of an earlier look; None where there are none, or they were written by half."""
    try:
        return Survey.load(json.loads(note.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _key(job: Job, source: str, folder: Path) -> str:
    """A digest of all that the figures of a source depend on."""
    data = job.data.model_dump(mode="json", exclude={"train", "eval", "packing"})
    total = hashlib.sha256(repr((_FORMAT, digest(source), data, job.method.virtual_tokens)).encode())
    total.update(version("transformers").encode())
    for path in sorted(path for path in folder.iterdir() if path.suffix in _TOKENIZER_FILES):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:32]


def _ask_child(job: Job, folder: Path, wanted: Mapping[str, str], progress: Progress) -> dict[str, Survey | str]:
    """Have a child process look at sources: figures, or what is wrong, for those that it came to.

    Raises ChildProcessError with its last line where it fails.
    """
    if not wanted:
        return {}
    request = json.dumps({"job": job.dump(), "folder": str(folder), "sources": wanted})
    found: dict[str, Survey | str] = {}
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer.data"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=unshadowed(os.environ),
            text=True,
        )
        with child:
            assert child.stdin and child.stdout
            with suppress(BrokenPipeError):  # it has failed already
                child.stdin.write(request)
                child.stdin.close()
            for line in child.stdout:
                answer = json.loads(line)
                if "done" in answer:
                    progress(wanted[answer["key"]], answer["done"])
                else:
                    found[answer["key"]] = answer["problem"] if "problem" in answer else Survey.load(answer["survey"])
        if child.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            raise ChildProcessError(f"looking at them failed: {last}")
    return found


def _estimate(job: Job, source: str) -> Rows:
    count = tokens = 0
    for row in rows(source, job.data.columns):
        count += 1
        tokens += min(job.data.seq_len, -(-_characters(row) // _CHARACTERS_PER_TOKEN))
    return Rows(count, tokens)


def _characters(row: Row) -> int:
    return len(row.prompt) + len(row.completion) + sum(len(message["content"]) for message in row.messages)
