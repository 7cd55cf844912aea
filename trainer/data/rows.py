"""Rows of data, read and checked without torch: by `submit` on a laptop, and again by every worker."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.files import records, reject, show
from trainer.data.shapes import REFUSED, SHAPES, Shape, fill, places, with_columns

Message = dict[str, str]
Columns = Mapping[str, str]

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a prompt (empty for plain text) and the completion that is learned, or the turns of a chat.

    `number` counts from 1; in .jsonl it is the number of the line. `unused` names the columns that have a value here
    and are no part of the example.
    """

    number: int
    prompt: str
    completion: str
    messages: tuple[Message, ...] = ()
    unused: tuple[str, ...] = field(default=(), compare=False)


def rows(source: str | Path, columns: Columns | None = None) -> Iterator[Row]:
    """Stream the rows of a file, or of a hub dataset (`owner/name`, `owner/name:config:split`).

    `columns` says which column, or which template of columns, stands for one of the names in SHAPES. The first row
    decides on the shape, all others must have it. Raises RowError.
    """
    shape = None
    for number, record in records(str(source)):
        where = f"{source}, row {number}"
        if not isinstance(record, Mapping):
            reject(where, show(record), "an object with named fields")
        given = _mapped(columns, record, where) if columns else record
        if shape is None:
            shape = _recognise(given, where, exact=bool(columns))
            used = set(columns_used(columns)) if columns else {*shape.columns, *shape.companions}
        if columns:
            _require_answer(columns[shape.columns[-1]], record, where)
        else:
            _refuse_what_nobody_reads(record, where)
        yield _row(shape, number, given, where, unused=_others(record, used))
    if shape is None:
        reject(str(source), "no rows", "at least one")


def columns_used(columns: Columns | None) -> list[str]:
    """The columns of the data that a mapping reads."""
    return [name for template in (columns or {}).values() for name in places(template) or [template]]


def _others(record: Mapping[str, Any], used: set[str]) -> tuple[str, ...]:
    """The columns that have a value in a record and are not used."""
    others = (name for name, value in record.items() if name not in used and not _is_empty(value))
    return tuple(str(name).encode(errors="backslashreplace").decode() for name in others)


def _is_empty(value: object) -> bool:
    """Whether a cell says nothing: null, NaN, or an empty text, list or object."""
    return value is None or value != value or (isinstance(value, str | list | dict) and not value)


# From records to rows


def _refuse_what_nobody_reads(record: Mapping[str, Any], where: str) -> None:
    for name in REFUSED:
        if not _is_empty(record.get(name)):
            allowed = "nothing there, as training would not see it; data.columns says which columns to read"
            reject(f"{where}, field {name}", show(record[name]), allowed)


def _require_answer(template: str, record: Mapping[str, Any], where: str) -> None:
    """Raise RowError where a column that makes the answer is empty: what is around it is nothing to learn."""
    for name in places(template):
        if _is_empty(record[name]):
            reject(f"{where}, field {name}", "nothing", "text, as it makes the answer")


def _mapped(columns: Columns, record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record under the names of a shape, by the job's `data.columns`."""
    for name in columns_used(columns):
        if name not in record:
            reject(f"{where}, data.columns", f"no column {name!r}", ", ".join(map(repr, record)) or "none is there")
    return {
        target: _filled(template, record, where) if places(template) else record[template]
        for target, template in columns.items()
    }


def _filled(template: str, record: Mapping[str, Any], where: str) -> str:
    values = {name: _cell(record[name], f"{where}, field {name}") for name in places(template)}
    return fill(template, values)


def _cell(value: object, where: str) -> str:
    """A value as a template shows it: text as it is, numbers as they are written, nothing for null."""
    if _is_empty(value):
        return ""
    return str(value) if isinstance(value, int | float) else _text(value, where)


def _recognise(record: Mapping[str, Any], where: str, *, exact: bool) -> Shape:
    """The shape of a record; with `exact`, one that has a use for each of its fields."""
    filled = [name for name, value in record.items() if value is not None]
    shape = with_columns(filled) or with_columns(record)
    if shape is None or (exact and set(record) - {*shape.columns, *shape.companions}):
        names = [str(name).encode("ascii", "backslashreplace").decode() for name in record]
        allowed = " | ".join(map(str, SHAPES)) + "; or say data.columns"
        reject(where, f"the fields {', '.join(names) or 'none'}", allowed)
    return shape


def _row(shape: Shape, number: int, record: Mapping[str, Any], where: str, unused: tuple[str, ...]) -> Row:
    if shape.columns in (("messages",), ("conversations",)):
        return Row(number, "", "", _chat(shape, record, where), unused)
    values = {name: _text(record.get(name), f"{where}, field {name}") for name in shape.columns}
    learned = shape.columns[-1]
    if not values[learned].strip():
        reject(f"{where}, field {learned}", "empty text", "text that is not empty")
    for name, template in shape.companions.items():
        given = _companion(shape, name, record.get(name), f"{where}, field {name}")
        values[name] = fill(template, {name: given}) if given else ""
    return Row(number, fill(shape.prompt, values), fill(shape.completion, values), unused=unused)


def _companion(shape: Shape, name: str, value: object, where: str) -> str:
    if _is_empty(value):
        return ""
    return _history(shape, value, where) if name == "history" else _text(value, where)


def _history(shape: Shape, value: object, where: str) -> str:
    """Earlier pairs of question and answer, in the shape's own words."""
    allowed = "a list of pairs [question, answer]"
    if not isinstance(value, list):
        reject(where, show(value), allowed)
    turns = []
    for index, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            reject(f"{where}[{index}]", show(pair), allowed)
        asked, answered = (_text(part, f"{where}[{index}]") for part in pair)
        earlier = dict.fromkeys(shape.companions, "") | {shape.columns[0]: asked, shape.columns[-1]: answered}
        turns.append(fill(shape.prompt + shape.completion, earlier) + "\n\n")
    return "".join(turns)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        reject(where, show(value), "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        reject(where, "half of a surrogate pair", "text that can be written as UTF-8")
    return value


# Chats


def _chat(shape: Shape, record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    (name,) = shape.columns
    value, field_ = record.get(name), f"{where}, field {name}"
    if not isinstance(value, list) or not value:
        reject(field_, show(value), "a list of {role, content}" if name == "messages" else "a list of {from, value}")
    read = _message if name == "messages" else _sharegpt
    turns = tuple(read(turn, f"{field_}[{index}]") for index, turn in enumerate(value))
    if not _is_empty(record.get("system")):
        turns = (_system(record["system"], turns, f"{where}, field system"), *turns)
    if turns[0]["role"] == "assistant":
        reject(f"{field_}[0].role", show("assistant"), "system, user: somebody asks first")
    if not any(turn["role"] == "assistant" for turn in turns):
        reject(field_, "no assistant turn", "at least one, as it is what is learned")
    return turns


def _system(value: object, turns: tuple[Message, ...], where: str) -> Message:
    if turns[0]["role"] == "system":
        reject(where, show(value), "nothing beside a system turn")
    return {"role": "system", "content": _text(value, where)}


def _message(turn: object, where: str) -> Message:
    return _turn(turn, ("role", "content"), dict(zip(ROLES, ROLES, strict=True)), where)


def _sharegpt(turn: object, where: str) -> Message:
    return _turn(turn, ("from", "value"), _SHAREGPT_ROLES, where)


def _turn(turn: object, names: tuple[str, str], roles: Mapping[str, str], where: str) -> Message:
    """One turn as {role, content}, from an object of these two names."""
    if not isinstance(turn, Mapping):
        reject(where, show(turn), f"an object {{{', '.join(names)}}}")
    if unknown := [str(key) for key, value in turn.items() if key not in names and value is not None]:
        reject(where, f"the fields {', '.join(unknown)}", ", ".join(names))
    speaker, content = turn.get(names[0]), _text(turn.get(names[1]), f"{where}.{names[1]}")
    if not isinstance(speaker, str) or speaker not in roles:
        reject(f"{where}.{names[0]}", show(speaker), ", ".join(roles))
    if roles[speaker] == "assistant" and not content.strip():
        reject(f"{where}.{names[1]}", "empty text", "text that is not empty")
    return {"role": roles[speaker], "content": content}
