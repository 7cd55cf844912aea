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
from runfolder.sources import HubDataset, StageOutput, file_of, parse_source

SourceName = str | Path  # a file or a hub dataset, as a job names it
Records = Iterator[tuple[int, Any]]  # a record's number, from 1 (in .jsonl: its line), and the record
RecordReader = Callable[[Path], Records]

_ALLOWED_SOURCES = "a file, cluster:/path, or a hub dataset as owner/name or owner/name:config:split"


class RowError(ValueError):
    """Data that cannot be used; the message is one line: file, row, field, what was found, what is allowed."""


def records(source: str) -> Records:
    """Stream the records of a file, or of a hub dataset (`owner/name`, `owner/name:config:split`).

    Raises RowError.
    """
    parsed = parse_source(source)
    if isinstance(parsed, HubDataset):
        return _hub_records(source, parsed)
    if isinstance(parsed, StageOutput):
        reject(source, "the output of a stage", _ALLOWED_SOURCES)
    path = parsed.path
    file_type = path.suffix
    if file_type == ".gz":
        file_type = Path(path.stem).suffix + ".gz"
    if not path.exists():
        reject(source, "no such file", _ALLOWED_SOURCES)
    if file_type not in _READERS:
        allowed = ", ".join(_READERS)
        reject(source, f"the file type {file_type or '(none)'}", allowed)
    return _read_records(path, _READERS[file_type])


def digest(source: SourceName) -> str:
    """The sha256 of a file's bytes, or of the records of a hub dataset."""
    file = file_of(str(source))
    if file is None:
        return _digest_of_records(str(source))
    try:
        return sha256(file)
    except OSError as error:
        _unreadable(str(source), error)


def _digest_of_records(source: str) -> str:
    digest_of_all = hashlib.sha256()
    for _, record in records(source):
        text = repr(record)
        digest_of_all.update(text.encode(errors="backslashreplace"))
    return digest_of_all.hexdigest()


def reject(where: str, found: str, allowed: str) -> NoReturn:
    """Raise a RowError in the one form that all of them have."""
    message = f"{where}: found {found}, allowed: {allowed}"
    raise RowError(message)


def describe_value(value: object) -> str:
    """A value as an error names it: at most 40 characters, and its type."""
    if value is None:
        return "nothing"
    if value == "":
        return "empty text"
    text = repr(value)
    if len(text) > 40:
        text = text[:37] + "..."
    return f"{text} ({type(value).__name__})"


def _unreadable(source: str, error: Exception) -> NoReturn:
    """Raise a RowError with the reason that an error gives: the system's, its first line, or its type."""
    reason = getattr(error, "strerror", None)
    if not reason:
        kind = type(error).__name__
        lines = str(error).splitlines() or [kind]
        reason = lines[0]
    raise RowError(f"{source}: cannot be read: {reason}") from error


def _read_records(path: Path, reader: RecordReader) -> Records:
    """Stream the records of a file by the reader of its type."""
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:  # also a file that is gzipped badly or in part
        _unreadable(str(path), error)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Stream the lines of a text file, gzipped or not, and their numbers from 1."""
    is_gzipped = path.suffix == ".gz"
    with gzip.open(path) if is_gzipped else path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                where = f"{path}, line {number}"
                reject(where, f"the byte 0x{byte:02x}", "text in UTF-8")
            if number == 1:
                text = text.removeprefix("\ufeff")
            yield number, text


def _jsonl(path: Path) -> Records:
    for number, line in _numbered_lines(path):
        if line.strip():
            where = f"{path}, row {number}"
            yield number, _parse_json(line.rstrip(), where, "one JSON object per line")


def _json(path: Path) -> Records:
    where = str(path)
    allowed = "a list of objects"
    lines = [line for _, line in _numbered_lines(path)]
    text = "".join(lines)
    value = _parse_json(text, where, allowed)
    if not isinstance(value, list):
        reject(where, describe_value(value), allowed)
    yield from enumerate(value, 1)


def _parse_json(text: str, where: str, allowed: str) -> Any:
    """The value of a JSON text; rejects what is no JSON, and what Python's reader does not take."""
    try:
        return json.loads(text, object_pairs_hook=_unique_fields)
    except _Twice as error:
        reject(where, f"the field {error} twice", "each field once")
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if error.lineno > 1:
            place = f"line {error.lineno}, {place}"
        reject(where, f"invalid JSON ({error.msg} at {place})", allowed)
    except RecursionError:
        reject(where, "JSON that is nested too deeply", allowed)
    except ValueError:  # Python converts no number of more than some thousand digits
        digits = sys.get_int_max_str_digits()
        reject(where, f"a number of more than {digits} digits", allowed)


class _Twice(Exception):
    """An object of JSON that has a field twice; its message names the field."""


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON from its fields; raises _Twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = []
        for name, _ in pairs:
            names.append(name)
        repeated = repr(_first_repeated(names))
        raise _Twice(repeated)
    return fields


def _first_repeated(names: Sequence[str]) -> str | None:
    for name in names:
        if names.count(name) > 1:
            return name
    return None


def _require_different(names: Sequence[str], where: str) -> None:
    repeated = _first_repeated(names)
    if repeated is not None:
        reject(where, f"the column {repeated!r} twice", "each column once")


def _csv(path: Path) -> Records:
    csv.field_size_limit(sys.maxsize)
    number = 0
    try:
        lines = (line for _, line in _numbered_lines(path))
        reader = csv.DictReader(lines, strict=True)
        columns = reader.fieldnames or []
        _require_different(columns, str(path))
        for number, record in enumerate(reader, 1):
            if None in record:
                reject(f"{path}, row {number}", "more cells than the header has", "one cell for each column")
            yield number, record
    except csv.Error as error:
        where = f"{path}, row {number + 1}"
        reject(where, f"broken CSV ({error})", "comma-separated cells under a header")


def _parquet(path: Path) -> Records:
    arrow = _need("pyarrow", path)
    parquet = _need("pyarrow.parquet", path)
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
        where = str(path)
        if number:
            where = f"{path}, behind row {number}"
        _unreadable(where, error)


def _hub_records(source: str, hub: HubDataset) -> Records:
    datasets = _need("datasets", source)
    try:
        split = hub.split
        dataset = datasets.load_dataset(hub.name, hub.config, split=split)
    except Exception as error:  # the hub, the network and the builders each raise their own
        _unreadable(f"{source}: no such file, and as a hub dataset", error)
    yield from enumerate(dataset, 1)


def _need(module: str, source: SourceName) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "data"
        if module == "datasets":
            extra = "train"
        package, _, _ = module.partition(".")
        raise RowError(f"{source}: reading it needs {package}: install fleetune[{extra}]") from error


_READERS: dict[str, RecordReader] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl.gz": _jsonl,
    ".json.gz": _json,
    ".csv.gz": _csv,
}
