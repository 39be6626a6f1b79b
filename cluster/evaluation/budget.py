"""What one question may take, enforced around the chat, the token policy and the sandbox of its agent.

Invariants: who has nothing left is told by `BudgetSpent`, which agents let through; no request and no call begins without something left of
every budget, and none goes on past `seconds`, of which those that the evaluation itself makes it wait are none (`cluster.stopwatch`); tokens that nobody counted are estimated from the texts; a reply that was begun is handed over, so
the last one may pass the limit of tokens or money.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agents.chat.base import BudgetSpent
from agents.interfaces import Chat, ChatFailed, ChatReply, Policy, Sandbox
from agents.types import Generation, Sampling, ToolCall, ToolEvent, Usage
from cluster.evaluation.config import BudgetConfig
from cluster.stopwatch import Stopwatch, TimeUp

CHARS_PER_TOKEN = 4.0
"""Until an endpoint has said how many tokens it counted."""


class Purse:
    """What one question has taken so far."""

    def __init__(self, config: BudgetConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self._watch = config, Stopwatch(clock)
        self.tokens = self.calls = 0
        self.money = 0.0

    def spend(self, usage: Usage) -> None:
        """A request was answered."""
        self.tokens += usage.tokens_in + usage.tokens_out
        self.money += usage.cost

    @property
    def left_s(self) -> float | None:
        """Seconds; None without a limit."""
        return self.config.seconds - self._watch.seconds if self.config.seconds else None

    def check(self) -> None:
        """Raises BudgetSpent, with what is spent."""
        c = self.config
        for name, used in (("tokens", self.tokens), ("money", self.money)):
            limit = getattr(c, name)
            if limit and used >= limit:
                raise BudgetSpent(f"budget.{name}={limit:g} is spent ({used:g})")
        if self.left_s is not None and self.left_s <= 0:
            raise BudgetSpent(f"budget.seconds={c.seconds:g} is spent")

    @contextlib.asynccontextmanager
    async def within(self) -> AsyncIterator[None]:
        """The block ends, with BudgetSpent, when the seconds are over."""
        self.check()
        try:
            async with self._watch.running(self.config.seconds or None):
                yield
        except TimeUp:
            raise BudgetSpent(f"budget.seconds={self.config.seconds:g} is spent") from None


class BudgetedChat:
    """`agents.interfaces.Chat` of one question."""

    def __init__(
        self, chat: Chat, purse: Purse, max_tokens: int, context_window: int = 0, timeout_s: float = math.inf
    ) -> None:
        """`max_tokens`: of a reply, where the agent asks for no number. `context_window`: of the model, where it is known; the
        smaller of it and the budget counts. `timeout_s`: of one try; an endpoint that lets a whole one pass is at fault, not the agent."""
        self._timeout_s = timeout_s
        self._chat, self._purse, self._max_tokens = chat, purse, max_tokens
        self._context = min((n for n in (context_window, purse.config.context_tokens) if n), default=0)
        self._chars_per_token = CHARS_PER_TOKEN

    async def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int = 0,
        who: str = "",
    ) -> ChatReply:
        """As the chat's own. A request that leaves no room in the context is not made: `usage.finish_reason` is `context`."""
        chars = _chars(messages) + _chars(tools)
        expected = round(chars / self._chars_per_token)
        most = max_tokens or self._max_tokens
        if self._context:
            if expected >= self._context:
                self._purse.check()
                return ChatReply(usage=Usage(finish_reason="context", who=who))
            most = min(most, self._context - expected)
        left_s = self._purse.left_s
        try:
            async with self._purse.within():
                reply = await self._chat.reply(messages, tools=tools, max_tokens=most, who=who)
        except BudgetSpent as spent:
            if left_s is not None and left_s >= self._timeout_s:
                raise ChatFailed(f"no reply within {left_s:.0f} s, all that was left of budget.seconds") from spent
            raise
        usage = reply.usage if reply.usage.who else replace(reply.usage, who=who)
        if not usage.tokens_in + usage.tokens_out and usage.finish_reason != "context":  # nobody counted
            written = len(reply.text) + len(reply.reasoning) + sum(_chars(call.arguments) for call in reply.calls)
            out = round(written / self._chars_per_token) + 1
            usage = replace(usage, tokens_in=max(1, expected), tokens_out=out, estimated=True)
        if usage.tokens_in and chars and not usage.estimated:
            self._chars_per_token = max(0.5, chars / usage.tokens_in)
        self._purse.spend(usage)
        return replace(reply, usage=usage)


class BudgetedPolicy:
    """`agents.interfaces.Policy` of one question; remembers what each turn took."""

    takes_stop_strings = True

    def __init__(self, policy: Policy, purse: Purse) -> None:
        self._policy, self._purse = policy, purse
        self.usages: list[Usage] = []

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        session: str,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        **extra: Any,
    ) -> Generation:
        async with self._purse.within():
            made = await self._policy.generate(
                prompt_ids, session=session, sampling=sampling, stop_token_ids=stop_token_ids, **extra
            )
        usage = Usage(len(prompt_ids), len(made.token_ids), made.num_cached_tokens, finish_reason=made.finish_reason)
        self.usages.append(usage)
        self._purse.spend(usage)
        return made


class BudgetedSandbox:
    """`agents.interfaces.Sandbox` of one question."""

    def __init__(self, sandbox: Sandbox, purse: Purse) -> None:
        self._sandbox, self._purse = sandbox, purse

    async def call(self, call: ToolCall) -> ToolEvent:
        limit = self._purse.config.calls
        if limit and self._purse.calls >= limit:
            raise BudgetSpent(f"budget.calls={limit} is spent")
        self._purse.calls += 1
        async with self._purse.within():
            return await self._sandbox.call(call)

    async def close(self) -> None:
        await self._sandbox.close()


def _chars(value: Any) -> int:
    """Characters of all texts in plain values."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(k)) + _chars(v) for k, v in value.items())
    return sum(map(_chars, value)) if isinstance(value, (list, tuple)) else 0
