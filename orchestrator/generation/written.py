"""The rows of a stage that writes, as they come to have its columns."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.errors import InputError
from runfolder.draws import Principle, drawn_principle
from runfolder.generation_job import AnswerColumn, Generate, JudgedColumns, MadeColumn
from trainer.data.cells import shown_in_template
from trainer.data.files import describe_value, records
from trainer.data.shapes import fill_template, names_in

ROW_ID = "id"
_OF_PRINCIPLE = "principle."
_JUDGED = ("chosen", "rejected", "p_first")
WrittenRow = dict[str, Any]  # values by column


def read_written(source: str) -> list[WrittenRow]:
    """The rows of a file, each with an id: its own, or the digest of what it has; raises InputError."""
    rows = []
    digests: dict[str, str] = {}
    for number, record in records(source):
        if not isinstance(record, Mapping):
            found = describe_value(record)
            raise InputError(f"{source}, row {number}: found {found}; allowed: an object with named fields")
        row = dict(record)
        digest = digest_of_row(row)
        row.setdefault(ROW_ID, digest)
        row_id = id_of_row(row)
        if row_id not in digests:
            digests[row_id] = digest
            rows.append(row)
        elif digests[row_id] != digest:  # else it is the same row again, of which nothing else would be written
            where = f"{source}, row {number}"
            raise InputError(f"{where}: found the id {row_id!r}, which an earlier row has; allowed: one of its own")
    if not rows:
        raise InputError(f"{source}: found no rows; allowed: at least one")
    return rows


def id_of_row(row: WrittenRow) -> str:
    """The id of a row, as a text."""
    row_id = row[ROW_ID]
    return str(row_id)


def digest_of_row(row: WrittenRow) -> str:
    """An id for a row that has none."""
    text = json.dumps(row, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]


def prompt_of(
    template: str,
    row: WrittenRow,
    principles: list[Principle],
    seed: int,
    round_number: int,
) -> str:
    """A template with the columns of a row, and the principle that it draws; raises InputError."""
    values = {}
    row_id = id_of_row(row)
    for name in names_in(template):
        where = f"row {row_id}, field {name}"
        if name.startswith(_OF_PRINCIPLE) and principles:
            principle = drawn_principle(principles, row_id, seed, round_number)
            values[name] = _field_of(principle, name)
        else:
            value = row[name]
            values[name] = shown_in_template(value, where)
    return fill_template(template, values)


def _field_of(principle: Principle, name: str) -> str:
    """What a template gets for `principle.field`; raises InputError where a principle lacks it."""
    field = name.removeprefix(_OF_PRINCIPLE)
    if field in principle:
        return principle[field]
    principle_id = principle[ROW_ID]
    raise InputError(f"principle {principle_id}: found no {field}; allowed: with {field}, as a prompt asks")


def check_columns(
    generate: Generate,
    rows: Iterable[WrittenRow],
    principles: list[Principle],
) -> None:
    """Raise InputError where a column asks for one that a row does not have, or a principle that is not there."""
    made: list[str] = []
    needed: dict[str, str] = {}
    for name, column in generate.columns.items():
        for wanted in columns_wanted(column):
            if wanted.startswith(_OF_PRINCIPLE):
                _check_principles(name, wanted, principles)
            elif wanted not in made:
                needed.setdefault(wanted, name)
        made += columns_made(name, column)
    for row in rows:
        for wanted, name in needed.items():
            if wanted in row:
                continue
            names = map(repr, row)
            there = ", ".join(names)
            row_id = id_of_row(row)
            raise InputError(f"generate.columns.{name}: row {row_id} has no {wanted!r}; it has {there}")


def columns_wanted(column: MadeColumn) -> list[str]:
    """The columns that one is made of, those of principles too."""
    if isinstance(column, AnswerColumn):
        return names_in(column.prompt)
    if isinstance(column, JudgedColumns):
        wanted = [column.first, column.second]
        for name in names_in(column.judge):
            if name not in ("first", "second"):
                wanted.append(name)
        return wanted
    return [column.column]


def columns_made(name: str, column: MadeColumn) -> tuple[str, ...]:
    """The columns that come of one."""
    if isinstance(column, JudgedColumns):
        return _JUDGED
    return (name,)


def _check_principles(name: str, wanted: str, principles: list[Principle]) -> None:
    """Raise InputError where a field of a principle is asked for that one of them lacks."""
    if not principles:
        raise InputError(f"generate.columns.{name}: found {{{wanted}}} without generate.principles")
    for principle in principles:
        _field_of(principle, wanted)


def cut_at(text: str, stops: Iterable[str]) -> str:
    """A text up to the first of some texts, without the space around it."""
    for stop in stops:
        text, _, _ = text.partition(stop)
    return text.strip()


def is_match(expression: str, text: object) -> int:
    """1 where a text has what an expression finds, else 0."""
    shown = str(text)
    found = re.search(expression, shown)
    return int(found is not None)
