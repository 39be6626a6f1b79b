"""Whose fault a failure is: the judge's (then it is left alone for a while) or one text's (then that text is unjudgeable).

Invariants: an open breaker lets nobody through but a control request; it opens only after one has failed, so that texts which break the
judge cannot close it to others. A text is blamed only when that many failures would be a coincidence of less than one in ten
thousand at the rate at which others fail just now.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rewards.judges.base import JudgeConfig

COINCIDENCE = 1e-4
MEMORY_S = 120.0
"""Older tries say nothing about the judge of now."""
_WINDOW, _ENOUGH = 40, 20
Clock = Callable[[], float]


class Breaker:
    """Closed: all may ask. Open: nobody, for a time. Due: the time is over, and a control request decides."""

    def __init__(self, config: JudgeConfig, clock: Clock = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._in_a_row = self._failed_probes = 0
        self._until = 0.0
        self._open = False
        self.num_opened = 0

    def note(self, arrived: bool) -> None:
        """A request was answered in whatever form, or was lost."""
        self._recent.append(arrived)
        self._in_a_row = 0 if arrived else self._in_a_row + 1

    @property
    def suspect(self) -> bool:
        """So much is lost that a control request should decide whether to go on."""
        share = 1 - sum(self._recent) / max(1, len(self._recent))
        often = len(self._recent) >= _ENOUGH and share >= self._config.breaker_share
        return not self._open and (often or self._in_a_row >= self._config.breaker_failures)

    @property
    def open(self) -> bool:
        return self._open

    @property
    def due(self) -> bool:
        return self._open and self._clock() >= self._until

    def decide(self, control_answered: bool) -> None:
        """What the control request said: closes the breaker, or opens it (again, and longer)."""
        self._recent.clear()
        self._in_a_row = 0
        self.num_opened += not control_answered and not self._open
        self._open = not control_answered
        self._failed_probes = 0 if control_answered else self._failed_probes + 1
        self._until = self._clock() + self._config.breaker_s * 2 ** min(3, max(0, self._failed_probes - 1))


class Odds:
    """How others fare: usable replies, and failures of the kinds that a text can bring about."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._tries: deque[tuple[float, str, bool]] = deque(maxlen=512)

    def note(self, who: str, usable: bool) -> None:
        """`who`: what was asked, by its hash; empty for a control request."""
        self._tries.append((self._clock(), who, usable))

    def answered_since(self, when: float, other_than: str) -> bool:
        """Somebody else got a usable reply after `when`."""
        return any(usable and at >= when and who != other_than for at, who, usable in reversed(self._tries))

    def coincidence(self, num_failures: int, who: str) -> float:
        """Chance that all these tries failed though nothing is wrong with the text, at the others' rate of failure.

        Others are control requests and texts that got a usable reply in the end: a crowd of texts that all break the judge is no
        excuse for each of them. The rate is (failures + 1/2) / (tries + 1), so it is never certain.
        """
        since = self._clock() - MEMORY_S
        recent = [(other, usable) for at, other, usable in self._tries if at >= since and other != who]
        sound = {other for other, usable in recent if usable} | {""}
        others = [usable for other, usable in recent if other in sound]
        return float(((len(others) - sum(others) + 0.5) / (len(others) + 1)) ** num_failures)
