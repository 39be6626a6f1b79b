"""A policy behind an OpenAI-compatible chat endpoint: messages and tools in, one `ChatReply` out.

Invariants: transport failures, timeouts, 408, 429 and 5xx are tried again (jitter, Retry-After), then ChatFailed; a refusal of the
context's length is a reply whose `usage.finish_reason` is `context`, once no more than half of the context is asked for as a reply, where the
refusal says how long it is; any other refusal is ChatFailed at once. What the model wrote is
never a failure: arguments that are no JSON are told in `ChatReply.error`. Requests keep within the limits of the configuration. The
key is read from the environment and written nowhere. Waiting for room and for another try, and tries that came to nothing, count against nobody
(`cluster.stopwatch`). Texts go out and come in without halves of characters. Where a server counts no tokens,
they are estimated from the texts, and the usage says so: budgets and prices hold all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from agents.chat.reading import estimate
from agents.interfaces import ChatFailed, ChatReply
from agents.text import encodable
from agents.types import ToolCall, Usage
from cluster.errors import UserError
from cluster.evaluation.config import ChatConfig
from cluster.stopwatch import shown_s, standing, turn_back
from rewards.judges.endpoint import endpoint_problem, retry_after_s
from rewards.judges.limits import Limits

MAX_REPLY_BYTES = 16 << 20
_CONTEXT = (
    "context_length",
    "context length",
    "maximum context",
    "context window",
    "context size",
    "context limit",
    "maximum model length",
    "than max_model_len",
    "maximum prompt length",
    "maximum number of tokens",
    "too many tokens",
    "prompt is too long",
    "input is too long",
)
"""What endpoints say in a 400, 413 or 422 (older llama.cpp: 500) when a request does not fit the model's context."""
_WINDOW = re.compile(r"(?:maximum (?:context|model) length|than max_model_len)\W(?:is |of )?(\d[\d,]{1,12})\b")
_REASONING = ("reasoning_content", "reasoning")


class NoReply(ChatFailed):
    """No try came to a reply; another may."""


class ChatEndpoint:
    """`agents.interfaces.Chat` over httpx. Belongs to one event loop, as its connections and locks do."""

    def __init__(self, config: ChatConfig, temperature: float, share: int = 1) -> None:
        """`share`: of how many clients this is one, which together keep within the limits. Raises UserError for a key that is not set."""
        self._config, self._temperature = config, temperature
        self._limits = Limits(
            max(1, config.concurrency // share), config.requests_per_minute / share, config.tokens_per_minute / share
        )
        self._key = key_of(config)
        self._reply_tokens = 256.0  # what replies take, on average
        self._longest = 0
        """Half of the context, once a refusal has said how long that is: a longer reply is never asked for."""
        self._counts: Counter[str] = Counter()
        local = urlsplit(config.base_url).hostname in ("127.0.0.1", "localhost", "::1")
        most = max(1, config.concurrency)
        self._client = httpx.AsyncClient(
            base_url=config.base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(config.timeout_s, pool=None),
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
            trust_env=not local,  # a proxy for the outside must not catch a local endpoint
        )

    async def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int = 0,
        who: str = "",
        seed: int | None = None,
    ) -> ChatReply:
        """Raises ChatFailed."""
        config = self._config
        body: dict[str, Any] = {
            "model": config.model, "messages": list(messages), "temperature": self._temperature, "max_tokens": max_tokens or config.max_tokens,
        }  # fmt: skip
        if tools:
            body["tools"] = list(tools)
        if config.seeded and seed is not None:
            body["seed"] = seed
        body = {name: value for name, value in (body | config.extra_body).items() if value is not None}
        # extra_body may ask for less than there is room for, never for more
        _shortened(body, min((n for n in (max_tokens, self._longest) if n), default=0))
        text = json.dumps([body["messages"], body.get("tools", [])], ensure_ascii=False)
        if encodable(text) != text:
            body = _encodable(body)
        sent = estimate(text)
        expected = sent + self._reply_tokens
        began, trouble = time.monotonic(), ""
        for number in range(config.retries + 1):
            if number:
                self._counts["retries"] += 1
                pause_s = min(config.max_backoff_s, config.backoff_s * 2.0 ** (number - 1)) * random.uniform(0.5, 1.0)
                with standing():
                    await asyncio.sleep(pause_s)
            begun_s = shown_s()
            found, trouble = await self._once(body, expected)
            if found is not None:
                return self._understood(found, who, time.monotonic() - began, sent)
            turn_back(begun_s)
        raise NoReply(f"{config.base_url} gave no reply in {config.retries + 1} tries, the last with: {trouble}")

    async def check(self) -> None:
        """Asks the endpoint for its models. Raises UserError, one line, when it is dead, refuses the key or lacks the model."""
        c = self._config
        problem = await endpoint_problem(self._client, c.base_url, c.model, c.timeout_s, section="policy.chat")
        if problem:
            raise UserError(f"the policy's endpoint {problem}")

    def stats(self) -> dict[str, float]:
        """Requests, retries, tokens and cost since the start."""
        return {name: float(count) for name, count in self._counts.items()}

    async def close(self) -> None:
        await self._client.aclose()

    # ---------------------------------------------------------------------------------------------------- inside

    async def _once(self, body: dict[str, Any], expected: float) -> tuple[Mapping[str, Any] | None, str]:
        """(the server's answer, or None and why to try again). Raises ChatFailed where trying again is of no use."""
        async with contextlib.AsyncExitStack() as held:
            with standing():
                await held.enter_async_context(self._limits.room(expected))
            self._counts["requests"] += 1
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    response, content = await self._exchange(body)
            except (httpx.TimeoutException, TimeoutError):
                return None, f"no reply within {self._config.timeout_s:g} s"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                return None, type(error).__name__
        status = response.status_code
        said = " ".join(self._redacted(content)[:2000].decode("utf-8", "replace").split())
        refused = status in (400, 413, 422, 500) and any(sign in said.lower() for sign in _CONTEXT)
        if refused:
            if window := _WINDOW.search(said.lower()):
                self._longest = int(window[1].replace(",", "")) // 2
                if _shortened(body, self._longest):  # its reply was too long, not what it says
                    return await self._once(body, expected)
            return {"choices": [{"message": {}, "finish_reason": "context"}]}, ""
        if status in (408, 429) or status >= 500:
            if status in (429, 503):
                self._limits.pause(retry_after_s(response))
            return None, f"HTTP {status}"
        if not response.is_success:
            mend = "; see policy.chat.api_key_env" if status in (401, 403) else ""
            raise ChatFailed(f"{self._config.base_url} refuses the request (HTTP {status}{mend}): {said[:300]}")
        try:
            found = json.loads(content)
            found["choices"][0]["message"].get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return None, "a reply that is no chat completion"
        used = _usage(found)
        self._counts.update(tokens_in=used[0], tokens_out=used[1])
        if used[0] + used[1]:
            self._limits.correct(expected, used[0] + used[1])
            self._reply_tokens += 0.1 * (used[1] - self._reply_tokens)
        return found, ""

    async def _exchange(self, body: Mapping[str, Any]) -> tuple[httpx.Response, bytes]:
        """The response and its content; a longer one than any reply needs counts as none."""
        async with self._client.stream("POST", "chat/completions", json=body) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_REPLY_BYTES:
                    return response, b""
            return response, bytes(content)

    def _redacted(self, content: bytes) -> bytes:
        return content.replace(self._key.encode(), b"[key]") if self._key else content

    def _understood(self, found: Mapping[str, Any], who: str, latency_s: float, sent: int) -> ChatReply:
        """`sent`: tokens of the request, as estimated."""
        choice = _encodable(found["choices"][0])
        message, reason = choice["message"], str(choice.get("finish_reason") or "")
        tokens_in, tokens_out, cached = _usage(found)
        guessed = not tokens_in + tokens_out and reason != "context"
        if guessed:
            said = {k: message.get(k) for k in ("content", "tool_calls", *_REASONING) if message.get(k)}
            tokens_in, tokens_out = sent, estimate(json.dumps(said, ensure_ascii=False, default=str))
            self._counts.update(tokens_in=tokens_in, tokens_out=tokens_out)
        c = self._config
        price_cached = c.price_in if c.price_cached < 0 else c.price_cached
        cost = ((tokens_in - cached) * c.price_in + cached * price_cached + tokens_out * c.price_out) / 1e6
        calls, error = _calls(message.get("tool_calls"))
        reasoning = next((message[k] for k in _REASONING if isinstance(message.get(k), str)), "")
        usage = Usage(tokens_in, tokens_out, cached, cost, reason, who, guessed)
        return ChatReply(_text(message.get("content")), reasoning, calls, error, usage, latency_s)


def key_of(config: ChatConfig) -> str:
    """The endpoint's key; empty where none is named. Raises UserError when its variable is not set, or holds what cannot be sent."""
    key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
    if config.api_key_env and not key:
        raise UserError(
            f"policy.chat.api_key_env names {config.api_key_env}, which is not set; export it, or leave policy.chat.api_key_env empty"
        )
    if not all("!" <= sign <= "~" for sign in key):
        raise UserError(
            f"{config.api_key_env} holds signs that no key has (spaces, or other than ASCII); export it anew"
        )
    return key


def _shortened(body: dict[str, Any], most: int) -> bool:
    """Asks for no longer a reply than `most` tokens (0: any). Whether it had asked for one."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)]
    long = [name for name in names if most and body[name] > most]
    body.update(dict.fromkeys(long, most))
    return bool(long)


def _text(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(str(p.get("text") or "") for p in content if isinstance(p, Mapping))
    return content if isinstance(content, str) else ""


def _calls(given: Any) -> tuple[tuple[ToolCall, ...], str]:
    """(tool calls, why one of them could not be read)."""
    calls: list[ToolCall] = []
    for number, call in enumerate(given if isinstance(given, list) else ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return (), "a tool call names no function"
        name, arguments = function["name"], function.get("arguments")
        try:
            arguments = _encodable(json.loads(arguments or "{}")) if isinstance(arguments, str | None) else arguments
        except (ValueError, RecursionError):
            return (), f"the arguments of {name} are not valid JSON"
        if not isinstance(arguments, Mapping):
            return (), f"the arguments of {name} are not a JSON object"
        calls.append(ToolCall(name, dict(arguments), str(call.get("id") or f"call_{number}")))
    return tuple(calls), ""


def _encodable(value: Any) -> Any:
    """A JSON value whose texts can be sent and stored."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {encodable(str(k)): _encodable(v) for k, v in value.items()}
    return [_encodable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _usage(found: Mapping[str, Any]) -> tuple[int, int, int]:
    """Tokens in, out, and of those in how many were cached; 0 where the server does not say."""
    usage = found.get("usage")
    if not isinstance(usage, Mapping):
        return 0, 0, 0
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else 0
    tokens_in, tokens_out, cached = (
        max(0, int(n)) if isinstance(n, int | float) and n == n else 0
        for n in (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)
    )
    return tokens_in, tokens_out, min(cached, tokens_in)
