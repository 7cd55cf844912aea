"""The HTTP API: OpenAI's routes for models and completions, those for adapters, and what operators look at."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from serving.error import UnknownAdapter
from serving.gateway.adapter_files import FILES_OF_KIND, AdapterFiles
from serving.gateway.answers import OpenAnswers
from serving.gateway.bodies import parsed_chat, parsed_completion
from serving.gateway.body import disconnected, read_body, read_form
from serving.gateway.event_stream import EventStream
from serving.gateway.gate import Gate, refused
from serving.gateway.library import Registered
from serving.gateway.page import PAGE_HEADERS, page_text
from serving.gateway.refusal import ApiRefusal, invalid, unknown_model
from serving.gateway.service import Service
from serving.gateway.tenants import Tenant

Given = TypeVar("Given")
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Gone(Exception):
    """The client has gone before its answer was there."""


class Routes:
    """The handlers of the API."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._reading = asyncio.Lock()

    async def completions(self, request: Request) -> Response:
        """OpenAI's /v1/completions: texts behind prompts."""
        service = self.service
        service.check_open()
        tenant = self._tenant(request)
        body = parsed_completion(await self._body(request))
        answers = await service.complete(tenant, body)
        is_streamed = bool(body.stream)
        return await self._answer(request, answers, is_streamed, body.wants_usage)

    async def chat(self, request: Request) -> Response:
        """OpenAI's /v1/chat/completions: the next turn of a chat."""
        service = self.service
        service.check_open()
        tenant = self._tenant(request)
        body = parsed_chat(await self._body(request))
        answers = await service.chat(tenant, body)
        is_streamed = bool(body.stream)
        return await self._answer(request, answers, is_streamed, body.wants_usage)

    async def models(self, request: Request) -> Response:
        """The base and the adapters that a tenant may use."""
        tenant = self._tenant(request)
        library = self.service.library
        found: list[dict[str, Any]] = []
        if tenant.may_use(library.base_name):
            found.append(self._base())
        for adapter in library.visible(tenant):
            found.append(adapter.to_json())
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """One of them; 404 where there is none, or it is another's."""
        tenant = self._tenant(request)
        adapter = self.service.library.find(tenant, request.path_params["name"])
        if adapter is None:
            return JSONResponse(self._base())
        return JSONResponse(adapter.to_json())

    async def bring(self, request: Request) -> Response:
        """Register an adapter: a form with its name, its config and its weights as safetensors."""
        self.service.check_open()
        tenant = self._tenant(request)
        if not tenant.uploads:  # before anything of it is read
            raise ApiRefusal(403, "adapters: allowed: none of your own", "too_many")
        with self.service.account(tenant).uploading():
            adapter = await self._brought(request, tenant)
        return JSONResponse(adapter.to_json(), 201)

    async def forget(self, request: Request) -> Response:
        """Forget an adapter of one's own; requests that are under way are answered still."""
        service = self.service
        tenant = self._tenant(request)
        name = request.path_params["name"]
        adapter = await service.library.forget(tenant, name)
        service.metrics.forget(adapter.owner, adapter.name)
        return JSONResponse({"id": adapter.name, "object": "model", "deleted": True})

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        """200 while requests are answered, 503 otherwise."""
        self.service.check_open()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """What Prometheus reads; for operators."""
        tenant = self._tenant(request)
        if not tenant.operator:
            raise ApiRefusal(403, "metrics: allowed: keys of operators", "forbidden")
        residency = await self.service.library.residency()
        return Response(self.service.metrics.text(residency), media_type=PROMETHEUS)

    async def page(self, request: Request) -> Response:  # noqa: ARG002
        """A page to try adapters side by side."""
        return HTMLResponse(page_text(), headers=PAGE_HEADERS)

    async def _brought(self, request: Request, tenant: Tenant) -> Registered:
        """The adapter of a form, which is registered; raises ApiRefusal."""
        allowed = self.service.allowed
        form = await read_form(request, allowed.upload_bytes, allowed.upload_s)
        try:
            name, config, weights = form.get("name"), form.get("config"), form.get("weights")
            if not isinstance(name, str):
                raise invalid("name: found none; allowed: a form with name, config and weights")
            if not isinstance(config, UploadFile) or not isinstance(weights, UploadFile):
                raise invalid("config, weights: allowed: two files, a config and its safetensors")
            config_name = config.filename or ""
            if config_name not in FILES_OF_KIND:
                known = ", ".join(FILES_OF_KIND)
                raise invalid(f"config: found a file of another name; allowed: {known}")
            async with self._reading:  # one at a time in memory; until then they lie on disk
                files = AdapterFiles(config_name, await config.read(), await weights.read())
                return await self.service.library.bring(tenant, name, files)
        finally:
            await form.close()

    def _tenant(self, request: Request) -> Tenant:
        """Whose a request is; raises ApiRefusal."""
        tenant = self.service.tenant_of(request.headers.get("authorization"))
        request.state.tenant = tenant.name
        return tenant

    async def _body(self, request: Request) -> bytes:
        """The body of a request, within what is allowed."""
        allowed = self.service.allowed
        return await read_body(request, allowed.body_bytes, allowed.body_s)

    async def _answer(self, request: Request, answers: OpenAnswers, streams: bool, wants_usage: bool) -> Response:
        """The reply to a completion, whole or as a stream."""
        if streams:
            return EventStream(answers, wants_usage, self.service.allowed.stalled_s)
        try:
            return JSONResponse(await while_there(request, answers.whole()))
        finally:
            answers.close()

    def _base(self) -> dict[str, Any]:
        """The base as an entry of /v1/models."""
        library = self.service.library
        return {"id": library.base_name, "object": "model", "created": library.created, "owned_by": "base"}


async def while_there(request: Request, answer: Coroutine[Any, Any, Given]) -> Given:
    """What a coroutine gives, which is cancelled when the client goes; raises Gone then."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def create_app(service: Service) -> FastAPI:
    """The application that answers for a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.answering.start()
        settling = asyncio.ensure_future(service.settle_on())
        yield
        settling.cancel()
        with suppress(asyncio.CancelledError):
            await settling
        await asyncio.to_thread(service.answering.stop)

    app = FastAPI(title="Fleetune", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    routes = Routes(service)
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", routes.model, methods=["GET"])
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"])
    app.add_api_route("/v1/adapters", routes.bring, methods=["POST"])
    app.add_api_route("/v1/adapters/{name}", routes.forget, methods=["DELETE"])
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_api_route("/", routes.page, methods=["GET"])
    app.add_middleware(Gate, service=service)
    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    """Give every error the shape that OpenAI's clients read."""

    async def on_refusal(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiRefusal)
        return refused(error)

    async def on_unknown(_: Request, error: Exception) -> Response:  # noqa: ARG001
        return refused(unknown_model(""))

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        refusal = ApiRefusal(error.status_code, message, "not_found")
        return refused(refusal)

    async def on_gone(_: Request, error: Exception) -> Response:  # noqa: ARG001
        return Response(status_code=499)  # nobody reads it; metrics count it

    async def on_bug(_: Request, error: Exception) -> Response:  # noqa: ARG001
        return refused(ApiRefusal(500, "something went wrong here; the log says what", "internal_error"))

    app.add_exception_handler(ApiRefusal, on_refusal)
    app.add_exception_handler(UnknownAdapter, on_unknown)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Gone, on_gone)
    app.add_exception_handler(Exception, on_bug)
