"""Lists of answers to one prompt, ranked or scored: each two of unequal rank are a pair, the better one first."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from trainer.data.cells import finite_number
from trainer.data.files import describe_value, reject
from trainer.data.rows import ShapedRecord

PairOfColumns = tuple[str, str]  # of the better answer, of the worse one
AnswersAndQualities = tuple[list[Any], list[float]]  # of a list; of the second, more is better
_LIST = "completions"
_IN_ENTRIES = ("rank", "score")
_ENTRY = "an object {completion, rank} or {completion, score}, as no list of ranks or scores is beside"


def has_list(record: ShapedRecord) -> bool:
    """Whether a record has a list of answers."""
    return _LIST in record.shape.columns


def spread(record: ShapedRecord) -> tuple[ShapedRecord, list[PairOfColumns]]:
    """A record whose answers have columns of their own, and the columns of each pair; raises RowError.

    A rank is better the lower it is, a score the higher it is. Two answers that are equal in that make no pair.
    """
    answers, qualities = _ranked_answers(record)
    fields = dict(record.fields)
    columns = []
    for index, answer in enumerate(answers):
        column = f"{_LIST}[{index}]"
        fields[column] = answer
        columns.append(column)
    with_qualities = zip(columns, qualities, strict=True)
    pairs = []
    for one, other in combinations(with_qualities, 2):
        column, quality = one
        other_column, other_quality = other
        pair = (column, other_column)
        if quality < other_quality:
            pair = (other_column, column)
        if quality != other_quality:
            pairs.append(pair)
    widened = replace(record, fields=fields)
    return widened, pairs


def _ranked_answers(record: ShapedRecord) -> AnswersAndQualities:
    """The answers of a list, and how good each one is."""
    entries = _list_in(record, _LIST)
    *_, beside = record.shape.columns
    if beside == _LIST:
        return _of_entries(entries, record.where)
    numbers = _list_in(record, beside)
    where = f"{record.where}, field {beside}"
    count = len(entries)
    if len(numbers) != count:
        found = f"{len(numbers)} of them"
        allowed = f"{count}, one for each of the completions"
        reject(where, found, allowed)
    kind = beside.removesuffix("s")
    qualities = []
    for index, number in enumerate(numbers):
        where_number = f"{where}[{index}]"
        quality = _signed(kind, number, where_number)
        qualities.append(quality)
    return entries, qualities


def _of_entries(entries: list[Any], where: str) -> AnswersAndQualities:
    """The same of a list whose entries hold an answer and its rank or score."""
    answers = []
    qualities = []
    by = ""
    for index, entry in enumerate(entries):
        where_entry = f"{where}, field {_LIST}[{index}]"
        kinds = list(_kinds_in(entry))
        if not kinds:
            found = describe_value(entry)
            reject(where_entry, found, _ENTRY)
        kind = kinds[0]
        by = by or kind
        if kind != by:
            found = describe_value(entry)
            reject(where_entry, found, f"a {by}, as the first of the list has")
        number = entry[kind]
        answer = entry["completion"]
        quality = _signed(kind, number, f"{where_entry}.{kind}")
        answers.append(answer)
        qualities.append(quality)
    return answers, qualities


def _kinds_in(entry: Any) -> Iterator[str]:
    """By what an entry ranks its answer; nothing where it is no such entry."""
    if isinstance(entry, dict) and "completion" in entry:
        for kind in _IN_ENTRIES:
            if kind in entry:
                yield kind


def _list_in(record: ShapedRecord, column: str) -> list[Any]:
    """A list of two or more in a column."""
    value = record.fields.get(column)
    values: list[Any] = []
    if isinstance(value, list):
        values = value
    if len(values) < 2:
        found = describe_value(value)
        where = f"{record.where}, field {column}"
        reject(where, found, "a list of two or more")
    return values


def _signed(kind: str, value: Any, where: str) -> float:
    """A rank or a score as a number of which more is better."""
    number = finite_number(value, where)
    if kind == "rank":
        return -number
    return number
