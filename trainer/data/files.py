"""Records of files and hub datasets, read without torch: by `submit` on a laptop, and again by every worker."""

import csv
import gzip
import hashlib
import importlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from runfolder.files import sha256
from runfolder.sources import Hub, file_of, parse

Records = Iterator[tuple[int, Any]]  # a record's number, from 1 (in .jsonl: its line), and the record

_ALLOWED = "a file, cluster:/path, or a hub dataset as owner/name or owner/name:config:split"


class RowError(ValueError):
    """Data that cannot be used; the message is one line: file, row, field, what was found, what is allowed."""


def records(source: str) -> Records:
    """Stream the records of a file, or of a hub dataset (`owner/name`, `owner/name:config:split`).

    Raises RowError.
    """
    found = parse(source)
    if isinstance(found, Hub):
        return _hub(source, found)
    path = found.path
    kind = Path(path.stem).suffix + ".gz" if path.suffix == ".gz" else path.suffix
    if not path.exists():
        reject(source, "no such file", _ALLOWED)
    if kind not in _READERS:
        reject(source, f"the file type {kind or '(none)'}", ", ".join(_READERS))
    return _read(path, _READERS[kind])


def digest(source: str | Path) -> str:
    """The sha256 of a file's bytes, or of the records of a hub dataset."""
    file = file_of(str(source))
    if file is None:
        total = hashlib.sha256()
        for _, record in records(str(source)):
            total.update(repr(record).encode(errors="backslashreplace"))
        return total.hexdigest()
    try:
        return sha256(file)
    except OSError as error:
        _unreadable(str(source), error)


def reject(where: str, found: str, allowed: str) -> NoReturn:
    """Raise a RowError in the one form that all of them have."""
    raise RowError(f"{where}: found {found}, allowed: {allowed}")


def show(value: object) -> str:
    """A value as an error names it: at most 40 characters, and its type."""
    if value is None:
        return "nothing"
    if value == "":
        return "empty text"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _unreadable(source: str, error: Exception) -> NoReturn:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    raise RowError(f"{source}: cannot be read: {reason}") from error


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
                reject(f"{path}, line {number}", f"the byte 0x{line[error.start]:02x}", "text in UTF-8")
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _jsonl(path: Path) -> Records:
    for number, line in _lines(path):
        if line.strip():
            yield number, _parsed(line.rstrip(), f"{path}, row {number}", "one JSON object per line")


def _json(path: Path) -> Records:
    found = _parsed("".join(line for _, line in _lines(path)), str(path), "a list of objects")
    if not isinstance(found, list):
        reject(str(path), show(found), "a list of objects")
    yield from enumerate(found, 1)


def _parsed(text: str, where: str, allowed: str) -> Any:
    """The value of a JSON text; rejects what is no JSON, and what Python's reader does not take."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        reject(where, f"the field {error} twice", "each field once")
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        reject(where, f"invalid JSON ({error.msg} at {place})", allowed)
    except RecursionError:
        reject(where, "JSON that is nested too deeply", allowed)
    except ValueError:  # Python converts no number of more than some thousand digits
        reject(where, f"a number of more than {sys.get_int_max_str_digits()} digits", allowed)


class _Twice(Exception):
    """An object of JSON that has a field twice; its message names the field."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _require_different(names: Sequence[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            reject(where, f"the column {name!r} twice", "each column once")


def _csv(path: Path) -> Records:
    csv.field_size_limit(sys.maxsize)
    number = 0
    try:
        reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
        _require_different(reader.fieldnames or [], str(path))
        for number, record in enumerate(reader, 1):
            if None in record:
                reject(f"{path}, row {number}", "more cells than the header has", "one cell for each column")
            yield number, record
    except csv.Error as error:
        reject(f"{path}, row {number + 1}", f"broken CSV ({error})", "comma-separated cells under a header")


def _parquet(path: Path) -> Records:
    arrow, parquet = _need("pyarrow", path), _need("pyarrow.parquet", path)
    number = 0
    try:
        file = parquet.ParquetFile(path)
        _require_different(file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except RowError:
        raise
    except (arrow.ArrowException, ValueError, OverflowError) as error:  # also what Python has no value for
        _unreadable(f"{path}, behind row {number}" if number else str(path), error)


def _hub(source: str, hub: Hub) -> Records:
    datasets = _need("datasets", source)
    try:
        dataset = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    except Exception as error:  # the hub, the network and the builders each raise their own
        _unreadable(f"{source}: no such file, and as a hub dataset", error)
    yield from enumerate(dataset, 1)


def _need(module: str, source: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "train" if module == "datasets" else "data"
        raise RowError(f"{source}: reading it needs {module.partition('.')[0]}: install fleetune[{extra}]") from error


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl.gz": _jsonl,
    ".json.gz": _json,
    ".csv.gz": _csv,
}
