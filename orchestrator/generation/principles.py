"""Principles: a YAML list of mappings, of which each row draws one in each round.

What a row draws depends on its id, the seed, the round, and the ids of the principles, by the highest of their
digests (rendezvous hashing, Thaler and Ravishankar 1998). So another wording of a principle changes what the rows ask
that draw it, a principle that comes or goes changes the rows that draw that one, and nothing changes any other row.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.planning.spec import LARGEST, parse_yaml
from runfolder.generation_job import GenerationJob
from runfolder.sources import file_of

Principle = Mapping[str, str]
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
        if not isinstance(principle, dict) or "id" not in principle:
            raise InputError(f"{where}: found {principle!r}; allowed: {ALLOWED_LIST}")
        for key, value in principle.items():
            if not isinstance(value, str):
                raise InputError(f"{where}, {key}: found {value!r}; allowed: a text")
        if principle["id"] in seen:
            raise InputError(f"{where}: found the id {principle['id']!r} again; allowed: {ALLOWED_LIST}")
        seen.add(principle["id"])
    return plain


def principles_of(job: GenerationJob) -> list[Principle]:
    """The principles of a job; none where it has no file of them. Raises InputError."""
    file = file_of(job.generate.principles or "")
    if job.generate.principles is None or file is None:
        return []
    return read_principles(file)


def drawn_principle(principles: Sequence[Principle], row_id: str, seed: int, round_number: int) -> Principle:
    """The principle that a row draws in a round."""

    def place(principle: Principle) -> bytes:
        text = f"{seed} {round_number} {row_id} {principle['id']}"
        digest = hashlib.sha256(text.encode())
        return digest.digest()

    return max(principles, key=place)


def seed_of_row(row_id: str, seed: int, column: str) -> int:
    """What the tokens of a column of a row are drawn from."""
    text = f"{seed} {column} {row_id}"
    digest = hashlib.sha256(text.encode())
    first_bytes = digest.digest()[:4]
    return int.from_bytes(first_bytes)
