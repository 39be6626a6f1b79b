"""The watchdog: names the actor that is stuck and what it waits for, and replaces what stays silent.

Every actor answers `pulse()` with what it waits for and since when. Invariants: looking never waits; an actor that
died, one that does not answer (a stopped process, a blocked event loop) and one that answers but waits too long are
told apart; each is told once, and once more when it is over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import UserError, one_line


@dataclass
class WatchConfig:
    """When an actor counts as stuck."""

    silent_s: float = 60.0
    """An actor that has not answered for so long is named."""
    replace_s: float = 180.0
    """After so long without an answer it is killed and replaced, as if it had died."""
    waiting_s: float = 300.0
    """An actor that answers but has waited for one thing for so long is named, with what it waits for."""

    start_s: float = 900.0
    """How long an actor may take to come up: at the beginning, or the run ends; later, or it is killed and replaced."""
    learner_s: float = 1200.0
    """A learner that holds a batch, or its weights back, for so long is killed, and starts again from the last checkpoint. Never
    before a publish is over by its deadlines (`fleet.publish_deadline_s`)."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if not 0 < self.silent_s <= self.replace_s:
            raise ValueError(
                f"watch.silent_s {self.silent_s} must be above 0 and at most watch.replace_s {self.replace_s}"
            )
        if self.waiting_s <= 0:
            raise ValueError(f"watch.waiting_s {self.waiting_s} is not positive")


class Poll:
    """A call that is made again and again and never waited for: `take` gives its newest answer, or None."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._asked: Any = None

    def forget(self) -> None:
        """An answer that is under way is of no use any more."""
        self._asked = None

    def take(self, wait_s: float = 0.0) -> Any:
        """None: no answer yet, or the actor died (the call is made again). Raises what the call itself raised."""
        import ray

        if self._asked is None:
            self._asked = self._ask()
        if not ray.wait([self._asked], timeout=wait_s)[0]:
            return None
        answer, self._asked = self._asked, None
        try:
            return ray.get(answer)
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError):
            return None


class Tally:
    """Counts what happened within the last hour: trouble now and then is normal in a long run, a crash loop is not."""

    WINDOW_S = 3600.0

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times: list[float] = []

    @property
    def count(self) -> int:
        return len(self._times)

    def exceeded(self) -> bool:
        """Counts one more; True when that is too many."""
        now = time.monotonic()
        self._times = [t for t in self._times if now - t < self.WINDOW_S] + [now]
        return len(self._times) > self._limit


Pulse = tuple[str, float, int]
"""What an actor waits for, since when (unix seconds), and its process."""


def pulse_of(what: str = "", since: float = 0.0) -> Pulse:
    """The answer of this process."""
    return what, since, os.getpid()


class Waits:
    """What an actor waits for right now. `with waits("a turn from sampler-0"): ...` around every wait on somebody else."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[str, float]] = {}
        self._serial = 0

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self._serial += 1
        number = self._serial
        self._open[number] = (what, time.time())
        try:
            yield
        finally:
            self._open.pop(number, None)

    def oldest(self) -> tuple[str, float]:
        """(what, since in unix seconds) of the longest wait; ("", 0) when there is none."""
        return min(self._open.values(), key=lambda w: w[1], default=("", 0.0))


@dataclass
class _Watched:
    handle: Any
    replace: Callable[[str], str] | None
    pulse: Any = None
    asked: float = field(default_factory=time.monotonic)
    waits: tuple[str, float] = ("", 0.0)
    pid: int = 0
    answered: bool = False
    """Since it started, or was started again: until then it may take its time."""
    told_silent: bool = False
    told_since: float = 0.0
    dead: bool = False
    died: float = 0.0


class Watchdog:
    """Watches actors by their handles. `look` is called often and returns lines for the run's log."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._watched: dict[str, _Watched] = {}

    def watch(self, name: str, handle: Any, replace: Callable[[str], str] | None = None) -> None:
        """`replace(reason)` is called for an actor that died or stayed silent; it returns a line. Without it Ray restarts
        the actor by itself, and one that stays silent is killed so that it does."""
        self._watched[name] = _Watched(handle, replace)

    def forget(self, name: str) -> None:
        self._watched.pop(name, None)

    def waiting_for(self) -> list[str]:
        """What every actor waited for when it last answered, the longest first."""
        now = time.time()
        found = [(now - w.waits[1], name, w) for name, w in self._watched.items() if w.waits[0]]
        return [f"{name} has waited {seconds:.0f} s for {w.waits[0]}" for seconds, name, w in sorted(found, reverse=True, key=lambda f: f[0])]  # fmt: skip

    def look(self) -> list[str]:
        """Lines about actors that died, fell silent, came back or wait too long."""
        lines: list[str] = []
        for name, w in list(self._watched.items()):
            lines.extend(self._look_at(name, w))
        return lines

    def _look_at(self, name: str, w: _Watched) -> Iterator[str]:
        import ray

        if w.pulse is None:
            # not asked again by Ray when the actor restarts: that is what is to be seen
            w.pulse, w.asked = w.handle.pulse.options(max_task_retries=0).remote(), time.monotonic()
            return
        silent_s = time.monotonic() - w.asked
        if ray.wait([w.pulse], timeout=0)[0]:
            answer, w.pulse = w.pulse, None
            try:
                what, since, pid = ray.get(answer)
            except ray.exceptions.RayError as error:
                if w.replace is not None:
                    self._watched.pop(name, None)
                    yield w.replace(one_line(error))
                elif w.dead and time.monotonic() - w.died > self._config.start_s:
                    raise UserError(f"{name} died and does not come back: {one_line(error)[:300]}") from error
                elif not w.dead:
                    w.dead, w.answered, w.died = True, False, time.monotonic()
                    yield f"{name} died ({one_line(error)[:120]}); it starts again by itself"
                return
            after = f" after {silent_s:.0f} s" if w.told_silent else ""
            if not w.dead and w.pid not in (0, pid):  # Ray had started it again before a question failed
                yield f"{name} died and was started again; it answers again{after}"
            elif w.dead or w.told_silent:
                yield f"{name} answers again{after}"
            w.waits, w.pid = (what, since), pid
            w.dead, w.told_silent, w.answered = False, False, True
            yield from self._waiting(name, w)
        elif silent_s > (self._config.replace_s if w.answered else max(self._config.replace_s, self._config.start_s)):
            reason = f"it did not answer for {silent_s:.0f} s{_while(w)}"
            ray.kill(w.handle, no_restart=w.replace is not None)
            w.pulse, w.told_silent = None, False
            if w.replace is not None:
                self._watched.pop(name, None)
                yield w.replace(reason)
            else:
                w.dead, w.answered, w.died = True, False, time.monotonic()
                yield f"{name} was killed, to start again: {reason}"
        elif w.answered and silent_s > self._config.silent_s and not w.told_silent:
            w.told_silent = True
            yield f"{name} has not answered for {silent_s:.0f} s{_while(w)}"

    def _waiting(self, name: str, w: _Watched) -> Iterator[str]:
        what, since = w.waits
        if what and time.time() - since > self._config.waiting_s:
            if w.told_since != since:
                yield f"{name} has waited {time.time() - since:.0f} s for {what}"
            w.told_since = since


def _while(w: _Watched) -> str:
    return f" (it waited for {w.waits[0]})" if w.waits[0] else ""
