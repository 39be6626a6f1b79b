"""A judge behind any OpenAI-compatible chat endpoint: what is asked, what counts as an answer, and what its absence means.

Invariants:
- Errors are values. Transport failures, timeouts, 429 and 5xx are retried (jitter, Retry-After) within one deadline, then `unavailable`;
  while the breaker is open they are that at once.
- A reply counts only when it satisfies the request's schema. The judge is asked once to mend one that does not, then asked afresh.
- Breaking the judge never pays: a text on which it failed three times (unusable replies, 400, 413, 422, 5xx, timeouts) though it answers
  others, control requests if nobody else asks, is `unjudgeable`, provided that at the others' rate of failure so many failures
  are no coincidence (`breaker.Odds`). A judge that answers nobody, overload and lost connections are `unavailable`; so are timeouts and 5xx
  unless others of the text's own length were answered meanwhile.
- Only good replies are cached; the key covers the judge (`fingerprint`), schema and every word that is sent. Equal requests at one time are one.
- No text can end the enforcement of schemas: that takes a control request which is refused with a schema and answered without.
- Nothing of a reply goes into a prompt but as the judge's own turn, disarmed.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agents.types import JudgeReply, JudgeRequest, Status
from rewards.judges.base import JudgeConfig
from rewards.judges.breaker import COINCIDENCE, Breaker, Odds, like
from rewards.judges.cache import ReplyCache
from rewards.judges.endpoint import Endpoint, Message, Try, api_key
from rewards.judges.identity import fingerprint
from rewards.judges.replies import read_own, read_reply, wire_schema
from rewards.judges.sanitise import disarm, hollow_field
from rewards.judges.templates import Prompt, load_prompt, render

NUM_TRIES = 3
"""Failures on one text before it may be to blame."""
MOST_TRIES = 10
"""Tries of one text while others are answered, until it is clear who is to blame."""
CONTROL_FAILED_S = 10.0
"""Control requests that failed speak for so long."""
PLAIN_S = 600.0
"""A server that enforces no schema is asked for it again after so long."""
CACHE_READ_S = 2.0
"""A disk that takes longer counts as one without the reply."""
CONTROL = JudgeRequest(
    "control",
    {"first": "The tower is 300 metres high.", "second": "The tower has a height of 300 m."},
    {
        "type": "object",
        "properties": {"same": {"type": "boolean"}},
        "required": ["same"],
        "additionalProperties": False,
    },
)
"""What any judge that works can answer; which way does not matter. Where prompts have a form of their own, the last text that was
judged takes its place."""


@dataclass
class _Case:
    """One judgement under way."""

    who: str
    """Its content hash; empty for control requests."""
    prompt: Prompt
    request: JudgeRequest
    messages: list[Message]
    ends_at: float
    last: Try | None = None
    """The last failed try."""
    num_tokens: int = 0
    num_blamed: int = 0
    num_unusable: int = 0
    num_lost: int = 0
    peers: int = 0
    """Least size of those it is compared with: its own, once it has failed in a way in which long texts fail when a judge is overloaded."""

    def failed(self, status: Status) -> JudgeReply:
        last = self.last or Try("judge_deadline")
        nobody = last.cause == "unusable_reply" and status is Status.unavailable  # the judge is at fault, not the text
        cause = "judge_unusable" if nobody else last.cause
        return JudgeReply(status, cause=cause, text=last.detail, num_tokens=self.num_tokens)


class ChatJudge:
    """Asks a chat endpoint. Safe for many tasks of one event loop; may move to another loop between uses."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        if config.api_key_env:
            api_key(config)  # better missed now than at the first request
        self._plain_until = float("-inf")
        self._cache = ReplyCache(config.cache_size, config.cache_dir, config.cache_entries)
        self._identity = fingerprint(config)
        self._breaker, self._odds = Breaker(config), Odds(timeout_s=config.timeout_s)
        self._counts: Counter[str] = Counter()
        self._control_failed_at: dict[int, float] = {}
        self._answered: _Case | None = None
        """The last case in a prompt's own form that was judged."""
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """A reply that satisfies the request's schema, or a typed failure. Raises PromptError for a request that fits no prompt."""
        began = time.monotonic()
        self._at_home()
        prompt = load_prompt(request.prompt)
        label = f"{prompt.label}@{self._config.model}"
        self._counts["asked"] += 1
        hollow = hollow_field(prompt.agent_fields, request.fields, request.allow)
        if hollow:
            self._counts["hollow_text"] += 1
            text = f"the agent's {hollow} says nothing, so no judge was asked"
            return JudgeReply(Status.unjudgeable, cause="hollow_text", text=text, prompt_hash=label)
        messages = _messages(prompt, request)
        key = self._cache_key(prompt, messages, request.schema)
        deadline_s = self._config.deadline_s
        reply = await self._cache.get(key, request.schema, min(CACHE_READ_S, deadline_s / 10))
        if reply is not None:
            self._counts["cached"] += 1
            return reply
        task = self._pending.get(key)
        if task is None:
            case = _Case(key, prompt, request, messages, began + deadline_s)
            task = self._pending[key] = asyncio.create_task(self._finish(case, label))
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        else:
            self._counts["joined"] += 1
        reply = await asyncio.shield(task)
        self._counts[reply.cause or "ok"] += 1
        return replace(reply, latency_s=time.monotonic() - began)

    async def check(self) -> None:
        """Asks the endpoint for its models. Raises JudgeError, one line, when it is dead, refuses the key or lacks the model."""
        self._at_home()
        await self._endpoint.check()

    def stats(self) -> dict[str, float]:
        """Requests, replies by kind, failures by cause, tokens, `cost`, `breaker_open` (0 or 1)."""
        c, found = self._config, {name: float(count) for name, count in sorted(self._counts.items())}
        cost = (self._counts["tokens_in"] * c.price_in + self._counts["tokens_out"] * c.price_out) / 1e6
        return found | {
            "cost": cost, "breaker_open": float(self._breaker.open), "breaker_opened": float(self._breaker.num_opened),
            "cache_errors": float(self._cache.num_errors),
        }  # fmt: skip

    async def close(self) -> None:
        if self._loop is asyncio.get_running_loop():
            for task in [*self._pending.values(), *self._controls.values()]:
                task.cancel()
            await self._endpoint.close()
        await self._cache.flush()
        self._loop = None

    def _at_home(self) -> None:
        """Connections, locks and tasks belong to an event loop, so a new loop gets new ones."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._endpoint = loop, Endpoint(self._config, self._counts)
            self._pending: dict[str, asyncio.Task[JudgeReply]] = {}
            # Control requests under way: by their least size, or by the schema that they try.
            self._controls: dict[int | str, asyncio.Task[bool]] = {}

    # --------------------------------------------------------------------------------------------- one judgement

    async def _finish(self, case: _Case, label: str) -> JudgeReply:
        try:
            async with asyncio.timeout(case.ends_at - time.monotonic()):
                reply = await self._judge(case)
        except TimeoutError:
            guilty = self._guilty(case)
            reply = case.failed(Status.unjudgeable if guilty else Status.unavailable)
            reply = reply if guilty else replace(reply, cause="judge_deadline")
        reply = replace(reply, prompt_hash=label)
        self._cache.put(case.who, reply)
        return reply

    async def _judge(self, case: _Case) -> JudgeReply:
        asked, config = case.messages, self._config
        while True:
            if self._breaker.due:
                await self._ask_control()
            pause_s = self._endpoint.pause_s
            if pause_s and time.monotonic() + pause_s >= case.ends_at:
                case.last = case.last or Try("judge_overloaded")
                return case.failed(Status.unavailable)
            tried = await self._try(case, asked)
            case.num_tokens += tried.num_tokens
            if not tried.cause:
                self._answered = case if case.prompt.own_form else self._answered
                return JudgeReply(Status.ok, tried.value, text=tried.reasons, num_tokens=case.num_tokens)
            if tried.cause == "judge_circuit_open":
                case.last = case.last or tried
                return case.failed(Status.unavailable)
            case.last = tried
            case.num_blamed += tried.blames
            if tried.blames and not tried.arrived:
                case.peers = like(_size(case.messages))
            if tried.cause == "unusable_reply":
                case.num_unusable += 1
                mend = case.num_unusable % 2 == 1
                asked = [*case.messages, *_mend(tried)] if mend else case.messages
            else:
                case.num_lost += 1
            if self._breaker.suspect:
                await self._ask_control()
            spent = not tried.retry or case.num_lost > config.max_retries or case.num_unusable >= NUM_TRIES
            if tried.blames and case.num_blamed >= NUM_TRIES:
                up = await self._settle(case, tried)
                if self._guilty(case):
                    return case.failed(Status.unjudgeable)
                if up:  # going on tells whether it is the text
                    spent = case.num_blamed >= MOST_TRIES
            backoff_s = min(config.max_backoff_s, config.backoff_s * 2.0 ** min(16, case.num_lost - 1))
            wait_s = (
                0.0 if tried.cause == "unusable_reply" else max(backoff_s * random.uniform(0.5, 1.0), tried.pause_s)
            )
            # When the deadline would come first, what is wrong is said instead.
            if spent or time.monotonic() + wait_s >= case.ends_at:
                return case.failed(Status.unavailable)
            self._counts["retries"] += 1
            await asyncio.sleep(wait_s)

    def _guilty(self, case: _Case) -> bool:
        """The text failed three times, others were answered since, and that is no coincidence."""
        return (
            case.last is not None
            and case.last.blames
            and case.num_blamed >= NUM_TRIES
            and self._odds.answered_since(case.last.began, case.who, case.peers)
            and self._odds.coincidence(case.num_blamed, case.who, case.peers) < COINCIDENCE
        )

    async def _settle(self, case: _Case, tried: Try) -> bool:
        """Asks control requests until they can tell no more about whose fault it is. False: the judge answers nobody now, or nobody can
        tell: of a judge that knows one form, no text of that form was judged yet."""
        if case.prompt.own_form and self._answered is None:
            return False
        while not self._guilty(case):
            lacking = self._odds.lacking(case.peers)
            if lacking <= 0 and self._odds.answered_since(tried.began, case.who, case.peers):
                return True
            if not await self._ask_control(max(1, lacking), case.peers):
                return False
        return True

    async def _ask_control(self, num: int = 1, size: int = 0) -> bool:
        """Whether the judge answers control requests of at least this size now. Those who wonder share them; the breaker goes by small
        ones, for a judge that reads only what is short is still there."""
        task = self._controls.get(size)
        if task is None or task.done():
            failed_at = max((at for n, at in self._control_failed_at.items() if n <= size), default=float("-inf"))
            due = not size and self._breaker.due
            if not due and time.monotonic() < failed_at + CONTROL_FAILED_S:
                if self._breaker.suspect and not size:
                    self._breaker.decide(False)
                return False
            num = min(num, self._config.concurrency)
            task = self._controls[size] = asyncio.create_task(self._run_control(num, size))
        return await asyncio.shield(task)

    async def _run_control(self, num: int, size: int) -> bool:
        self._counts["controls"] += num
        cases = self._control_cases(num, size)
        if any(_size(case.messages) < size for case in cases):
            return False  # of a form that cannot be padded, nobody can tell
        tries = await asyncio.gather(*(self._try(case, case.messages) for case in cases))
        answered = not all(tried.cause for tried in tries)
        if not answered:
            self._control_failed_at[size] = time.monotonic()
        if not size and (self._breaker.suspect or self._breaker.open):
            self._breaker.decide(any(tried.arrived for tried in tries))
        return answered

    def _control_cases(self, num: int, size: int) -> list[_Case]:
        """What a sound judge can answer, each in words of its own where it is padded: servers remember the beginnings of requests."""
        prompt, request, padded = load_prompt(CONTROL.prompt), CONTROL, "first"
        if known := self._answered:  # a judge that was trained on one form may answer nothing else
            prompt, request = known.prompt, known.request
            padded = next((name for name in prompt.agent_fields if isinstance(request.fields[name], str)), "")
        found = []
        for _ in range(num):
            asked, messages = request, _messages(prompt, request)
            lacks = size - _size(messages)
            if padded and lacks > 0:
                asked = replace(asked, fields={**asked.fields, padded: f"{asked.fields[padded]} {_padding(lacks)}"})
                messages = _messages(prompt, asked)
            found.append(_Case("", prompt, asked, messages, 0.0))
        return found

    async def _try(self, case: _Case, messages: list[Message]) -> Try:
        """Asks once. An open breaker lets only control requests through."""
        who, schema, own_form = case.who, case.request.schema, case.prompt.own_form
        wire = wire_schema(schema)
        structured = self._config.structured and not own_form and time.monotonic() >= self._plain_until
        post = functools.partial(
            self._endpoint.post, messages, barred=lambda: bool(who) and self._breaker.open, urgent=not who
        )
        tried = await post(wire if structured else None)
        if structured and tried.cause == "judge_http_400":
            # Perhaps the server cannot enforce schemas, or not this one.
            plain = await post(None)
            if not plain.cause:
                tried = plain
                await self._doubt(wire)
        if not tried.cause:
            value, reasons, problem = read_own(tried.raw, schema) if own_form else read_reply(tried.raw, schema, wire)
            tried = replace(tried, value=value, reasons=reasons)
            if problem:
                self._counts["unusable_replies"] += 1
                tried = replace(tried, cause="unusable_reply", blames=True, detail=problem)
        # Overload asks for patience, and gets it; control requests decide by themselves.
        if who and tried.cause not in ("judge_circuit_open", "judge_overloaded"):
            self._breaker.note(tried.arrived)
        if tried.blames or not tried.cause:
            self._odds.note(who, not tried.cause, _size(messages))
        return tried

    async def _doubt(self, wire: Mapping[str, Any]) -> None:
        """Ends the use of schemas for a while when this one fails on a control request too, and the same request without it does not."""
        key = json.dumps(wire, sort_keys=True)
        task = self._controls.get(key)
        if task is None:
            task = self._controls[key] = asyncio.create_task(self._refuses(wire))
            task.add_done_callback(lambda _: self._controls.pop(key, None))
        if await asyncio.shield(task):
            self._plain_until = time.monotonic() + PLAIN_S

    async def _refuses(self, wire: Mapping[str, Any]) -> bool:
        self._counts["controls"] += 2
        messages = _messages(load_prompt(CONTROL.prompt), CONTROL)
        post = functools.partial(self._endpoint.post, messages, barred=lambda: False, urgent=True)
        return (await post(wire)).cause == "judge_http_400" and not (await post(None)).cause

    def _cache_key(self, prompt: Prompt, messages: list[Message], schema: Mapping[str, Any]) -> str:
        parts = [self._identity, prompt.id, prompt.label, messages, schema]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _size(messages: list[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def _padding(num_chars: int) -> str:
    """Harmless words, at least so many characters, never the same twice."""
    told: list[str] = []
    while num_chars > 0:
        told.append(f"Step {random.randrange(1000, 10000)} of its stairs is made of stone.")
        num_chars -= len(told[-1]) + 1
    return " ".join(told)


# ------------------------------------------------------------------------------------------------- words on the wire


FORM = (
    "Reply with one JSON object and nothing after it. It has two keys: `reasons`, a string in which you think first and briefly,"
    " and `verdict`. It must satisfy this JSON schema:\n"
)


def _messages(prompt: Prompt, request: JudgeRequest) -> list[Message]:
    text = render(prompt, request.fields)
    form = f"{FORM}{json.dumps(wire_schema(request.schema), ensure_ascii=False)}"
    user = text if prompt.own_form else f"{text}\n\n{form}"
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": user}]


def _mend(tried: Try) -> list[Message]:
    text = f"That reply cannot be used ({disarm(tried.detail)}). Send the corrected JSON object only, in the form that was asked for."
    return [{"role": "assistant", "content": disarm(tried.raw[:8000]) or "(empty)"}, {"role": "user", "content": text}]
