"""What an API server means by an answer that is no success: its words, and whether another try may be taken."""

import json
import re
from typing import Any

_LATER = frozenset({408, 429, 500, 502, 503, 504})  # statuses of what may succeed a little later
_NOT_READY = (
    "status unknown for quota",
    "no API token found for service account",
    "error looking up service account",
)


def is_worth_a_try(status: int, message: str) -> bool:
    """Whether a request that was refused so may be taken a little later."""
    if status == 0:  # a WebSocket that was not opened
        is_final = re.search(r"(^|Handshake status )4(?!29)\d\d ", message)
        return is_final is None
    if status in _LATER:
        return True
    is_not_ready = any(words in message for words in _NOT_READY)
    return status == 403 and is_not_ready


def message_of(body: str | bytes | None, reason: str) -> str:
    """The message of the Status that a server answered with, in one line; what else the client heard without one."""
    try:
        status = json.loads(body or "")
    except ValueError:
        return _message_of_handshake(reason)
    message = status.get("message") if isinstance(status, dict) else None
    return " ".join(message.split()) if isinstance(message, str) else reason


def wanted_pause(headers: Any) -> float:
    """For how long a server wants no other try, in seconds; 0 where it says nothing."""
    wanted = "0"
    if headers:
        wanted = str(headers.get("Retry-After", "0"))
    return float(wanted) if wanted.isdigit() else 0.0


def _message_of_handshake(reason: str) -> str:
    """What a server says that opens no WebSocket: the message in its answer, or all that the client heard."""
    found = re.search(r'"message": ?("(?:[^"\\]|\\.)*")', reason)
    if not found:
        return reason
    status = re.search(r"status (\d+)", reason)
    return f"{status[1] if status else ''} {json.loads(found[1])}".strip()
