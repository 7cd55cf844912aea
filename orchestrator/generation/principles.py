"""Principles: a YAML list of mappings, of which each row draws one in each round."""

from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.planning.spec import LARGEST, parse_yaml
from runfolder.draws import Principle
from runfolder.generation_job import GenerationJob
from runfolder.sources import file_of

ALLOWED_LIST = "a list of mappings of texts, each with an id of its own"


def read_principles(path: Path) -> list[Principle]:
    """The principles in a file; raises InputError with what is wrong with it."""
    try:
        data = path.read_bytes()
        text = data[: LARGEST + 1].decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8)") from None
    if len(data) > LARGEST:
        raise InputError(f"{path}: found {len(data)} bytes; allowed: {LARGEST}")
    plain = parse_yaml(text, str(path))
    if not isinstance(plain, list) or not plain:
        raise InputError(f"{path}: found {type(plain).__name__}; allowed: {ALLOWED_LIST}")
    seen = set()
    for number, principle in enumerate(plain, start=1):
        where = f"{path}: principle {number}"
        name = _checked_principle(principle, where)
        if name in seen:
            raise InputError(f"{where}: found the id {name!r} again; allowed: {ALLOWED_LIST}")
        seen.add(name)
    return plain


def _checked_principle(principle: object, where: str) -> str:
    """The id of a principle; raises InputError where it is none."""
    if not isinstance(principle, dict) or "id" not in principle:
        raise InputError(f"{where}: found {principle!r}; allowed: {ALLOWED_LIST}")
    for key, value in principle.items():
        if not isinstance(value, str):
            raise InputError(f"{where}, {key}: found {value!r}; allowed: a text")
    name: str = principle["id"]
    return name


def principles_of(job: GenerationJob) -> list[Principle]:
    """The principles of a job; none where it has no file of them. Raises InputError."""
    file = file_of(job.generate.principles or "")
    if job.generate.principles is None or file is None:
        return []
    return read_principles(file)
