"""An OpenAI-compatible chat endpoint, over httpx: one request in, one `Try` out. Nothing is decided here.

Invariants: errors are values; no request takes longer than its limit from connecting to the last byte, nor brings more than
`MAX_REPLY_BYTES`; requests keep within the three limits of the configuration, and Retry-After holds for all of them. The key is read from
the environment and written nowhere, also where a server repeats it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from rewards.judges.base import JudgeConfig, JudgeError
from rewards.judges.limits import Limits

MAX_REPLY_BYTES = 4 << 20
_SECRET = 8
"""Characters from which on a key is taken out of good replies too; shorter ones (`EMPTY`) may be words of a reply."""
Message = dict[str, str]


@dataclass(frozen=True)
class Try:
    """One request over the wire: a usable reply (no cause), or why there is none."""

    cause: str = ""
    blames: bool = False
    """A text can bring this failure about."""
    retry: bool = True
    value: Any = None
    reasons: str = ""
    raw: str = ""
    detail: str = ""
    num_tokens: int = 0
    pause_s: float = 0.0
    """The server asks to wait so long."""
    began: float = 0.0
    """Monotonic seconds; when it was sent."""

    @property
    def arrived(self) -> bool:
        """The judge said something, usable or not."""
        return self.cause in ("", "unusable_reply", "judge_http_400", "judge_http_413", "judge_http_422")


class Endpoint:
    """Belongs to one event loop, as its connections and locks do."""

    def __init__(self, config: JudgeConfig, counts: Counter[str]) -> None:
        self._config, self._counts = config, counts
        self._limits = Limits(config.concurrency, config.requests_per_minute, config.tokens_per_minute)
        self._reply_tokens = 256.0  # what replies take, on average
        self._key = api_key(config) if config.api_key_env else ""
        local = urlsplit(config.base_url).hostname in ("127.0.0.1", "localhost", "::1")
        self._client = httpx.AsyncClient(
            base_url=config.base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(config.timeout_s, pool=None),
            limits=httpx.Limits(max_connections=2 * config.concurrency, max_keepalive_connections=config.concurrency),
            trust_env=not local,  # a proxy for the outside must not catch a local judge
        )

    async def post(
        self, messages: list[Message], wire: Mapping[str, Any] | None, barred: Callable[[], bool], urgent: bool
    ) -> Try:
        """Asks once, with the reply's schema if there is one, unless `barred` by the time its turn has come.

        An urgent request goes ahead of all others.
        """
        config = self._config
        body: dict[str, Any] = {
            "model": config.model, "messages": messages, "temperature": config.temperature, "max_tokens": config.max_tokens,
        }  # fmt: skip
        if wire is not None:
            form = {"name": "verdict", "schema": wire, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        body = {name: value for name, value in (body | config.extra_body).items() if value is not None}
        expected = sum(len(m["content"]) for m in messages) / 4 + self._reply_tokens
        async with self._limits.room(expected, urgent, barred) as begins:
            if not begins:
                return Try("judge_circuit_open", detail="the judge has not answered lately; it is asked again soon")
            self._counts["requests"] += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(config.timeout_s):
                    response, content = await self._exchange(body)
            except (httpx.TimeoutException, TimeoutError):
                return Try("judge_timeout", blames=True, began=began)
            except (httpx.HTTPError, httpx.InvalidURL):
                return Try("judge_unreachable", began=began)
            content = self._redacted(response, content)
        tried, num_in, num_out = _understood(response, content)
        self._counts.update(tokens_in=num_in, tokens_out=num_out)
        if tried.cause == "judge_overloaded":
            self._limits.pause(tried.pause_s)
        if num_in + num_out:
            self._limits.correct(expected, num_in + num_out)
            self._reply_tokens += 0.1 * (num_out - self._reply_tokens)
        return replace(tried, began=began)

    async def _exchange(self, body: Mapping[str, Any]) -> tuple[httpx.Response, bytes]:
        """The response and its content; a longer one than any verdict needs counts as none."""
        async with self._client.stream("POST", "chat/completions", json=body) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_REPLY_BYTES:
                    return response, b""
            return response, bytes(content)

    @property
    def pause_s(self) -> float:
        """How long the server wants to be left alone yet."""
        return self._limits.pause_s

    def _redacted(self, response: httpx.Response, content: bytes) -> bytes:
        """Without the key."""
        hide = self._key and (not response.is_success or len(self._key) >= _SECRET)
        return content.replace(self._key.encode(), b"[key]") if hide else content

    async def check(self) -> None:
        """Asks the endpoint for its models. Raises JudgeError, one line, when it is dead, refuses the key or lacks the model."""
        c = self._config
        problem = await endpoint_problem(
            self._client, c.base_url, c.model, c.timeout_s, section="judge", read=self._redacted
        )
        if problem:
            raise JudgeError(f"judge endpoint {problem}")

    async def close(self) -> None:
        await self._client.aclose()


def _understood(response: httpx.Response, content: bytes) -> tuple[Try, int, int]:
    """(what came, tokens in, tokens out). A good one still has to be read."""
    status = response.status_code
    if status in (408, 429) or status >= 500:
        cause = "judge_overloaded" if status in (429, 503) else f"judge_http_{status}"
        return Try(cause, blames=status >= 500 and status != 503, pause_s=retry_after_s(response)), 0, 0
    if not response.is_success:
        # Of these, some are what only this text brings about: too long, or refused content.
        blames = status in (400, 413, 422)
        refused = "the endpoint refuses the key; see judge.api_key_env" if status in (401, 403) else ""
        detail = refused or content[:300].decode("utf-8", "replace")
        return Try(f"judge_http_{status}", blames, retry=blames, detail=detail), 0, 0
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        if choice.get("finish_reason") == "length" or not isinstance(text, str):
            text = ""  # cut off: what looks like its verdict may be a quotation
        usage = body.get("usage") or {}
        num_in, num_out = (max(0, int(usage.get(name) or 0)) for name in ("prompt_tokens", "completion_tokens"))
        return Try(raw=text, num_tokens=int(usage.get("total_tokens") or num_in + num_out)), num_in, num_out
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError):
        return Try("judge_bad_response"), 0, 0


async def endpoint_problem(
    client: httpx.AsyncClient,
    base_url: str,
    model: str,
    timeout_s: float,
    *,
    section: str,
    read: Callable[[httpx.Response, bytes], bytes] = lambda _, content: content,
) -> str:
    """Why an endpoint cannot be used for `model`, beginning with its address: dead, it refuses the key, it lacks the model. Empty when it
    can. `section`: of the config, whose keys the line names. `read`: what of a response may be repeated."""
    try:
        response = await client.get("models", timeout=min(10.0, timeout_s))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return (
            f"{base_url} does not answer ({type(error).__name__}); start it, or set {section}.base_url to one that runs"
        )
    if response.status_code in (401, 403):
        return f"{base_url} refuses the key ({response.status_code}); set {section}.api_key_env to the variable that holds it"
    if response.status_code >= 500:
        return f"{base_url} is in trouble (HTTP {response.status_code}); look at its log"
    # Servers without this route are taken at their word.
    models = _model_names(read(response, response.content)) if response.is_success else []
    if models and model not in models:
        listed = ", ".join(models[:5]) + (", ..." if len(models) > 5 else "")
        return f"{base_url} does not serve {section}.model {model!r}; it serves {listed}"
    return ""


def _model_names(content: bytes) -> list[str]:
    try:
        return [str(item["id"]) for item in json.loads(content)["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def retry_after_s(response: httpx.Response) -> float:
    """Seconds of the Retry-After header (a number or a date); 0 when absent or unreadable."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def api_key(config: JudgeConfig) -> str:
    """The endpoint's key. Raises JudgeError when its variable is not set."""
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise JudgeError(
            f"judge.api_key_env names {config.api_key_env}, which is not set; export it, or leave judge.api_key_env empty"
        )
    return key
