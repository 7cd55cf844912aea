"""Variables of an environment: which of them a process can have, and which are secret, by their name or their value.

What is secret lies in RUN_DIR/secrets.json alone: not in job.yaml, a request, a script, MLflow or a report.
"""

import re
import reprlib
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_VARIABLE = 1 << 17  # bytes of a variable, with its name, on Linux
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_KEY(_ID)?|PRIVATE_KEY)(_|$)",
    re.IGNORECASE,
)
_HIDDEN = "***"
# scheme://user:PASSWORD@... A password should have its / ? # escaped; SQLAlchemy takes it raw, up to the first @.
# What looks like a port is no password.
_IN_AUTHORITY = re.compile(r"^(?P<before>[\w+.-]+://[^:/@?#]*):(?P<password>[^/?#]*|(?!\d+(?:[/?#]|$))[^@]*)@")
# Of a web address a user alone may be a token.
_WEB_USER = re.compile(r"^(?P<before>https?://)(?P<password>[^/?#@]+)?@", re.IGNORECASE)
# Database drivers take passwords among their options, web services their keys.
_IN_OPTIONS = re.compile(
    r"(?<=[?&])(?P<name>[\w.-]*(?:pass|pwd|secret|token|credential|signature|api[_-]?key|access[_-]?key|odbc_connect)"
    r"[\w.-]*)=(?P<password>[^&#]*)&?",
    re.IGNORECASE,
)


def flaw_of_variable(name: str, value: str) -> str | None:
    """Why no process or no shell can have a variable of this name with this value; None where they can."""
    if not _VARIABLE.fullmatch(name):
        return f"{reprlib.repr(name)} is no name of a variable: allowed are letters, digits and _, not a digit first"
    if "\0" in value:
        return f"{name}: its value has a NUL, which no process can have"
    if len(name) + len(value.encode()) >= _LONGEST_VARIABLE - 2:
        return f"{name}: found {len(value):,} characters; allowed: {_LONGEST_VARIABLE - 3:,} bytes with the name"
    return None


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is secret: by its name, or as the address that it holds has a password or a token."""
    if _SECRET_NAME.search(name):
        return True
    return public(value) != value


def public(uri: str) -> str:
    """A URI without its password or token: what job.yaml, MLflow and reports have."""
    uri = _IN_AUTHORITY.sub(r"\g<before>@", uri)
    uri = _WEB_USER.sub(r"\g<before>", uri)
    shown = _IN_OPTIONS.sub("", uri)
    return uri if shown == uri else re.sub(r"[?&]+(?=#|$)", "", shown)


def without_password(text: str, uri: str) -> str:
    """A text that may quote a URI, or parts of it, with the URI's password or token hidden."""
    authority = _IN_AUTHORITY.match(uri)
    if authority:
        quoted = authority["password"]
        for password in {quoted, unquote(quoted)} - {""}:
            text = text.replace(f":{password}@", f":{_HIDDEN}@")
    token = None if authority else _WEB_USER.match(uri)
    if token and token["password"]:
        text = text.replace(f"//{token['password']}@", f"//{_HIDDEN}@")
    for option in _IN_OPTIONS.finditer(uri):
        name = option["name"]
        password = option["password"]
        text = text.replace(f"{name}={password}", f"{name}={_HIDDEN}")
    return text


def split_secrets(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Variables as two parts: those that others may read, and those that are secret."""
    shown: dict[str, str] = {}
    secret: dict[str, str] = {}
    for name, value in variables.items():
        part = secret if is_secret(name, value) else shown
        part[name] = value
    return shown, secret


def _can_be_had(variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        flaw = flaw_of_variable(name, value)
        if flaw:
            raise ValueError(flaw)
    return variables


Variables = Annotated[dict[str, str], AfterValidator(_can_be_had)]  # of a job or a cluster
