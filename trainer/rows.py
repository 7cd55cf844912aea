"""Rows of data, read and checked without torch: by `submit` on a laptop, and again by every worker."""

import csv
import gzip
import hashlib
import importlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

Message = dict[str, str]
Records = Iterator[tuple[int, Any]]

ROLES = ("system", "user", "assistant")
_HUB_ID = re.compile(r"([\w.-]+)/[\w.-]+(:.*)?")


class RowError(ValueError):
    """Data that cannot be used; the message is one line: file, row, field, what was found, what is allowed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a prompt (empty for plain text) and the completion that is learned, or the turns of a chat.

    `number` counts from 1; in .jsonl it is the number of the line.
    """

    number: int
    prompt: str
    completion: str
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Shape:
    """Fields of a row, the learned one last, and the templates that make prompt and completion of them.

    An optional field enters by a template of its own, and leaves nothing where a row has none.
    """

    fields: tuple[str, ...]
    prompt: str
    completion: str
    optional: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "/".join(self.fields) + "".join(f" (and {name})" for name in self.optional)


SHAPES = (
    Shape(("messages",), "", ""),
    Shape(("prompt", "completion"), "{prompt}", "{completion}"),
    Shape(("question", "answer"), "Question: {question}\nAnswer:", " {answer}"),
    Shape(
        ("instruction", "output"),
        "Instruction: {instruction}\n{input}Response:",
        " {output}",
        {"input": "Input: {input}\n"},
    ),
    Shape(("text",), "", "{text}"),
)


def rows(source: str | Path) -> Iterator[Row]:
    """Stream the rows of a file, or of a hub dataset (`owner/name`, `owner/name:config:split`).

    The first row decides on the shape, all others must have it. Raises RowError.
    """
    shape = None
    for number, record in _records(str(source)):
        where = f"{source}, row {number}"
        if not isinstance(record, Mapping):
            _reject(where, _show(record), "an object with named fields")
        shape = shape or _recognise(record, where)
        yield _row(shape, number, record, where)
    if shape is None:
        _reject(str(source), "no rows", "at least one")


def check(source: str | Path) -> int:
    """Read all rows and return their number; raises RowError at the first that cannot be used."""
    return sum(1 for _ in rows(source))


def digest(source: str | Path) -> str:
    """The sha256 of a file's bytes, or of the rows of a hub dataset."""
    if _is_hub(str(source)):
        total = hashlib.sha256()
        for row in rows(source):
            total.update(repr(row).encode())
        return total.hexdigest()
    try:
        with Path(source).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _unreadable(str(source), error)


def _reject(where: str, found: str, allowed: str) -> NoReturn:
    raise RowError(f"{where}: found {found}, allowed: {allowed}")


def _unreadable(source: str, error: Exception) -> NoReturn:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    raise RowError(f"{source}: cannot be read: {reason}") from error


def _show(value: object) -> str:
    if value is None:
        return "nothing"
    if value == "":
        return "empty text"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


# From fields to rows


def _recognise(record: Mapping[str, Any], where: str) -> Shape:
    for shape in SHAPES:
        if all(name in record for name in shape.fields):
            return shape
    found = ", ".join(map(str, record)) or "none"
    _reject(where, f"the fields {found}", " | ".join(map(str, SHAPES)))


def _row(shape: Shape, number: int, record: Mapping[str, Any], where: str) -> Row:
    if shape.fields == ("messages",):
        return Row(number, "", "", _messages(record.get("messages"), where))
    values = {name: _text(record.get(name), f"{where}, field {name}") for name in shape.fields}
    learned = shape.fields[-1]
    if not values[learned].strip():
        _reject(f"{where}, field {learned}", "empty text", "text that is not empty")
    for name, template in shape.optional.items():
        given = _text("" if record.get(name) is None else record[name], f"{where}, field {name}")
        values[name] = template.format_map({name: given}) if given else ""
    return Row(number, shape.prompt.format_map(values), shape.completion.format_map(values))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        _reject(where, _show(value), "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        _reject(where, "half of a surrogate pair", "text that can be written as UTF-8")
    return value


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _reject(f"{where}, field messages", _show(value), "a list of {role, content}")
    turns = tuple(_message(turn, f"{where}, field messages[{index}]") for index, turn in enumerate(value))
    if turns[0]["role"] == "assistant":
        _reject(f"{where}, field messages[0].role", _show("assistant"), "system, user: somebody asks first")
    if not any(turn["role"] == "assistant" for turn in turns):
        _reject(f"{where}, field messages", "no assistant turn", "at least one, as it is what is learned")
    return turns


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        _reject(where, _show(turn), "an object {role, content}")
    if unknown := [str(key) for key, value in turn.items() if key not in ("role", "content") and value is not None]:
        _reject(where, f"the fields {', '.join(unknown)}", "role, content")
    role, content = turn.get("role"), _text(turn.get("content"), f"{where}.content")
    if role not in ROLES:
        _reject(f"{where}.role", _show(role), ", ".join(ROLES))
    if role == "assistant" and not content.strip():
        _reject(f"{where}.content", "empty text", "text that is not empty")
    return {"role": role, "content": content}


# From sources to fields


def _records(source: str) -> Records:
    if _is_hub(source):
        return _hub(source)
    path = Path(source)
    kind = Path(path.stem).suffix + ".gz" if path.suffix == ".gz" else path.suffix
    if not path.exists():
        _reject(source, "no such file", "a file, or a hub dataset as owner/name or owner/name:config:split")
    if kind not in _READERS:
        _reject(source, f"the file type {kind or '(none)'}", ", ".join(_READERS))
    return _read(path, _READERS[kind])


def _is_hub(source: str) -> bool:
    """An id looks like a relative path; it is one if its first folder or the whole path is there."""
    match = _HUB_ID.fullmatch(source)
    return match is not None and not Path(source).exists() and not Path(match[1]).is_dir()


def _read(path: Path, reader: Callable[[Path], Records]) -> Records:
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:  # also a file that is gzipped badly or in part
        _unreadable(str(path), error)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                _reject(f"{path}, line {number}", f"the byte 0x{line[error.start]:02x}", "text in UTF-8")
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _jsonl(path: Path) -> Records:
    for number, line in _lines(path):
        if line.strip():
            try:
                record = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                found = f"invalid JSON ({error.msg} at column {error.colno})"
                _reject(f"{path}, row {number}", found, "one JSON object per line")
            yield number, record


def _json(path: Path) -> Records:
    try:
        records = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        _reject(str(path), f"invalid JSON ({error})", "a list of objects")
    if not isinstance(records, list):
        _reject(str(path), _show(records), "a list of objects")
    yield from enumerate(records, 1)


def _csv(path: Path) -> Records:
    csv.field_size_limit(sys.maxsize)
    number = 0
    try:
        reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
        for number, record in enumerate(reader, 1):
            if None in record:
                _reject(f"{path}, row {number}", "more cells than the header has", "one cell for each column")
            yield number, record
    except csv.Error as error:
        _reject(f"{path}, row {number + 1}", f"broken CSV ({error})", "comma-separated cells under a header")


def _parquet(path: Path) -> Records:
    arrow, parquet = _need("pyarrow", path), _need("pyarrow.parquet", path)
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except arrow.ArrowException as error:
        _unreadable(str(path), error)


def _hub(source: str) -> Records:
    name, config, split = [*source.split(":", 2), "", ""][:3]
    datasets = _need("datasets", source)
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub, the network and the builders each raise their own
        _unreadable(f"{source}: no such file, and as a hub dataset", error)
    yield from enumerate(dataset, 1)


def _need(module: str, source: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RowError(f"{source}: reading it needs {module.partition('.')[0]}: install fleetune[train]") from error


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl.gz": _jsonl,
    ".json.gz": _json,
    ".csv.gz": _csv,
}
