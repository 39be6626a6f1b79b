"""Time that counts against somebody: a question's agent pays for what it asks for, not for how we go about it.

A stopwatch runs from its making. It stands still while what it times waits for us (`standing`: for room within limits of our own, before
another try, for an engine that starts), and goes back over a try that came to nothing (`turn_back`). Invariants: who waits need not know
whose watch is running, or whether one is; a deadline on a watch (`running`) moves with it; one watch is never ahead of its clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar


class TimeUp(Exception):
    """A watch has come to the seconds that a block had."""


class Stopwatch:
    """Belongs to one event loop. With several waits at the same time it stands still until the last one is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._stood_at, self._waits = 0.0, 0
        self._limits: dict[asyncio.Timeout, float] = {}

    @property
    def seconds(self) -> float:
        """What it shows."""
        return (self._stood_at if self._waits else self._clock()) - self._began

    @contextlib.asynccontextmanager
    async def running(self, until: float | None = None) -> AsyncIterator[None]:
        """Waits within the block may hold this watch. Raises TimeUp when it shows `until` seconds before the block has ended."""
        limit = asyncio.timeout(None)
        token = _watch.set(self)
        try:
            async with limit:
                if until is not None:
                    self._limits[limit] = until
                    self._move_limits()
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeUp from None
        finally:
            self._limits.pop(limit, None)
            _watch.reset(token)

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """It stands still for the block."""
        if not self._waits:
            self._stood_at = self._clock()
        self._waits += 1
        self._move_limits()
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits:
                self._began += self._clock() - self._stood_at
            self._move_limits()

    def turn_back(self, to_s: float) -> None:
        """It shows so many seconds again, if it shows more."""
        self._began += max(0.0, self.seconds - to_s)
        self._move_limits()

    def _move_limits(self) -> None:
        now, shown = asyncio.get_running_loop().time(), self.seconds
        for limit, until in self._limits.items():
            if not limit.expired():
                limit.reschedule(None if self._waits else now + until - shown)


_watch: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextlib.contextmanager
def standing() -> Iterator[None]:
    """The running watch stands still for the block, if one is running."""
    watch = _watch.get()
    with watch.standing() if watch is not None else contextlib.nullcontext():
        yield


def shown_s() -> float:
    """What the running watch shows; 0 where none is running."""
    watch = _watch.get()
    return watch.seconds if watch is not None else 0.0


def turn_back(to_s: float) -> None:
    """What was done since the running watch showed `to_s` came to nothing, and does not count."""
    watch = _watch.get()
    if watch is not None:
        watch.turn_back(to_s)
