"""Lists of answers to one prompt, ranked or scored: each two of unequal rank are a pair, the better one first."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from trainer.data.cells import number_of
from trainer.data.files import describe_value, reject
from trainer.data.rows import ShapedRecord

PairOfColumns = tuple[str, str]  # of the better answer, of the worse one
_LIST = "completions"
_BEST_FIRST = {"ranks": "rank", "scores": "score"}  # a list beside that of the answers, and what it is within it
_OBJECT = "an object {completion, rank} or {completion, score}, as there is no list of ranks or scores beside"


def has_list(record: ShapedRecord) -> bool:
    """Whether a record has a list of answers."""
    return _LIST in record.shape.columns


def spread(record: ShapedRecord) -> tuple[ShapedRecord, list[PairOfColumns]]:
    """A record whose answers have columns of their own, and the columns of each pair; raises RowError.

    A rank is better the lower it is, a score the higher it is. Two answers that are equal in that make no pair.
    """
    answers, merits = _answers(record)
    fields = dict(record.fields)
    columns = []
    for index, answer in enumerate(answers):
        column = f"{_LIST}[{index}]"
        fields[column] = answer
        columns.append(column)
    ranked = zip(columns, merits, strict=True)
    pairs = []
    for (first, first_merit), (second, second_merit) in combinations(ranked, 2):
        if first_merit > second_merit:
            pairs.append((first, second))
        elif first_merit < second_merit:
            pairs.append((second, first))
    return replace(record, fields=fields), pairs


def _answers(record: ShapedRecord) -> tuple[list[Any], list[float]]:
    """The answers of a list, and how good each one is: more is better."""
    entries = _list_in(record, _LIST)
    *_, beside = record.shape.columns
    if beside == _LIST:
        completions = []
        merits = []
        for index, entry in enumerate(entries):
            completion, merit = _entry(entry, f"{record.where}, field {_LIST}[{index}]")
            completions.append(completion)
            merits.append(merit)
        return completions, merits
    values = _list_in(record, beside)
    if len(values) != len(entries):
        found = f"{len(values)} of them"
        reject(f"{record.where}, field {beside}", found, f"{len(entries)}, one for each of the completions")
    return entries, list(_merits(record, beside, values))


def _list_in(record: ShapedRecord, column: str) -> list[Any]:
    """A list of two or more in a column."""
    value = record.fields.get(column)
    if not isinstance(value, list) or len(value) < 2:
        reject(f"{record.where}, field {column}", describe_value(value), "a list of two or more")
    return value


def _merits(record: ShapedRecord, column: str, values: list[Any]) -> Iterator[float]:
    """How good each answer is by the number that a list beside has of it."""
    for index, value in enumerate(values):
        yield _merit(_BEST_FIRST[column], value, f"{record.where}, field {column}[{index}]")


def _entry(entry: Any, where: str) -> tuple[Any, float]:
    """An answer that holds its rank or score itself."""
    if not isinstance(entry, dict) or "completion" not in entry:
        reject(where, describe_value(entry), _OBJECT)
    for kind in _BEST_FIRST.values():
        if kind in entry:
            return entry["completion"], _merit(kind, entry[kind], f"{where}.{kind}")
    reject(where, describe_value(entry), _OBJECT)


def _merit(kind: str, value: Any, where: str) -> float:
    """A rank or a score as a number of which more is better."""
    number = number_of(value, where)
    return -number if kind == "rank" else number
