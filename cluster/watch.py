"""Watching a training run: what the buffer reports goes to the log, what died is replaced, held-out tasks are played.

Invariant: nothing here waits for an actor without a limit; a run that makes no step says who waits for whom, and ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import ray

from agents.types import Group
from cluster.errors import UserError
from cluster.evaluate import Evaluation, eval_row
from cluster.learner import LearnerRun
from cluster.progress import Progress
from cluster.rundir import RunFolder
from cluster.runlog import RunLog, read_metrics
from cluster.spans import SpanLog
from cluster.watchdog import Poll, WatchConfig, Watchdog
from rewards.guards.monitors import Monitor, MonitorConfig

POLL_S = 0.5


class Staff(Protocol):
    """Who works beside the learner, as far as watching goes (`Actors`; a replay has nobody but its buffer)."""

    buffer: Any
    watchdog: Watchdog

    def tend(self) -> Sequence[str]: ...

    def fence(self, incarnation: int) -> None: ...


class Teller:
    """Everything a run tells: metrics, spans, the progress line, seconds per phase."""

    def __init__(
        self, run: RunFolder, steps: int, *, wandb: bool = False, monitor: MonitorConfig | None = None
    ) -> None:
        done = [r for r in read_metrics(run.path) if r["kind"] == "train"] if run.resumed else []
        self.step = int(done[-1]["step"]) if done else 0
        """Optimiser steps told so far."""
        self.incarnation = int(done[-1].get("incarnation", 0)) if done else -1
        """Of the learner that took the last one."""
        self._monitor = Monitor(monitor or MonitorConfig())
        for row in done:  # what it has seen is in the log
            self._monitor.update(row)
        self.seconds: dict[str, float] = {}
        self._stepped = self._alive = time.time()
        with contextlib.ExitStack() as stack:  # whatever was opened is closed again when the next one fails
            self.log = stack.enter_context(RunLog(run.path, wandb=wandb))
            self._spans = stack.enter_context(SpanLog(run.path))
            self._progress = Progress(steps, start=self.step)
            stack.callback(self._progress.close)
            self._open = stack.pop_all()
        for line in run.lines:
            self.event(line)

    def __enter__(self) -> Teller:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run, timed (seconds add up when it comes more than once). Its beginning is an event of the run."""
        began = time.monotonic()
        self.event(f"{name} ...")
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 1)

    @property
    def idle_s(self) -> float:
        """Seconds since the last optimiser step, or since the run waited on purpose."""
        return time.time() - self._alive

    def alive(self) -> None:
        """No step, but a sign of life: the run waits on purpose. The wait counts as time of the next step."""
        self._alive = time.time()

    def event(self, message: str) -> None:
        self.log.event(self.step, message)
        self._progress.note(message)

    def evaluation(self, step: int, groups: list[Group]) -> None:
        """A world without held-out tasks has none."""
        if groups:
            self.evaluated(step, eval_row(groups))

    def evaluated(self, step: int, row: dict[str, float]) -> None:
        self.log.evaluation(step, row)
        self._progress.evaluation(step, row)

    def train(self, row: dict[str, Any], more: Mapping[str, float]) -> None:
        """The row of an optimiser step, with what only the driver knows: step time and load."""
        at, when, again = row.pop("step"), row.pop("time"), bool(row.pop("again", 0.0))
        if again and at <= self.step:
            return
        self.step, self.incarnation = at, int(row.get("incarnation", self.incarnation))
        if again:  # it was taken some time ago, while nobody listened
            self.log.log("train", at, row)
            return
        row["time/step_s"], self._stepped, self._alive = max(0.0, when - self._stepped), when, max(self._alive, when)
        if "episode/tokens" in row:
            row["tokens_per_s"] = row["episodes"] * row["episode/tokens"] / max(row["time/step_s"], 1e-9)
        row.update(more)
        self._progress.update(at, row)
        self.log.log("train", at, row)
        for alarm in self._monitor.update(row):
            self.event(f"{alarm.kind}: {alarm.text}")

    def fenced(self, incarnation: int, step: int) -> bool:
        """A learner begins at `step`; False: that was told before."""
        if incarnation <= self.incarnation:
            return False
        self.incarnation, self.step = incarnation, step
        self._stepped = self._alive = time.time()  # it has as long as any other
        return True

    def row(self, kind: str, row: dict[str, Any]) -> None:
        """Any other row of the buffer."""
        if kind == "span":
            self._spans.write([row])
        elif kind == "event":
            self.event(row["message"])
        else:
            self.log.log(kind, row.pop("step"), row)

    def wait_begins(self) -> None:
        """Step times count from here."""
        self._stepped = self._alive = time.time()
        self._progress.begin()


def watch(
    staff: Staff,
    learner: LearnerRun,
    teller: Teller,
    config: WatchConfig,
    timeout_s: float,
    *,
    load: Callable[[], Mapping[str, float]] = dict,
    evaluation: Evaluation | None = None,
) -> None:
    """Until training ends. Raises UserError when it cannot go on, or makes no step for `timeout_s`."""
    rows = Poll(staff.buffer.rows.remote)
    idle = Poll(lambda: staff.buffer.idle_learner.remote(config.learner_s))
    teller.wait_begins()

    def tell(found: Sequence[dict[str, Any]]) -> None:
        for row in found:
            kind = row.pop("kind")
            if kind == "train":
                teller.train(row, load())
            elif kind == "pause":
                teller.alive()
            elif kind == "fence":
                if teller.fenced(row["incarnation"], row["step"]):
                    staff.fence(row["incarnation"])
                    if evaluation is not None:
                        evaluation.back(row["step"])
            else:
                teller.row(kind, row)

    while True:
        time.sleep(POLL_S)
        running = learner.running
        tell(rows.take() or ())
        for line in staff.tend():
            teller.event(line)
        if evaluation is not None and (found := evaluation.tick(teller.step)) is not None:
            teller.evaluated(*found)
        if not running:
            tell(_until(rows, config.silent_s) or ())
            rows.forget()  # a call that was made before the end may not know why it came
            tell(_until(rows, config.silent_s) or ())
            staff.buffer.close.remote()
            return
        if teller.idle_s <= config.learner_s:
            idle.forget()
        elif (stuck := idle.take()) is not None:
            teller.event(
                f"the learner was killed, to start again: the run had waited more than {config.learner_s:g} s for it"
            )
            ray.kill(stuck)
        if teller.idle_s > timeout_s:
            waits = "; ".join(staff.watchdog.waiting_for()[:3]) or "nobody says what it waits for"
            raise UserError(
                f"no optimiser batch within {timeout_s:g} s: {waits}; look at its log in the run's folder, "
                "or raise train.batch_timeout_s; resume= goes on from the last checkpoint"
            )


def _until(poll: Poll, seconds: float) -> Any:
    """The first answer within the time: the last rows, also of a buffer that is just coming back."""
    deadline = time.monotonic() + seconds
    while (found := poll.take(1.0)) is None and time.monotonic() < deadline:
        pass
    return found
