"""The door of the server: who may come in, how often, and with how much.

Invariants: no route is reached past this door; a body is read here, whole, within a size and a time; what is kept per client is
bounded; tokens are compared in constant time; a client behind the loopback must call the server by a loopback name, so no web page
can reach it through a name it controls.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from envs.serve.config import ServeConfig, is_loopback
from envs.serve.wire import HttpError, error_response
from retrieval.errors import RetrievalError

_MAX_CLIENTS = 10_000
_MIN_TOKEN = 16
OPEN_PATHS = frozenset({"/healthz"})
"""Served without a token: whoever watches the server need not hold one."""


def token_of(config: ServeConfig) -> str:
    """The token clients must send; empty on loopback without one. Raises RetrievalError where one is needed and missing."""
    token = os.environ.get(config.token_env, "").strip() if config.token_env else ""
    if token and (len(token) < _MIN_TOKEN or not token.isascii()):
        raise RetrievalError(
            f"the token in {config.token_env} is too weak; take at least {_MIN_TOKEN} letters and digits"
        )
    if not token and not config.loopback:
        raise RetrievalError(
            f"serving on {config.host} needs a token: set {config.token_env or 'serve.token_env'} in the environment, or serve on 127.0.0.1"
        )
    return token


class Buckets:
    """Token buckets by client; the ones unused for longest are forgotten first."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """0 when the client may go on, else in how many seconds it may."""
        if not self._per_s:
            return 0.0
        now = self._clock()
        level, since = self._levels.pop(client, (float(self._burst), now))
        level = min(float(self._burst), level + (now - since) * self._per_s)
        wait_s = 0.0 if level >= 1 else (1 - level) / self._per_s
        self._levels[client] = (level - (not wait_s), now)
        if len(self._levels) > _MAX_CLIENTS:
            self._levels.popitem(last=False)
        return wait_s


class Door:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, config: ServeConfig, paths: Collection[str]) -> None:
        self._app, self._config, self._paths = app, config, frozenset(paths)
        self._token = token_of(config).encode()
        self._buckets = Buckets(config.requests_per_s, config.burst)
        self.in_flight = 0
        self.counts: Counter[tuple[str, int]] = Counter()
        """Answers by route and status."""

    @property
    def needs_token(self) -> bool:
        return bool(self._token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, started = scope["path"], False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.counts[path if path in self._paths else "other", message["status"]] += 1
            await send(message)

        self.in_flight += 1
        try:
            self._admit(scope)
            await self._app(scope, await self._read(scope, receive), counted)
        except Exception as error:
            response = error_response(error, path)  # logs what nobody foresaw
            if not started:
                await response(scope, receive, counted)
        finally:
            self.in_flight -= 1

    def _admit(self, scope: Scope) -> None:
        headers, config = Headers(scope=scope), self._config
        client = scope.get("client")
        wait_s = self._buckets.take(client[0] if client else "")
        if wait_s:
            after = math.ceil(wait_s)
            raise HttpError(429, "TooManyRequests", f"too many requests; come back in {after} s", retry_after_s=after)
        if self.in_flight > config.max_in_flight:
            raise HttpError(
                503, "Overloaded", f"{config.max_in_flight} requests are at work, as many as allowed", retry_after_s=1
            )
        if self._token and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
            if scheme.lower() != "bearer" or not right:
                raise HttpError(401, "Unauthorized", "send the server's token as `Authorization: Bearer TOKEN`")
        elif not self._token and not is_loopback(_name(headers.get("host", ""))):
            raise HttpError(403, "Forbidden", "this server answers to 127.0.0.1, ::1 and localhost only")

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the whole body at once."""
        most = self._config.max_body_bytes
        told = Headers(scope=scope).get("content-length", "0")
        if not (told.isascii() and told.isdigit() and len(told) < 16 and int(told) <= most):
            raise _too_long(most)
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._config.read_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > most:
                        raise _too_long(most)
        except TimeoutError:
            raise HttpError(408, "RequestTimeout", "the body did not arrive in time") from None
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay


def _too_long(most: int) -> HttpError:
    return HttpError(413, "PayloadTooLarge", f"the body is too long; at most {most} bytes are taken")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
