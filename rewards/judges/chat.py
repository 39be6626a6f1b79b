"""A judge behind any OpenAI-compatible chat endpoint, over httpx.

Invariants:
- Errors are values. Transport failures, timeouts, 429 and 5xx are retried (jitter, Retry-After) within one deadline, then `unavailable`.
- A reply counts only when it satisfies the request's schema; otherwise the judge is asked to mend it, twice.
- Breaking the judge never pays: what fails on one text while the judge gives usable replies to others is `unjudgeable`. That
  holds for unusable replies and for other 4xx (such as a context overflow) once there was any usable reply, and for 5xx and
  timeouts that outlast the retries while others are answered. A judge that answers nobody is `unavailable`.
- Only good replies are cached; the key covers model, prompt, fields and schema.
- The key of the endpoint is read from the environment and written nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from agents.types import JudgeReply, JudgeRequest, Status
from rewards.judges.base import JudgeConfig, JudgeError, schema_problem
from rewards.judges.templates import Prompt, clean, load_prompt, render

NUM_TRIES = 3
"""Unusable replies on one text before it is unjudgeable."""
_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?")
_START = re.compile(r"\{|\[(?=\s*\{)")
_BRACE = re.compile(r"[{}\[\]]")
Message = dict[str, str]


@dataclass(frozen=True)
class _Answer:
    """What came over the wire: the reply's text, or why there is none."""

    text: str = ""
    status: Status = Status.ok
    cause: str = ""
    detail: str = ""
    num_tokens: int = 0


class ChatJudge:
    """Asks a chat endpoint. Safe for many tasks of one event loop; may move to another loop between uses."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._headers = {"Authorization": f"Bearer {_key(config)}"} if config.api_key_env else {}
        self._structured = config.structured
        self._num_usable = 0
        self._cache: OrderedDict[str, JudgeReply] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(config.concurrency)

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """A reply that satisfies the request's schema, or a typed failure. Raises PromptError for a request that fits no prompt."""
        began = time.monotonic()
        prompt = load_prompt(request.prompt)
        wire = _wire_schema(request.schema)
        messages = _messages(prompt, request, wire)
        key = self._cache_key(prompt, messages, wire)
        self._counts["asked"] += 1
        if key in self._cache:
            self._cache.move_to_end(key)
            self._counts["cached"] += 1
            return self._cache[key]
        trail = [self._num_usable]
        try:
            async with asyncio.timeout(self._config.deadline_s):
                reply = await self._ask(messages, request.schema, wire, began + self._config.deadline_s, trail)
        except TimeoutError:
            blame_text = len(trail) > 2 and self._num_usable > trail[-1]
            reply = JudgeReply(Status.unjudgeable if blame_text else Status.unavailable, cause="judge_deadline")
        reply = replace(reply, prompt_hash=prompt.label, latency_s=time.monotonic() - began)
        self._counts[reply.cause or "ok"] += 1
        if reply.status is Status.ok and self._config.cache_size:
            self._cache[key] = reply
            while len(self._cache) > self._config.cache_size:
                self._cache.popitem(last=False)
        return reply

    async def check(self) -> None:
        """Asks the endpoint for its models. Raises JudgeError, one line, when it is dead, refuses the key or lacks the model."""
        where = f"judge endpoint {self._config.base_url}"
        try:
            response = await self._http().get("models", timeout=min(10.0, self._config.timeout_s))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise JudgeError(
                f"{where} does not answer ({type(error).__name__}); start it, or set judge.base_url to one that runs"
            ) from None
        if response.status_code in (401, 403):
            raise JudgeError(
                f"{where} refuses the key ({response.status_code}); set judge.api_key_env to the variable that holds it"
            )
        if response.status_code >= 500:
            raise JudgeError(f"{where} is in trouble (HTTP {response.status_code}); look at its log")
        models = _model_names(response)  # servers without this route are taken at their word
        if models and self._config.model not in models:
            listed = ", ".join(models[:5]) + (", ..." if len(models) > 5 else "")
            raise JudgeError(f"{where} does not serve judge.model {self._config.model!r}; it serves {listed}")

    def stats(self) -> dict[str, float]:
        return {name: float(count) for name, count in sorted(self._counts.items())}

    async def close(self) -> None:
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = self._loop = None

    # --------------------------------------------------------------------------------------------- one judgement

    async def _ask(
        self,
        messages: list[Message],
        schema: Mapping[str, Any],
        wire: Mapping[str, Any],
        ends_at: float,
        trail: list[int],
    ) -> JudgeReply:
        num_tokens, problem = 0, ""
        asked = list(messages)
        for _ in range(NUM_TRIES):
            answer = await self._complete(asked, wire, ends_at, trail)
            num_tokens += answer.num_tokens
            if answer.status is not Status.ok:
                return JudgeReply(answer.status, cause=answer.cause, text=answer.detail, num_tokens=num_tokens)
            value, reasons, problem = read_reply(answer.text, schema, wire)
            if not problem:
                self._num_usable += 1
                return JudgeReply(Status.ok, value, text=reasons, num_tokens=num_tokens)
            self._counts["unusable_replies"] += 1
            asked = [
                *messages,
                {"role": "assistant", "content": clean(answer.text[:8000]) or "(empty)"},
                _mend(problem),
            ]
        if not self._num_usable:  # nothing but garbage so far: the judge is at fault, not the text
            return JudgeReply(Status.unavailable, cause="judge_unusable", text=problem, num_tokens=num_tokens)
        return JudgeReply(Status.unjudgeable, cause="unusable_reply", text=problem, num_tokens=num_tokens)

    async def _complete(
        self, messages: list[Message], wire: Mapping[str, Any], ends_at: float, trail: list[int]
    ) -> _Answer:
        """One HTTP answer, with retries. `trail`: usable replies to anyone before the request and at each of its failures."""
        answer = _Answer(status=Status.unavailable, cause="judge_unreachable")
        for attempt in range(self._config.max_retries + 1):
            answer, pause_s = await self._post(messages, wire)
            if pause_s is None:
                return answer
            last = attempt == self._config.max_retries
            backoff_s = min(self._config.max_backoff_s, self._config.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
            wait_s = max(backoff_s, pause_s)
            # When the deadline would come first, what is wrong is said instead.
            final = last or time.monotonic() + wait_s >= ends_at
            if _text_may_cause(answer.cause):
                if final and (last or len(trail) > 1) and self._num_usable > trail[-1]:
                    # Others were answered since the last failure, so the judge is up: it is this text.
                    return replace(answer, status=Status.unjudgeable)
                trail.append(self._num_usable)
            if final:
                return answer
            self._counts["retries"] += 1
            await asyncio.sleep(wait_s)
        return answer

    async def _post(self, messages: list[Message], wire: Mapping[str, Any]) -> tuple[_Answer, float | None]:
        """(answer, seconds the server asks to wait before a retry; None: a retry would not help)."""
        structured = self._structured
        response = await self._send(messages, wire if structured else None)
        if structured and isinstance(response, httpx.Response) and response.status_code == 400:
            # Perhaps the server cannot enforce schemas; if it takes the plain request, never ask for it again.
            response = await self._send(messages, None)
            if isinstance(response, httpx.Response) and response.is_success:
                self._structured = False
        if isinstance(response, _Answer):
            return response, 0.0
        status = response.status_code
        if status == 429 or status == 408 or status >= 500:
            cause = "judge_overloaded" if status in (429, 503) else f"judge_http_{status}"
            return _Answer(status=Status.unavailable, cause=cause), _retry_after_s(response)
        if not response.is_success:
            # Text that only this request brings (too long, refused content) is the text's fault if the judge answers others.
            blame_text = status in (400, 413, 422) and self._num_usable > 0
            verdict = Status.unjudgeable if blame_text else Status.unavailable
            return _Answer(status=verdict, cause=f"judge_http_{status}", detail=response.text[:300]), None
        found = _content(response)
        if found is None:
            return _Answer(status=Status.unavailable, cause="judge_bad_response"), 0.0
        return found, None

    async def _send(self, messages: list[Message], wire: Mapping[str, Any] | None) -> httpx.Response | _Answer:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": messages,
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
        }
        if wire is not None:
            form = {"name": "verdict", "schema": wire, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        client = self._http()
        self._counts["requests"] += 1
        try:
            async with self._slots, asyncio.timeout(self._config.timeout_s):
                return await client.post("chat/completions", json=body)
        except (httpx.TimeoutException, TimeoutError):
            return _Answer(status=Status.unavailable, cause="judge_timeout")
        except (httpx.HTTPError, httpx.InvalidURL):
            return _Answer(status=Status.unavailable, cause="judge_unreachable")

    def _http(self) -> httpx.AsyncClient:
        """The client of the running loop. Connections and locks belong to a loop, so a new loop gets new ones."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            local = urlsplit(self._config.base_url).hostname in ("127.0.0.1", "localhost", "::1")
            self._loop, self._slots = loop, asyncio.Semaphore(self._config.concurrency)
            self._client = httpx.AsyncClient(
                base_url=self._config.base_url.rstrip("/") + "/",
                headers=self._headers,
                timeout=httpx.Timeout(self._config.timeout_s, pool=None),
                limits=httpx.Limits(max_connections=self._config.concurrency),
                trust_env=not local,  # a proxy for the outside must not catch a local judge
            )
        return self._client

    def _cache_key(self, prompt: Prompt, messages: list[Message], wire: Mapping[str, Any]) -> str:
        c = self._config
        parts = [c.base_url, c.model, c.temperature, c.max_tokens, prompt.label, messages, wire]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- words on the wire


def _text_may_cause(cause: str) -> bool:
    """Failures that a text can bring about: a server that breaks or runs on. Overload and lost connections are not."""
    return cause == "judge_timeout" or cause.startswith("judge_http_5")


def _wire_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What the judge is to send: its reasons first, so that the verdict follows from them."""
    return {
        "type": "object",
        "properties": {"reasons": {"type": "string"}, "verdict": dict(schema)},
        "required": ["reasons", "verdict"],
        "additionalProperties": False,
    }


def _messages(prompt: Prompt, request: JudgeRequest, wire: Mapping[str, Any]) -> list[Message]:
    form = (
        "Reply with one JSON object and nothing after it. It has two keys: `reasons`, a string in which you think first and briefly,"
        f" and `verdict`. It must satisfy this JSON schema:\n{json.dumps(wire, ensure_ascii=False)}"
    )
    user = f"{render(prompt, request.fields)}\n\n{form}"
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": user}]


def _mend(problem: str) -> Message:
    text = (
        f"That reply cannot be used ({problem}). Send the corrected JSON object only, in the form that was asked for."
    )
    return {"role": "user", "content": text}


def read_reply(text: str, schema: Mapping[str, Any], wire: Mapping[str, Any]) -> tuple[Any, str, str]:
    """(value, reasons, problem) of a judge's text. The value satisfies `schema` exactly when problem is empty.

    The last JSON object of the text counts, fenced or bare; a reply without the `reasons` wrapper is fine. Duplicate keys
    and non-JSON numbers are refused, and so is an object inside or before one that is broken: it may be a quotation.
    """
    text = _THINKING.sub("", text, count=1)
    source, value, problem = _last_object(text)
    if problem:
        return None, "", problem
    problem = schema_problem(value, wire)
    if not problem:
        return value["verdict"], value["reasons"], ""
    if "verdict" not in value and not schema_problem(value, schema):
        return value, _FENCE.sub("", text.replace(source, "")).strip(), ""
    return None, "", problem


def _last_object(text: str) -> tuple[str, Any, str]:
    """(source, value, problem) of the last top-level JSON object in a text."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    found: tuple[str, Any, str] = ("", None, "it holds no JSON object")
    match = _START.search(text)
    while match:
        start = match.start()
        try:
            value, end = decoder.raw_decode(text, start)
            found = (
                (text[start:end], value, "") if isinstance(value, dict) else ("", None, "it is a list, not an object")
            )
        except _Duplicate as error:
            return "", None, f"key {error.args[0]!r} occurs twice"
        except (ValueError, RecursionError) as error:
            end = _closing(text, start)
            if end < 0 or '"' in text[start:end]:
                # A failed attempt at JSON (other braces are prose). What came before is not what the judge settled on.
                found = ("", None, f"its JSON is broken ({str(error)[:120]})")
            if end < 0:
                break
        match = _START.search(text, end)
    return found


def _closing(text: str, start: int) -> int:
    """Offset after the brace or bracket that closes the one at `start`, or -1."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += 1 if match.group() in "{[" else -1
        if depth == 0:
            return match.end()
    return -1


class _Duplicate(ValueError):
    """A key that occurs twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Duplicate(key)
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _content(response: httpx.Response) -> _Answer | None:
    """The reply's text, or None when the body is no chat completion."""
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        if choice.get("finish_reason") == "length":
            text = ""  # cut off: what looks like its verdict may be a quotation
        usage = body.get("usage") or {}
        return _Answer(text if isinstance(text, str) else "", num_tokens=int(usage.get("total_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None


def _model_names(response: httpx.Response) -> list[str]:
    try:
        return [str(item["id"]) for item in response.json()["data"]] if response.is_success else []
    except (ValueError, KeyError, TypeError):
        return []


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds of the Retry-After header (a number or a date); 0 when absent or unreadable."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _key(config: JudgeConfig) -> str:
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise JudgeError(
            f"judge.api_key_env names {config.api_key_env}, which is not set; export it, or leave judge.api_key_env empty"
        )
    return key
