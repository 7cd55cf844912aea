"""Why MLflow does not take what a run reported: an outage, which passes by itself, or what somebody has to fix.

They are told apart by types, codes of SQLite and of the system, and HTTP status; never by what a message says. The
latest trouble of a run lies in RUN_DIR/undelivered.json until its rows have been delivered.
"""

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import InputError
from runfolder.files import Damaged, Record, read_json, write_json
from runfolder.shapes import UNDELIVERED
from runfolder.variables import without_password

_UNDELIVERED_FILE = "undelivered.json"
_REASON_LENGTH = 300  # characters at most
_PASSING_STATUSES = (408, 409, 425, 429, 499)  # of the 4xx: conflicts, limits, and what was given up
_CREDENTIALS = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, as it wants them"
_STATUS_FIXES = {
    401: _CREDENTIALS,
    403: f"get the right to write there, or {_CREDENTIALS}",
    404: "look whether tracking.uri is the address of an MLflow server",
}
_SQLITE_FIXES = {  # by primary result code (https://sqlite.org/rescode.html); others, like a lock, pass
    8: "make the database writable",
    11: "the database is damaged: restore it",
    13: "free some space for the database",
    14: "see to it that the database can be opened and written",
    26: "name an SQLite database",
}
_SYSTEM_FIXES = {
    errno.EACCES: "make that place writable",
    errno.EPERM: "make that place writable",
    errno.EROFS: "make that place writable",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}


class DeliveryRefused(Exception):
    """MLflow cannot take a run as things are; `fix` says what to do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class Trouble:
    """Why nothing is delivered: one line, and what to do where it is `lasting`; else it passes by itself."""

    lasting: bool
    reason: str
    fix: str = ""

    def __str__(self) -> str:
        if self.lasting:
            return f"MLflow refuses: {self.reason}; {self.fix}; then: fleetune compare"
        return f"MLflow does not answer: {self.reason}; what waits is delivered when it does"


def diagnose(error: Exception, uri: str) -> Trouble:
    """What an error of a delivery means."""
    causes = list(_chain(error))
    for cause in reversed(causes):  # the first cause knows best
        fix = _fix_of(cause)
        if fix is not None:
            lasting = bool(fix)
            return Trouble(lasting, _first_line(cause, uri), fix)
    line = _first_line(error, uri)
    if len(causes) == 1 and is_of_mlflow(error) and not _is_server(uri):
        # MLflow's own words about a database that it could read: one of another version of MLflow.
        return Trouble(True, line, "mend what it says, or use the MLflow that made the database")
    if isinstance(error, OSError) or is_of_mlflow(error):
        return Trouble(False, line)
    return Trouble(True, f"{type(error).__name__}: {line}", "this is a bug of Fleetune")


def is_of_mlflow(error: BaseException) -> bool:
    """Whether an error comes from MLflow or from what it keeps its database with."""
    for ancestor in type(error).__mro__:
        package = ancestor.__module__.split(".")[0]
        if package in ("mlflow", "sqlalchemy", "alembic"):
            return True
    return False


def note_trouble(run_dir: Path, trouble: Trouble | None) -> None:
    """Write down for `trouble_of_run` what the trouble is; None: there is none any more."""
    with suppress(OSError):  # of a full disk, say: nothing that matters is lost
        if trouble is None:
            (run_dir / _UNDELIVERED_FILE).unlink(missing_ok=True)
        else:
            record = {"lasting": trouble.lasting, "reason": trouble.reason, "mend": trouble.fix}
            write_json(run_dir / _UNDELIVERED_FILE, record)


def trouble_of_run(run_dir: Path) -> Trouble | None:
    """What keeps the rows of a run from MLflow; None where nothing is known to."""
    path = run_dir / _UNDELIVERED_FILE
    if not path.exists():
        return None
    try:
        record = read_json(path, UNDELIVERED)
    except Damaged:
        return Trouble(True, f"{path} cannot be read", "remove it")
    return trouble_in(record)


def trouble_in(record: Record) -> Trouble:
    """The trouble that a record of it tells of."""
    lasting = record["lasting"]
    reason = record["reason"]
    return Trouble(lasting, reason, record["mend"])


def _fix_of(error: BaseException) -> str | None:
    """How to fix one link of a chain of errors; "" for what passes by itself, None where it does not tell."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return _SQLITE_FIXES.get(code & 0xFF, "")
    if isinstance(error, DeliveryRefused):
        return error.fix
    if isinstance(error, Damaged):
        return "mend that file"
    if isinstance(error, InputError):
        return "install it where the rows are to be delivered from"
    if isinstance(error, ModuleNotFoundError):
        return f"pip install {error.name}"
    if isinstance(error, OSError) and error.errno in _SYSTEM_FIXES:
        return _SYSTEM_FIXES[error.errno]
    if is_of_mlflow(error):
        return _fix_of_status(error)
    return None


def _fix_of_status(error: Any) -> str | None:
    """How to fix what MLflow answers with an HTTP status that blames the client."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    if 400 <= status < 500 and status not in _PASSING_STATUSES:
        return _STATUS_FIXES.get(status, "mend what it says")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, the first cause last."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_server(uri: str) -> bool:
    scheme = urlsplit(uri).scheme
    return scheme in ("http", "https")


def _first_line(error: BaseException, uri: str) -> str:
    """The first line of what an error says, without the password of the URI."""
    text = without_password(str(error), uri)
    lines = text.strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:_REASON_LENGTH]
