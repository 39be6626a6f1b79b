"""Until when an answer is of use: a limit that travels with a request through every call it makes inside a process.

Between processes it travels as seconds left, since clocks differ. Invariant: a limit inside a limit only ever shortens it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar

_UNTIL: ContextVar[float] = ContextVar("until", default=math.inf)


def seconds_left(at_most: float = math.inf) -> float:
    """Seconds until the limit, and no more than `at_most`; 0 when it has passed, inf when there is none."""
    return max(0.0, min(at_most, _UNTIL.get() - time.monotonic()))


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """What the block asks for is of no use later than this. It sets no alarm: whoever works for the block asks `seconds_left`."""
    token = _UNTIL.set(min(_UNTIL.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _UNTIL.reset(token)
