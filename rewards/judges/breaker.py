"""Whose fault a failure is: the judge's (then it is left alone for a while) or one text's (then that text is unjudgeable).

Invariants: an open breaker lets nobody through but a control request; it opens only after one has failed, so that texts which break the
judge cannot close it to others. A text is blamed only when that many failures would be a coincidence of less than one in ten
thousand at the rate at which others fail just now; for want of an answer, at the rate of others of its length: an overload shows in what is
long first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rewards.judges.base import JudgeConfig

COINCIDENCE = 1e-4
MEMORY_S = 120.0
"""Older tries say nothing about the judge of now, unless one takes so long."""
CONTROLS = 20
"""Control requests that tell how the judge fares when nobody else asks: without a failure, three of a text's are no coincidence."""
_WINDOW, _ENOUGH = 40, 20
Clock = Callable[[], float]


def like(size: int) -> int:
    """Least size of what can be compared with a text of `size`: at least four fifths of it, and the same for many sizes."""
    spare = max(0, size.bit_length() - 3)
    return size >> spare << spare


class Breaker:
    """Closed: all may ask. Open: nobody, for a time. Due: the time is over, and a control request decides."""

    def __init__(self, config: JudgeConfig, clock: Clock | None = None) -> None:
        self._config, self._clock = config, clock or time.monotonic
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

    def __init__(self, clock: Clock | None = None, timeout_s: float = 0.0) -> None:
        self._clock, self._memory_s = clock or time.monotonic, max(MEMORY_S, 4 * timeout_s)
        self._tries: deque[tuple[float, str, bool, int]] = deque(maxlen=512)

    def note(self, who: str, usable: bool, size: int = 0) -> None:
        """`who`: what was asked, by its hash; empty for a control request. `size`: its characters."""
        self._tries.append((self._clock(), who, usable, size))

    def answered_since(self, when: float, other_than: str, size: int = 0) -> bool:
        """Somebody else, of at least this size, got a usable reply after `when`."""
        return any(ok and at >= when and n >= size and who != other_than for at, who, ok, n in reversed(self._tries))

    def coincidence(self, num_failures: int, who: str, size: int = 0) -> float:
        """Chance that all these tries failed though nothing is wrong with the text, at the others' rate of failure.

        Others are texts that got a usable reply in the end, and the last `CONTROLS` control requests: a crowd of texts that all break
        the judge is no excuse for each of them, and many easy questions do not hide that it fails at others. The rate is
        (failures + 1) / (tries + 2), so it is never certain: where really a share r fails, three failures beside twenty replies have a
        chance of r^3 (1 - r)^20, which is 1.4e-4 at the worst r. `size`: what is smaller does not count.
        """
        recent = self._recent(size)
        sound = {other for other, usable in recent if usable and other} - {who}
        others = self._controls(size) + [usable for other, usable in recent if other in sound]
        return float(((len(others) - sum(others) + 1) / (len(others) + 2)) ** num_failures)

    def lacking(self, size: int = 0) -> int:
        """Control requests to ask before `coincidence` knows all that they can tell."""
        return CONTROLS - len(self._controls(size))

    def _controls(self, size: int) -> list[bool]:
        return [usable for other, usable in self._recent(size) if not other][-CONTROLS:]

    def _recent(self, size: int) -> list[tuple[str, bool]]:
        since = self._clock() - self._memory_s
        return [(other, usable) for at, other, usable, n in self._tries if at >= since and n >= size]
