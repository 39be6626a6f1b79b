"""What share of rollouts is masked, by cause, and when that is so much that the run should wait.

A masked rollout is lost work and, if causes favour some tasks, a bias. Above a few per cent from one cause nothing new may begin, except
now and then one lease that tries whether the trouble is over; the first that comes back without that cause ends the pause.

Invariants: plain counting, no clocks of others, no I/O; every masked rollout is in `totals` once; a pause names its cause.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class MaskConfig:
    """When masked rollouts pause a run."""

    max_share: float = 0.05
    """Share of recent rollouts masked by one cause above which nothing new begins; 1: never pause."""
    window: int = 400
    """Rollouts that are recent."""
    min_rollouts: int = 100
    """While fewer have been seen, the share is of so many: a single lost group early on is no trend."""
    probe_s: float = 30.0
    """While paused: how often one lease may begin; doubles, up to eightfold, with each that is masked again."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if not 0 < self.max_share <= 1:
            raise ValueError(f"mask.max_share {self.max_share} is outside (0, 1]")
        if not 1 <= self.min_rollouts <= self.window:
            raise ValueError(
                f"mask.min_rollouts {self.min_rollouts} and mask.window {self.window}: 1 <= min_rollouts <= window must hold"
            )
        if self.probe_s <= 0:
            raise ValueError(f"mask.probe_s {self.probe_s} is not positive")


class MaskMonitor:
    """Watches the verdicts of delivered leases and says whether new ones may begin."""

    def __init__(self, config: MaskConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._recent: deque[str] = deque(maxlen=config.window)
        self._probes: set[str] = set()
        self._next_probe = self._wait_s = self._since = 0.0
        self._paused_s = 0.0
        self.paused = ""
        """The cause that pauses the run; empty: it runs."""
        self.totals: Counter[str] = Counter()
        """Masked rollouts since the start, by cause."""

    def may_begin(self) -> bool:
        """Whether a lease may begin now. Tell `began` when one does."""
        return not self.paused or self._clock() >= self._next_probe

    def began(self, lease: str) -> None:
        """A lease began; during a pause it is a probe."""
        if self.paused:
            self._probes.add(lease)
            self._next_probe = self._clock() + self._wait_s

    def see(self, lease: str, causes: Sequence[str]) -> str:
        """A lease was delivered: per rollout the cause that masks it, or an empty string. Returns a line for the log, or none."""
        self.totals.update(cause for cause in causes if cause)
        probe = lease in self._probes
        self._probes.discard(lease)
        if self.paused:
            if probe and self.paused in causes:
                self._wait_s = min(2 * self._wait_s, 8 * self._config.probe_s)
                self._next_probe = max(self._next_probe, self._clock() + self._wait_s)
            elif probe:
                return self._resume()
            return ""
        self._recent.extend(causes)
        worst = Counter(cause for cause in self._recent if cause).most_common(1)
        seen = max(len(self._recent), self._config.min_rollouts)
        if worst and worst[0][1] > self._config.max_share * seen:
            return self._pause(*worst[0])
        return ""

    def row(self) -> dict[str, float]:
        """Metrics: masked rollouts since the start by cause, and seconds of pauses so far."""
        now_s = self._clock() - self._since if self.paused else 0.0
        totals = {f"masked_total/{cause}": float(count) for cause, count in sorted(self.totals.items())}
        return totals | {"masked_total/paused_s": self._paused_s + now_s}

    def _pause(self, cause: str, count: int) -> str:
        self.paused, self._since, self._wait_s = cause, self._clock(), self._config.probe_s
        self._next_probe = self._since + self._wait_s
        return (
            f"the run pauses: {count} of the last {len(self._recent)} rollouts were masked by {cause}, more than"
            f" {self._config.max_share:.0%}; a rollout every {self._config.probe_s:g} s tries whether it is over"
        )

    def _resume(self) -> str:
        line = f"the run goes on after {self._clock() - self._since:.0f} s: {self.paused} is over"
        self._paused_s += self._clock() - self._since
        self.paused = ""
        self._recent.clear()
        self._probes.clear()
        return line
