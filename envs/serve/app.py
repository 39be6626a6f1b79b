"""The server: thin protocols over one search service, so that other trainers can use a corpus of ours.

Starlette and jsonschema rather than FastAPI: both come with the `mcp` package anyway, and each route's one schema then checks its
requests, is shown at `/openapi.json`, and reads the same in both. Invariants: protocols know nothing of each other; `/healthz` is
green only after a search of its own has succeeded; the app owns the backend it is given and closes it when it shuts down.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agents.interfaces import Backend
from envs.serve.config import ServeConfig
from envs.serve.limits import Door
from envs.serve.mcp_tools import mcp_server
from envs.serve.openapi import describe
from envs.serve.retrieve import endpoints
from envs.serve.sessions import Sessions, endpoint
from envs.serve.wire import HttpError, as_http, error_response, json_response
from retrieval.service import SearchService

_CHECK_S = 10.0
_PAID_EVERY_S = 3600.0
"""How long a good outcome stands where each search is paid for."""


def make_app(backend: Backend, config: ServeConfig | None = None) -> ASGIApp:
    """The ASGI app over a backend or a SearchService. Raises RetrievalError where a token is needed and missing."""
    config = config or ServeConfig()
    service = backend if isinstance(backend, SearchService) else SearchService(backend)
    sessions = Sessions(service, config)
    posts = [*endpoints(service, config), endpoint(sessions)]
    health = Health(service, config.health_every_s)
    manager = StreamableHTTPSessionManager(
        mcp_server(service, config), stateless=True, json_response=True, max_request_body_size=config.max_body_bytes
    )

    async def healthz(request: Request) -> Response:
        await health.check()
        info = service.info()
        return json_response({"status": "ok", "backend": info.name, "documents": info.num_docs, "fingerprint": info.fingerprint})  # fmt: skip

    async def metrics(request: Request) -> Response:
        now = {**service.stats(), "http_in_flight": door.in_flight, "sessions": len(sessions)}
        return PlainTextResponse(prometheus(now, door.counts), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return json_response(description)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            async with manager.run():
                yield
        finally:
            await service.close()

    gets = {"/healthz": healthz, "/metrics": metrics, "/openapi.json": openapi}
    limit_s = config.request_timeout_s
    routes = [Route(p.path, _safe(p, service, limit_s), methods=["POST"]) for p in posts]
    routes += [Route(path, _safe(answer, service, limit_s), methods=["GET"]) for path, answer in gets.items()]
    routes.append(Route("/mcp", _Mcp(manager), methods=["POST"]))  # without sessions there is nothing to GET
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _refuse})
    app.router.redirect_slashes = False
    door = Door(app, config, [route.path for route in routes])
    description = describe(posts, needs_token=door.needs_token)
    return door


class Health:
    """Whether search works, by a query of its own; many who ask at once share one."""

    def __init__(self, service: SearchService, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._service, self._every_s, self._clock = service, every_s, clock
        self._until, self._fault = -1.0, ""
        self._lock = asyncio.Lock()

    async def check(self) -> None:
        """Raises HttpError 503 while search does not work."""
        async with self._lock:
            if self._clock() >= self._until:
                self._fault, every_s = "", self._every_s
                try:
                    await asyncio.wait_for(self._service.check(), _CHECK_S)
                    if "live" in self._service.info().capabilities:
                        every_s = max(every_s, _PAID_EVERY_S)
                except Exception as error:
                    self._fault = f"a search failed: {as_http(error).message}"
                self._until = self._clock() + every_s
        if self._fault:
            raise HttpError(503, "Unhealthy", self._fault, retry_after_s=1)


def prometheus(figures: Mapping[str, Any], answers: Mapping[tuple[str, int], int]) -> str:
    """Figures in Prometheus' text form."""
    lines = [
        f"gumshoe_{re.sub(r'[^a-zA-Z0-9_]', '_', name)} {value:.15g}"
        for name, value in sorted(figures.items())
        if isinstance(value, (int, float))
    ]
    lines.append("# TYPE gumshoe_http_answers_total counter")
    lines += [
        f'gumshoe_http_answers_total{{route="{route}",status="{status}"}} {count}'
        for (route, status), count in sorted(answers.items())
    ]
    return "\n".join(lines) + "\n"


class _Mcp:
    """The manager as an ASGI app."""

    def __init__(self, manager: StreamableHTTPSessionManager) -> None:
        self._manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._manager.handle_request(scope, receive, send)


def _safe(answer: Callable[[Request], Any], service: SearchService, limit_s: float) -> Callable[[Request], Any]:
    """Errors, a spent time limit too, become typed answers; good answers name the index they come from, so that a client's
    caches never mix two."""

    async def safe(request: Request) -> Response:
        try:
            async with asyncio.timeout(limit_s):
                response: Response = await answer(request)
        except Exception as error:
            return error_response(error, request.url.path)
        info = service.info()
        response.headers.update({"x-index-fingerprint": info.fingerprint, "x-index-documents": str(info.num_docs)})
        return response

    return safe


async def _refuse(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    type_, line = {
        404: ("NotFound", f"there is no route {request.url.path[:200]}"),
        405: ("MethodNotAllowed", f"{request.url.path[:200]} has no method {request.method[:20]}"),
    }.get(status, ("HttpError", str(getattr(error, "detail", "the request was refused"))[:200]))
    response = error_response(HttpError(status, type_, line), request.url.path)
    response.headers.update(getattr(error, "headers", None) or {})
    return response
