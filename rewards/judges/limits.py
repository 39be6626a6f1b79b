"""How fast a judge may be asked: requests in flight, requests per minute, tokens per minute.

Invariants: within any 60 seconds no more begins than the limit says (a single request larger than a tenth of it excepted: it waits
for a full bucket, and the ones after it pay). Who came first goes first; who gives up returns what it had reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

WINDOW_S = 60.0
Clock = Callable[[], float]


class Bucket:
    """A token bucket. Holds a tenth of a minute's worth at most and fills so that any minute stays within the limit."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self._most = max(1.0, per_minute / 10)
        self._rate = max(per_minute - self._most, per_minute / 2) / WINDOW_S
        self._level, self._clock, self._at = self._most, clock, clock()

    def take(self, amount: float) -> float:
        """Reserves `amount`; returns the seconds to wait before using it."""
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        wait_s = max(0.0, (min(amount, self._most) - self._level) / self._rate)
        self._level -= amount
        return wait_s

    def give_back(self, amount: float) -> None:
        """What was reserved and not used; a negative amount is charged afterwards."""
        self._level += amount


class Limits:
    """All three limits of one judge. Belongs to one event loop."""

    def __init__(
        self, concurrency: int, requests_per_minute: float, tokens_per_minute: float, clock: Clock = time.monotonic
    ) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        self._requests = Bucket(requests_per_minute, clock) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, clock) if tokens_per_minute else None

    @contextlib.asynccontextmanager
    async def room(self, num_tokens: float, urgent: bool = False) -> AsyncIterator[None]:
        """Waits until a request of about that many tokens may begin. An urgent one is booked, but waits for nobody."""
        async with contextlib.nullcontext() if urgent else self._slots:
            wanted = [(b, amount) for b, amount in ((self._requests, 1.0), (self._tokens, num_tokens)) if b is not None]
            wait_s = max((bucket.take(amount) for bucket, amount in wanted), default=0.0)
            try:
                if wait_s > 0 and not urgent:
                    await asyncio.sleep(wait_s)
            except asyncio.CancelledError:
                for bucket, amount in wanted:
                    bucket.give_back(amount)
                raise
            yield

    def correct(self, estimated: float, used: float) -> None:
        """A request that was estimated has turned out to take `used` tokens."""
        if self._tokens is not None:
            self._tokens.give_back(estimated - used)
