"""Cells of a record: whether they say anything, and the text that they are."""

import math

from trainer.data.files import describe_value, reject


def is_empty(value: object) -> bool:
    """Whether a cell says nothing: null, NaN, or an empty text, list or object."""
    if value is None or value != value:
        return True
    return isinstance(value, str | list | dict) and not value


def text_of(value: object, where: str) -> str:
    """A cell that must be text, as UTF-8 can write it. Raises RowError."""
    if not isinstance(value, str):
        reject(where, describe_value(value), "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        reject(where, "half of a surrogate pair", "text that can be written as UTF-8")
    return value


def shown_in_template(value: object, where: str) -> str:
    """A value as a template shows it: text as it is, numbers as they are written, nothing for null."""
    if is_empty(value):
        return ""
    if isinstance(value, int | float):
        return str(value)
    return text_of(value, where)


def finite_number(value: object, where: str) -> float:
    """A cell that must be a finite number. Raises RowError."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if not math.isfinite(number):
        reject(where, describe_value(value), "a finite number")
    return number
