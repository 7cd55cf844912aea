"""Passwords in tracking URIs, which may be anywhere but in what others can read.

A URI is public without its password. The whole one lies among the secrets of a run, under `TRACKING_URI`.
"""

import re
from urllib.parse import unquote

from runfolder.job import Job

TRACKING_URI = "tracking.uri"  # the name among the secrets
_HIDDEN = "***"
# scheme://user:PASSWORD@... A password should have its / ? # escaped; SQLAlchemy takes it raw, up to the first @.
# What looks like a port is no password.
_IN_AUTHORITY = re.compile(r"^(?P<before>[\w+.-]+://[^:/@?#]*):(?P<password>[^/?#]*|(?!\d+(?:[/?#]|$))[^@]*)@")
# Database drivers take passwords among their options.
_IN_OPTIONS = re.compile(
    r"(?<=[?&])(?P<name>[\w.-]*(?:pass|pwd|secret|token|odbc_connect)[\w.-]*)=(?P<password>[^&#]*)&?", re.IGNORECASE
)


def public(uri: str) -> str:
    """A URI without its password: what job.yaml, MLflow and reports have."""
    uri = _IN_AUTHORITY.sub(r"\g<before>@", uri)
    uri = _IN_OPTIONS.sub("", uri)
    return uri.rstrip("?&")


def secrets_of(job: Job) -> dict[str, str]:
    """What of a job is secret, by name."""
    uri = job.tracking.uri
    if uri and public(uri) != uri:
        return {TRACKING_URI: uri}
    return {}


def without_secrets(job: Job) -> Job:
    """The job as others may read it."""
    if not secrets_of(job):
        return job
    tracking = job.tracking.model_copy(update={"uri": public(str(job.tracking.uri))})
    return job.model_copy(update={"tracking": tracking})


def without_password(text: str, uri: str) -> str:
    """A text that may quote a URI, or parts of it, with the URI's password hidden."""
    authority = _IN_AUTHORITY.match(uri)
    if authority:
        quoted = authority["password"]
        for password in {quoted, unquote(quoted)} - {""}:
            text = text.replace(f":{password}@", f":{_HIDDEN}@")
    for option in _IN_OPTIONS.finditer(uri):
        name = option["name"]
        password = option["password"]
        text = text.replace(f"{name}={password}", f"{name}={_HIDDEN}")
    return text
