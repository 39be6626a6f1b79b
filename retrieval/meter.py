"""What a service did: counts since its start, and how long the stages of its last few thousand requests took.

`with stage("encode"):` anywhere below a service times that stage for whichever service the request came through. Invariant: the
memory is bounded, whatever is counted.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextvars import ContextVar

_LAST = 4096
_BUCKETS = (1, 4, 16, 64, 256)
"""Upper ends of the histogram of batch sizes."""


class Meter:
    """Counts and seconds by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seconds: dict[str, deque[float]] = {}

    def took(self, stage: str, since: float) -> None:
        """A stage that began at `since` (time.monotonic) is over."""
        self._seconds.setdefault(stage, deque(maxlen=_LAST)).append(time.monotonic() - since)

    def failed(self, error: BaseException, times: int = 1) -> None:
        """Counts an error under its class."""
        self.counts["errors"] += times
        self.counts[f"errors_{type(error).__name__}"] += times

    def batch(self, size: int) -> None:
        self.counts["batches"] += 1
        self.counts["batched"] += size
        for bound in _BUCKETS:
            self.counts[f"batches_le_{bound}"] += size <= bound

    def figures(self) -> dict[str, float]:
        """All counts, and p50, p95 and p99 of each stage in milliseconds, as flat names."""
        found = {name: float(count) for name, count in self.counts.items()}
        for name, seconds in self._seconds.items():
            ordered = sorted(seconds)
            for percent in (50, 95, 99):
                rank = min(len(ordered) - 1, len(ordered) * percent // 100)
                found[f"{name}_p{percent}_ms"] = ordered[rank] * 1000
        return found


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Stages inside the block are timed by `meter`."""
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Times the block for the service that the request came through; without one, does nothing. One that fails is not timed."""
    meter = _METER.get()
    since = time.monotonic()
    yield
    if meter is not None:
        meter.took(name, since)
