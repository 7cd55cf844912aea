"""Digests of single rows: the same for any base, method and file format, so that results of rows can be joined."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from trainer.data.files import Records, records

_DIGEST_BYTES = 16


def picked_rows(source: str, numbers: Iterable[int]) -> Records:
    """Some rows of a source, by their numbers; reads no further than the last of them. Raises RowError."""
    wanted = set(numbers)
    if not wanted:
        return
    last = max(wanted)
    for number, record in records(source):
        if number in wanted:
            yield number, record
        if number >= last:
            return


def row_digests(source: str, numbers: Iterable[int]) -> dict[int, str]:
    """The digest of the content of some rows, by their number."""
    by_number: dict[int, str] = {}
    for number, record in picked_rows(source, numbers):
        digest = row_digest(record)
        by_number[number] = digest
    return by_number


def row_digest(record: Any) -> str:
    """The digest of a record, whatever the order of its fields."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    content = text.encode(errors="backslashreplace")
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES)
    return digest.hexdigest()
