"""Where the seconds of a step go, without slowing it: laps on one clock that leave no gap.

On CPU the clock is `time.perf_counter`. On CUDA kernels run behind the program, so a lap is an event in the stream: what is
measured is when the device came to that point, and a phase in which the program works while the device is still busy with
an earlier one counts for the earlier one. Nothing is waited for before `seconds` is called. Invariant: the laps add up to
the time between `Stopwatch()` and the last lap.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """`lap("forward")` books the time since the last lap under that name."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds per name. On CUDA it waits for the device to come to the last lap."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        out: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            took = before.elapsed_time(after) / 1000.0 if self._cuda else after - before
            out[name] = out.get(name, 0.0) + took
        return out

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark
