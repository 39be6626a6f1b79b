"""Asks HTTP services for JSON: with retries, a deadline, a bound on requests at once, and a bound on what is read of an answer.

Invariants: only failures that may pass (no connection, 429, 5xx) are tried again, after what `Retry-After` asks for and no sooner
than the back-off; every failure is a one-line error that names the service and never a key.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from retrieval.deadline import seconds_left
from retrieval.errors import Closed, DeadlineExceeded, Overloaded, RetrievalError


@dataclass
class HttpConfig:
    """How long, how often and how much to ask a service."""

    timeout_s: float = 30.0
    """Longest single try."""
    deadline_s: float = 90.0
    """Longest request, all tries together."""
    retries: int = 4
    """Further tries after one that failed."""
    backoff_s: float = 0.25
    """Pause before the first further try; doubles each time."""
    concurrency: int = 16
    """Requests at once."""
    max_bytes: int = 64 * 2**20
    """Longest answer that is read, unpacked."""


@dataclass(frozen=True)
class Reply:
    """An answer that is no passing failure."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300


class Asker:
    """Follows the event loop it is called from; a new loop gets new connections."""

    def __init__(
        self, config: HttpConfig, *, headers: Mapping[str, str] | None = None, local: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        """`local`: a proxy for the outside must not catch these requests."""
        self._config, self._headers, self._local, self._transport = config, headers, local, transport
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(config.concurrency)
        self._closed = False

    async def ask(self, where: str, method: str, url: str, **sent: Any) -> Reply:
        """The reply; `where` names the service in errors. Raises Closed, Overloaded, DeadlineExceeded, RetrievalError."""
        self.check_open()
        if "json" in sent:  # httpx would fail on half characters
            sent["content"] = json.dumps(sent.pop("json"), ensure_ascii=False).encode("utf-8", "replace")
            sent["headers"] = {"content-type": "application/json", **sent.get("headers", {})}
        p, error = self._config, RetrievalError(f"{where} was not asked")
        limit_s = seconds_left(p.deadline_s)
        try:
            async with asyncio.timeout(limit_s):
                for attempt in range(p.retries + 1):
                    wait_s = 0.0
                    try:
                        reply = await self._try(where, method, url, sent)
                        if reply.status != 429 and reply.status < 500:
                            return reply
                        kind = Overloaded if reply.status in (429, 503) else RetrievalError
                        error = kind(f"{where} answers {reply.status}{said(reply.content)}")
                        after = reply.headers.get("retry-after", "")
                        wait_s = float(after) if after.isascii() and after.isdigit() and len(after) < 5 else 0.0
                    except (httpx.TimeoutException, TimeoutError):
                        error = DeadlineExceeded(f"{where} gave no answer in {p.timeout_s:g} s")
                    except (httpx.HTTPError, httpx.InvalidURL) as failure:
                        error = RetrievalError(f"{where} cannot be reached ({type(failure).__name__}); is it running?")
                    if attempt < p.retries:
                        await asyncio.sleep(max(wait_s, p.backoff_s * 2**attempt * random.uniform(0.5, 1.0)))
        except TimeoutError:
            raise DeadlineExceeded(f"{where} gave no answer in {limit_s:.3g} s ({error})") from None
        raise error

    def check_open(self) -> None:
        """Raises Closed after `close`."""
        if self._closed:
            raise Closed("the backend is closed")

    async def close(self) -> None:
        self._closed = True
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = self._loop = None

    async def _try(self, where: str, method: str, url: str, sent: Mapping[str, Any]) -> Reply:
        client, most = self._http(), self._config.max_bytes
        async with (
            self._slots,
            asyncio.timeout(self._config.timeout_s),
            client.stream(method, url, **sent) as response,
        ):
            content = bytearray()
            async for piece in response.aiter_bytes(64 * 1024):
                content += piece
                if len(content) > most:
                    raise RetrievalError(f"{where} answers with more than {most} bytes")
            return Reply(response.status_code, response.headers, bytes(content))

    def _http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._loop, self._slots = loop, asyncio.Semaphore(self._config.concurrency)
            self._client = httpx.AsyncClient(
                headers={"accept-encoding": "gzip, identity", **(self._headers or {})}, transport=self._transport,
                timeout=httpx.Timeout(self._config.timeout_s, pool=None), trust_env=not self._local,
                limits=httpx.Limits(max_connections=self._config.concurrency),
            )  # fmt: skip
        return self._client


def json_of(where: str, reply: Reply) -> Any:
    """The value a reply holds; half characters (lone surrogates) in it become question marks. Raises RetrievalError."""
    try:
        value = json.loads(reply.content)
        if b"\\ud" in reply.content.lower():
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return value
    except (ValueError, RecursionError):
        raise RetrievalError(f"{where} answers with something that is not JSON") from None


def said(body: bytes) -> str:
    """What an error's body says, as far as it fits on a line; empty when it says nothing of the usual form."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f": {' '.join(str(text).split())[:200]}"
