"""Rows of data, read and checked without torch: by `submit` on a laptop, and again by every worker."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from trainer.data.cells import is_empty, shown_in_template, text_of
from trainer.data.chats import Messages, messages
from trainer.data.files import SourceName, describe_value, records, reject
from trainer.data.shapes import ANSWERS, RowFamily, RowShape, fill_template, names_in

Columns = Mapping[str, str]
DataRecord = Mapping[str, Any]
ColumnNames = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a prompt (empty for plain text) and the completion that is learned, or the turns of a chat.

    `number` counts from 1; in .jsonl it is the number of the line. `unused` names the columns that have a value here
    and are no part of the example. Where `only_last`, no turn but the last is learned.
    """

    number: int
    prompt: str
    completion: str
    messages: Messages = ()
    unused: ColumnNames = field(default=(), compare=False)
    only_last: bool = False


@dataclass(frozen=True, slots=True)
class ShapedRecord:
    """A record under the names of its shape; `where` names its row in errors."""

    shape: RowShape
    number: int
    fields: DataRecord
    where: str
    unused: ColumnNames


def read_rows(source: SourceName, columns: Columns | None = None) -> Iterator[Row]:
    """Stream the rows of a file, or of a hub dataset (`owner/name`, `owner/name:config:split`).

    `columns` says which column, or which template of columns, stands for one of the names in SHAPES. The first row
    decides on the shape, all others must have it. Raises RowError.
    """
    for record in shaped_records(source, columns, ANSWERS):
        yield row_of(record, record.shape)


def asks(row: Row) -> bool:
    """Whether a row has a prompt that a model can answer."""
    text = row.prompt.strip()
    asked = text or row.messages
    return bool(asked)


def shaped_records(source: SourceName, columns: Columns | None, family: RowFamily) -> Iterator[ShapedRecord]:
    """Stream the records of a source, all of which have the shape of the first one. Raises RowError."""
    shape = None
    name = str(source)
    for number, record in records(name):
        where = f"{source}, row {number}"
        if not isinstance(record, Mapping):
            reject(where, describe_value(record), "an object with named fields")
        given = record
        if columns:
            given = _mapped(columns, record, where)
        if shape is None:
            exact = bool(columns)
            shape = _recognise(given, where, family, exact=exact)
            used = shape.all_columns
            if columns:
                used = set(columns_used(columns))
        if columns:
            learned = shape.columns[-1]
            template = columns[learned]
            _require_answer(template, record, where)
        else:
            _refuse_what_nobody_reads(record, where, family)
        unused = _unused(record, used)
        yield ShapedRecord(shape, number, given, where, unused)
    if shape is None:
        reject(name, "no rows", "at least one")


def columns_used(columns: Columns | None) -> list[str]:
    """The columns of the data that a mapping reads."""
    used: list[str] = []
    if columns:
        for template in columns.values():
            names = names_in(template)
            if not names:
                names = [template]
            used += names
    return used


def _unused(record: DataRecord, used: set[str]) -> ColumnNames:
    """The columns that have a value in a record and are not used."""
    unused = []
    for name, value in record.items():
        if name in used or is_empty(value):
            continue
        printable = str(name).encode(errors="backslashreplace")
        unused.append(printable.decode())
    return tuple(unused)


# From records to rows


def _refuse_what_nobody_reads(record: DataRecord, where: str, family: RowFamily) -> None:
    for name in family.refused:
        value = record.get(name)
        if not is_empty(value):
            field_ = f"{where}, field {name}"
            allowed = "nothing there, as training would not see it; data.columns says which columns to read"
            reject(field_, describe_value(value), allowed)


def _require_answer(template: str, record: DataRecord, where: str) -> None:
    """Raise RowError where a column that makes the answer is empty: what is around it is nothing to learn."""
    for name in names_in(template):
        if is_empty(record[name]):
            reject(f"{where}, field {name}", "nothing", "text, as it makes the answer")


def _mapped(columns: Columns, record: DataRecord, where: str) -> DataRecord:
    """A record under the names of a shape, by the job's `data.columns`."""
    for name in columns_used(columns):
        if name not in record:
            there = ", ".join(map(repr, record))
            allowed = there or "none is there"
            reject(f"{where}, data.columns", f"no column {name!r}", allowed)
    mapped: dict[str, Any] = {}
    for target, template in columns.items():
        if names_in(template):
            mapped[target] = _filled(template, record, where)
        else:
            mapped[target] = record[template]
    return mapped


def _filled(template: str, record: DataRecord, where: str) -> str:
    values = {}
    for name in names_in(template):
        value = record[name]
        field_ = f"{where}, field {name}"
        values[name] = shown_in_template(value, field_)
    return fill_template(template, values)


def _recognise(record: DataRecord, where: str, family: RowFamily, *, exact: bool) -> RowShape:
    """The shape of a record; with `exact`, one that has a use for each of its fields."""
    filled = []
    for name, value in record.items():
        if value is not None:
            filled.append(name)
    shape = family.with_columns(filled)
    if shape is None:
        shape = family.with_columns(record)
    if shape is None:
        _refuse_shape(record, where, family)
    columns = set(record)
    without_use = columns - shape.all_columns
    if exact and without_use:
        _refuse_shape(record, where, family)
    return shape


def _refuse_shape(record: DataRecord, where: str, family: RowFamily) -> NoReturn:
    names = []
    for name in record:
        printable = str(name).encode("ascii", "backslashreplace")
        names.append(printable.decode())
    fields = ", ".join(names) or "none"
    allowed = f"{family}; or say data.columns"
    reject(where, f"the fields {fields}", allowed)


def row_of(record: ShapedRecord, shape: RowShape) -> Row:
    """The row that a record is in a shape, which need not be the one that it was found to have."""
    fields = record.fields
    where = record.where
    if shape.is_chat:
        (column,) = shape.columns
        turns = messages(column, fields, where)
        return Row(record.number, "", "", turns, record.unused)
    values = _column_values(shape, fields, where)
    prompt = fill_template(shape.prompt, values)
    completion = fill_template(shape.completion, values)
    return Row(record.number, prompt, completion, unused=record.unused)


def _column_values(shape: RowShape, record: DataRecord, where: str) -> dict[str, str]:
    """The text that a shape's templates have for each of its columns."""
    values = {}
    for name in shape.columns:
        value = record.get(name)
        field_ = f"{where}, field {name}"
        values[name] = text_of(value, field_)
    learned = shape.columns[-1]
    answer = values[learned]
    if not answer.strip():
        reject(f"{where}, field {learned}", "empty text", "text that is not empty")
    for name in shape.companions:
        value = record.get(name)
        field_ = f"{where}, field {name}"
        values[name] = _companion(shape, name, value, field_)
    return values


def _companion(shape: RowShape, name: str, value: object, where: str) -> str:
    """What a companion column adds to the prompt: its text in its template, nothing where it is empty."""
    if is_empty(value):
        return ""
    if name == "history":
        value = _history(shape, value, where)
    text = text_of(value, where)
    if not text:
        return ""
    template = shape.companions[name]
    return fill_template(template, {name: text})


def _history(shape: RowShape, value: object, where: str) -> str:
    """Earlier pairs of question and answer, in the shape's own words."""
    allowed = "a list of pairs [question, answer]"
    if not isinstance(value, list):
        reject(where, describe_value(value), allowed)
    pairs = []
    for index, pair in enumerate(value):
        where_pair = f"{where}[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            reject(where_pair, describe_value(pair), allowed)
        question = text_of(pair[0], where_pair)
        answer = text_of(pair[1], where_pair)
        earlier = _earlier(shape, question, answer)
        pairs.append(earlier)
    return "".join(pairs)


def _earlier(shape: RowShape, question: str, answer: str) -> str:
    """An earlier question and its answer as a row of this shape has them, without companions."""
    columns = shape.columns
    asked = columns[0]
    learned = columns[-1]
    values = dict.fromkeys(shape.companions, "")
    values[asked] = question
    values[learned] = answer
    prompt = fill_template(shape.prompt, values)
    completion = fill_template(shape.completion, values)
    return f"{prompt}{completion}\n\n"
