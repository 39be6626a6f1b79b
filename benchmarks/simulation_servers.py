"""Who serves in a simulated run: servers in order of arrival, and engines as shared processors. `benchmarks.simulation` drives them."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.simulation_parts import EngineModel

if TYPE_CHECKING:
    from benchmarks.simulation import Run


class Servers:
    """Equal servers, in order of arrival. No events: who comes in order of time can be told when he will be done."""

    def __init__(self, number: int) -> None:
        self._free = [0.0] * number
        self.busy_s = 0.0
        self.served = 0

    def done(self, now: float, service_s: float) -> float:
        """When a request that comes now is served."""
        self.busy_s += service_s
        self.served += 1
        if not self._free or not service_s:
            return now + service_s
        end = max(now, self._free[0]) + service_s
        heapq.heapreplace(self._free, end)
        return end

    def share(self, seconds: float) -> float:
        """Of the time, in which a server worked, on average over the servers. What is booked beyond the end counts to it."""
        waiting = sum(max(0.0, free - seconds) for free in self._free)
        return (self.busy_s - waiting) / (seconds * len(self._free)) if self._free and seconds else 0.0


class Request:
    """A policy turn in an engine."""

    __slots__ = ("compute_tokens", "context", "done", "sampled", "until", "version")

    def __init__(self, compute_tokens: float, context: float, sampled: float, done: Callable[[Request], None]) -> None:
        self.compute_tokens = compute_tokens
        self.context = context
        """Tokens of prompt and answer on average while it is answered."""
        self.sampled = sampled
        self.done = done
        self.until = 0.0
        self.version = 0
        """Weights that sampled its first token."""


class Engine:
    """One engine as a shared processor: `_clock` counts the tokens that each sequence in it has got."""

    def __init__(self, model: EngineModel, run: Run, place: int) -> None:
        self.model = model
        self.place = place
        self._run = run
        self._running: list[tuple[float, int, Request]] = []
        self._waiting: deque[Request] = deque()
        self._clock = 0.0
        self._stall_s = 0.0
        self._context = 0.0
        self._at = 0.0
        self._due = math.inf
        """Of the event that stands for the next end."""
        self._speed = 1.0
        self._paused = False
        self.version = 0
        self.live_tokens = 0.0
        """Context of the sessions that live here, at work or with a tool."""
        self.sessions = 0
        self.busy_s = 0.0
        self.sequence_s = 0.0
        """Integral of the sequences in it over time."""
        self.made_tokens = 0.0

    @property
    def cores(self) -> float:
        """What it asks of a shared machine now."""
        return self._run.system.engine_cores if self._running and not self._paused else 0.0

    def cached(self, context: float) -> float:
        """How much of a session's context is still there: when not all fits, each has its share."""
        return (
            context if self.live_tokens <= self.model.kv_tokens else context * self.model.kv_tokens / self.live_tokens
        )

    def submit(self, request: Request) -> None:
        self._advance()
        self._waiting.append(request)
        self._admit()
        self._plan()

    def pause(self) -> None:
        self._advance()
        self._paused = True
        self._plan()

    def resume(self, version: int) -> None:
        """With new weights."""
        self._advance()
        self._paused, self.version = False, version
        if self._run.system.recompute:
            self._stall_s += self.model.prefill_s * self._context
        self._plan()

    def set_speed(self, speed: float) -> None:
        if speed != self._speed:
            self._advance()
            self._speed = speed
            self._plan()

    def settle_accounts(self) -> None:
        """Integrals up to now."""
        self._advance()

    def _advance(self) -> None:
        now = self._run.now
        passed, self._at = now - self._at, now
        number = len(self._running)
        if not number or passed <= 0:
            return
        self.sequence_s += number * passed
        if self._paused:
            return
        self.busy_s += passed
        work = passed * self._speed
        stalled = min(work, self._stall_s)
        self._stall_s -= stalled
        tokens = (work - stalled) / self.model.step(number, self._context)
        self._clock += tokens
        self.made_tokens += number * tokens

    def _admit(self) -> None:
        idle, model = not self._running, self.model
        while self._waiting and len(self._running) < model.max_sequences:
            request = self._waiting[0]
            if self._running and self._context + request.context > model.kv_tokens:
                break
            self._waiting.popleft()
            self._stall_s += model.turn_s + model.prefill_s * request.compute_tokens
            self._context += request.context
            request.version = self.version
            request.until = self._clock + request.sampled
            heapq.heappush(self._running, (request.until, next(self._run.serial), request))
        if idle and self._running:
            self._run.share_host()

    def _plan(self) -> None:
        """One event stands for the next end. If that comes later than it was thought, the event finds nothing done and plans again."""
        if not self._running or self._paused:
            return
        number, run = len(self._running), self._run
        tokens = max(0.0, self._running[0][0] - self._clock)
        due = run.now + (self._stall_s + tokens * self.model.step(number, self._context)) / self._speed
        if due < self._due - 1e-9:
            self._due = due
            run.after(due - run.now, self._tick, due)

    def _tick(self, due: float) -> None:
        if due != self._due:
            return  # an earlier one has come in its stead
        self._due = math.inf
        self._advance()
        finished = []
        while self._running and self._running[0][0] <= self._clock + 1e-6:
            request = heapq.heappop(self._running)[2]
            self._context -= request.context
            finished.append(request)
        if finished:
            if not self._running:
                self._context = self._stall_s = 0.0
            self._admit()
            if not self._running:
                self._run.share_host()
        self._plan()
        for request in finished:
            request.done(request)
