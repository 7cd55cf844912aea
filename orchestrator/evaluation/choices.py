"""Rows of a task of kind choice: a prompt, some texts to choose from, and which of them is right."""

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.evaluation.task import TaskSpec
from trainer.data.cells import is_empty, shown_in_template, text_of
from trainer.data.files import describe_value, records, reject
from trainer.data.shapes import fill_template, names_in

_WAYS = "the text, the number from 0 or the letter of one of the choices"
_LETTERS = string.ascii_uppercase
ColumnValues = Mapping[str, Any]  # of one row, by column


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt, the texts that may follow it, and the number of the right one."""

    number: int
    prompt: str
    texts: tuple[str, ...]
    right: int


def read_choices(task: TaskSpec) -> Iterator[ChoiceRow]:
    """Stream the rows of a task's data; raises RowError."""
    found = False
    for number, record in records(task.data):
        found = True
        where = f"{task.data}, row {number}"
        if not isinstance(record, Mapping):
            found_there = describe_value(record)
            reject(where, found_there, "an object with named fields")
        prompt = _filled_in(task.prompt or "", record, where)
        texts = _texts_of(task, record, where)
        right = _right_number(task.answer or "", record, texts, where)
        yield ChoiceRow(number, prompt, texts, right)
    if not found:
        reject(task.data, "no rows", "at least one")


def _texts_of(task: TaskSpec, record: ColumnValues, where: str) -> tuple[str, ...]:
    """The texts to choose from: templates that are filled in, or a list in a column, each behind a space."""
    texts: list[str] = []
    if isinstance(task.choices, tuple):
        for template in task.choices:
            text = _filled_in(template, record, where)
            texts.append(text)
        return tuple(texts)
    name = task.choices or ""
    value = _column_value(name, record, where)
    where_choices = f"{where}, field {name}"
    is_list = isinstance(value, list | tuple)
    if not is_list or len(value) < 2:
        found = describe_value(value)
        reject(where_choices, found, "a list of at least two texts")
    for place, choice in enumerate(value):
        text = text_of(choice, f"{where_choices}[{place}]")
        if not text.startswith(" "):
            text = f" {text}"
        texts.append(text)
    return tuple(texts)


def _right_number(name: str, record: ColumnValues, texts: tuple[str, ...], where: str) -> int:
    """The number of the right text."""
    value = _column_value(name, record, where)
    number = None
    if isinstance(value, str):
        number = _place_of(value.strip(), texts)
    elif isinstance(value, int):
        number = int(value)
    if number is None or not 0 <= number < len(texts):
        found = describe_value(value)
        reject(f"{where}, field {name}", found, _WAYS)
    return number


def _place_of(value: str, texts: tuple[str, ...]) -> int | None:
    """The number of the text that a text, a letter or a number stands for."""
    for number, text in enumerate(texts):
        if text.strip() == value:
            return number
    if value.isdecimal():
        return int(value)
    letter = value.upper()
    if len(letter) == 1 and letter in _LETTERS:
        return _LETTERS.index(letter)
    return None


def _filled_in(template: str, record: ColumnValues, where: str) -> str:
    """A template with the values of a row."""
    values = {}
    for name in names_in(template):
        value = _column_value(name, record, where)
        values[name] = shown_in_template(value, f"{where}, field {name}")
    return fill_template(template, values)


def _column_value(name: str, record: ColumnValues, where: str) -> Any:
    """A column of a row; `choices.text` is the field `text` of the column `choices`."""
    steps = [name]
    if name not in record:
        steps = name.split(".")
    value: Any = record
    for step in steps:
        is_there = isinstance(value, Mapping) and step in value
        if not is_there:
            names = map(repr, record)
            there = ", ".join(names)
            reject(where, f"no column {name!r}", there or "none is there")
        value = value[step]
    if is_empty(value):
        found = describe_value(value)
        reject(f"{where}, field {name}", found, "a value")
    return value
