"""Bodies of requests, within bounds of size and time."""

import asyncio

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.types import Message, Receive

from serving.gateway.refusal import ApiRefusal

FORM_FIELDS = 4
FIELD_BYTES = 4096


async def read_body(request: Request, limit: int, patience_s: float) -> bytes:
    """All bytes of a body; raises ApiRefusal where it is too long, or does not come."""
    bounded = _bounded(request, limit)
    try:
        async with asyncio.timeout(patience_s):
            return await bounded.body()
    except TimeoutError as error:
        raise _too_slow(patience_s) from error


async def read_form(request: Request, limit: int, patience_s: float) -> FormData:
    """A form with files, which lie on disk where they are large; raises ApiRefusal."""
    bounded = _bounded(request, limit)
    try:
        async with asyncio.timeout(patience_s):
            return await bounded.form(max_files=FORM_FIELDS, max_fields=FORM_FIELDS, max_part_size=FIELD_BYTES)
    except TimeoutError as error:
        raise _too_slow(patience_s) from error


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone; its body must have been read."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


def _bounded(request: Request, limit: int) -> Request:
    """The same request, whose body may have so many bytes."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_long(limit)
    return Request(request.scope, _bounded_receive(request.receive, limit))


def _bounded_receive(receive: Receive, limit: int) -> Receive:
    """Hands on what comes, up to so many bytes."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_long(limit)
        return message

    return bounded


def _too_long(limit: int) -> ApiRefusal:
    return ApiRefusal(413, f"body: found more than {limit} bytes, which are allowed", "body_too_large")


def _too_slow(patience_s: float) -> ApiRefusal:
    allowed = f"{patience_s:.0f} s until it is there"
    return ApiRefusal(408, f"body: allowed: {allowed}", "body_too_slow")
