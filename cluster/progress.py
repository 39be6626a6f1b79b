"""Live progress: one line that updates itself on a terminal, one line per step elsewhere (a job's log, CI).

    step  12/100 · reward 0.43 · success 0.61 · 1.2k tok/s · stale 0.8 · 3.1 s/step · 4m 32s left

Where steps are many and short, a log gets one line per `every_s` and the last. Invariants: never more than one line per step; never wider than the terminal; a broken terminal never ends a run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

LOG_EVERY_S = 60.0
"""Between two lines of a log, for what has many short steps."""
_SHOWN = (
    ("reward/mean", "reward {:.3f}"),
    ("success", "success {:.3f}"),
    ("tokens_per_s", "{} tok/s"),
    ("staleness/mean", "stale {:.1f}"),
    ("time/step_s", "{:.1f} s/step"),
    ("questions_per_min", "{:.1f} q/min"),
    ("cost", "cost {:.4g}"),
)


class Progress:
    """Shows how far a run is. `update` after every step, `note` for what should stay readable, `close` at the end."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        unit: str = "step",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
        every_s: float = 0.0,
    ) -> None:
        self.total = total
        self.unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() if live is None else live
        self._clock = clock
        self._step_at: list[tuple[float, int]] = [(clock(), start)]
        self._line = ""
        self._every_s, self._shown_at = (0.0 if self._live else every_s), -float("inf")

    def begin(self) -> None:
        """The pace counts from now: what came before was getting ready."""
        self._step_at = [(self._clock(), self._step_at[-1][1])]

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the state after `step` from that step's metrics."""
        known = [at for at in self._step_at if at[1] < step]  # a restore goes back: its pace counts from there
        self._step_at = [*known[-31:], (self._clock(), step)]  # the pace of the last 32 steps
        if step < self.total and self._clock() - self._shown_at < self._every_s:
            return
        self._shown_at = self._clock()
        width = len(str(self.total))
        parts = [f"{self.unit} {step:>{width}}/{self.total}"]
        for name, form in _SHOWN:
            value = values.get(name)
            if value is not None:
                parts.append(form.format(short_number(value) if name == "tokens_per_s" else value))
        left = self.left_s(step)
        if left is not None and step < self.total:
            parts.append(f"{short_time(left)} left")
        self._show(" · ".join(parts))

    def note(self, message: str) -> None:
        """A line that stays: an evaluation, a checkpoint, a warning."""
        line = " ".join(message.split())
        with contextlib.suppress(OSError, ValueError):
            if self._live and self._line:
                self._stream.write("\r\x1b[2K")
            self._stream.write(line + "\n")
            if self._live and self._line:
                self._stream.write(self._line)
            self._stream.flush()

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """The line of a held-out evaluation."""
        mean, low, high, n = (values.get(f"success/{k}") for k in ("mean", "low", "high", "n"))
        if mean is None:
            return
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        tasks = f" on {int(n)} held-out tasks" if n else ""
        self.note(f"eval at {self.unit} {step}: success {mean:.3f}{interval}{tasks}")

    def close(self) -> None:
        """Leave the last line on the terminal."""
        with contextlib.suppress(OSError, ValueError):
            if self._live and self._line:
                self._stream.write("\n")
                self._stream.flush()
        self._line = ""

    def left_s(self, step: int) -> float | None:
        """Seconds to the end at the pace of the last steps, or None before there is a pace."""
        (then, first), (now, last) = self._step_at[0], self._step_at[-1]
        if last <= first or now <= then:
            return None
        return (self.total - step) * (now - then) / (last - first)

    def _show(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._live:
                columns = shutil.get_terminal_size().columns
                self._line = line if len(line) < columns else line[: max(1, columns - 2)] + "…"
                self._stream.write("\r\x1b[2K" + self._line)
            else:
                self._stream.write(line + "\n")
            self._stream.flush()


def short_number(value: float) -> str:
    """1234 -> 1.2k, 4500000 -> 4.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.1f}"


def short_time(seconds: float) -> str:
    """272 -> 4m 32s; 7500 -> 2h 05m."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"
