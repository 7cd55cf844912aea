"""A job's rows as its trainer will see them: as tokens where the base's tokenizer is at hand, else as characters."""

import datetime
import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.job import Job
from orchestrator.planning.model import Model
from trainer.data.files import digest, is_hub
from trainer.data.rows import Row, rows

if TYPE_CHECKING:
    from trainer.data.encode import Reading
    from trainer.data.survey import Survey
    from trainer.data.tokens import Tokens

_NEEDED = ("transformers", "pyarrow", "numpy")
_LARGEST = 256 << 20  # bytes of a file that is looked at as tokens before a run: a minute or two
_CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English, for estimates alone
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_FORMAT = 1  # of the figures that are remembered

Progress = Callable[[str, int], None]  # a source, and the number of its rows that are done


@dataclass(frozen=True)
class Rows:
    """What a data source holds: rows, and their tokens, which are an estimate where there is no `survey`."""

    count: int
    tokens: int
    survey: "Survey | None" = None


class Tokenizing:
    """A base's tokenizer, loaded when it is needed, and how a job reads its rows with it."""

    def __init__(self, job: Job, folder: Path | None) -> None:
        self._base, self._folder = job.base, folder
        self._job = with_date(job)
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; raises InputError where it cannot be loaded."""
        from trainer.data.tokenizer import load_tokenizer

        if self._tokenizer is None:
            try:
                self._tokenizer = load_tokenizer(self._base, self._folder)
            except Exception as error:  # transformers and its readers raise what they like
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                where = self._folder or self._base.model
                raise InputError(f"base.model: {where}: its tokenizer cannot be loaded: {reason}") from None
        return self._tokenizer

    @property
    def reading(self) -> "Reading":
        """The options of the job that its tokens depend on."""
        from trainer.data.encode import Reading
        from trainer.data.tokenizer import end_ids

        return Reading.of(self._job, end_ids(self.tokenizer, self._base, self._folder))

    def tokens(self, source: str, progress: Progress) -> "Tokens":
        """The examples of a source; raises RowError at the first row that cannot be used."""
        from trainer.data.tokens import cache, tokenise

        return tokenise(source, self.tokenizer, self.reading, cache(), lambda done: progress(source, done))

    def survey(self, source: str, progress: Progress) -> "Survey":
        """The figures of a source, as remembered from an earlier look at the same rows with the same tokenizer."""
        from trainer.data.survey import Survey, survey
        from trainer.data.tokens import cache

        memory = cache() / "surveys" / f"{self._key(source)}.json"
        if memory.exists():
            return Survey.load(json.loads(memory.read_text()))
        found = survey(self.tokens(source, progress))
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(found.dump()))
        return found

    def _key(self, source: str) -> str:
        """A digest of all that the figures depend on, made without loading the tokenizer."""
        data = self._job.data.model_dump(mode="json", exclude={"train", "eval", "packing"})
        total = hashlib.sha256(repr((_FORMAT, digest(source), data, self._job.method.virtual_tokens)).encode())
        total.update(version("transformers").encode())
        assert self._folder is not None
        for path in sorted(path for path in self._folder.iterdir() if path.suffix in _TOKENIZER_FILES):
            total.update(path.name.encode() + path.read_bytes())
        return total.hexdigest()[:32]


def look(job: Job, source: str, tokenizing: Tokenizing | None, progress: Progress) -> Rows | None:
    """Read every row; raises RowError at the first bad one. None: a hub dataset, and no library to read it."""
    if is_hub(source) and importlib.util.find_spec("datasets") is None:
        return None
    if tokenizing is None or (not is_hub(source) and Path(source).exists() and Path(source).stat().st_size > _LARGEST):
        return _estimate(job, source)
    found = tokenizing.survey(source, progress)
    return Rows(found.rows, found.tokens, found)


def at_hand(job: Job, model: Model) -> Tokenizing | None:
    """The base's tokenizer; None where the base lies on the hub, or what reads it is not installed."""
    if model.folder is None or missing():
        return None
    return Tokenizing(job, model.folder)


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
    return any("strftime_now(" in path.read_text(errors="replace") for path in files)


def _estimate(job: Job, source: str) -> Rows:
    count = tokens = 0
    for row in rows(source, job.data.columns):
        count += 1
        tokens += min(job.data.seq_len, -(-_characters(row) // _CHARACTERS_PER_TOKEN))
    return Rows(count, tokens)


def _characters(row: Row) -> int:
    return len(row.prompt) + len(row.completion) + sum(len(message["content"]) for message in row.messages)
