"""What every request passes: it is counted, and where nobody needs a key, it must come from this machine."""

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.gateway.refusal import ApiRefusal
from serving.gateway.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Gate:
    """ASGI middleware in front of the routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        status = 499  # where none is sent, the client has gone

        async def noticed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._is_strange(Headers(scope=scope)):
                await refused(STRANGER)(scope, receive, noticed)
            else:
                await self._app(scope, receive, noticed)
        finally:
            self._service.metrics.request(state.get("tenant", ""), status)

    def _is_strange(self, headers: Headers) -> bool:
        """Whether a browser may have sent this for a page of another server, which needs no key for it."""
        if self._service.tenants is not None:
            return False
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return True
        return host_name(host) not in LOOPBACK


STRANGER = ApiRefusal(403, "Host, Origin: allowed: this machine's, as there is no tenants file", "forbidden")


def host_name(host: str) -> str:
    """A Host header without its port."""
    name, _, port = host.rpartition(":")
    if name and port.isdigit():
        return name
    return host


def refused(refusal: ApiRefusal) -> Response:
    """The response that says no."""
    body = refusal.body()
    return JSONResponse(body, refusal.status, refusal.headers())
