"""Training from recorded groups: no samplers, no retrieval, no judge; another advantage or loss over the same rollouts.

`Replay` stands where the buffer stands in a live run, and offers the learner and the driver the same calls. Invariants:
- Groups come in the recording's order, as many per batch as the config says, one pass after the other; what is held in
  memory is the batch being trained and the one made ready behind it.
- Its state is a cursor, and what it is a cursor of: a learner that goes back to a checkpoint, or a run that is resumed,
  goes on at the same group, also when the recording has grown since; with another recording it does not go on.
- Where the batches are the recorded run's own, what that run withheld for its age is withheld again; else nothing is too
  old, for the data is off-policy by nature. How old it was when it was recorded is logged.
- A recording of another protocol, tokenizer, template or schema is refused before anything is started or written.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agents.advantages import lost_cause
from agents.sharding import shards
from agents.types import Group, RecordError
from cluster.batch import Batch, make_batch, sample_age
from cluster.buffer import BufferSetup, OutOfOrder
from cluster.errors import Fenced
from cluster.ledger import Counts
from cluster.record import Recording
from cluster.replayplan import alone, check, check_recording
from cluster.sizes import needs
from cluster.watchdog import Pulse, pulse_of
from rewards.registry import make_shaper

if TYPE_CHECKING:
    from cluster.schema import RunConfig

__all__ = ["Replay", "Staff", "check", "run_replay"]


class _Made(NamedTuple):
    """A batch, and where the recording stands behind it."""

    batch: Batch
    cursor: int
    episodes: int
    dropped: int
    groups: list[Group]
    """As they were recorded; kept for a shaper that learns from them."""


class Replay:
    """See the module. Methods are coroutines where they wait; wrap with `ray.remote` to host it."""

    def __init__(self, setup: BufferSetup, source: str) -> None:
        self._setup = setup
        self._recording = Recording(source)
        check_recording(self._recording, setup.advantage, setup.buffer.groups_per_batch)
        self._shaper = make_shaper(setup.shaper)
        self._mark = self._recording.mark
        self._max_staleness = self._recording.max_staleness(setup.buffer.groups_per_batch)
        self._incarnation = -1
        self._step = self._cursor = self._trained = 0
        self._dropped: Counter[str] = Counter()
        self._made: _Made | None = None
        self._ahead: tuple[tuple[int, int, int, bool], asyncio.Task[_Made]] | None = None
        self._rows: list[dict[str, Any]] = []
        self._learner: Any = None
        self._learners_in_a_row = 0
        self._fatal = ""
        self._since = time.time()
        self._say(f"{len(self._recording)} groups from {self._recording.folder}")
        if self._recording.missing:
            self._say(f"{self._recording.missing} groups were trained, but not recorded; the replay goes without them")

    # -------------------------------------------------------------------------------------------- learner side

    async def enter(self, saved: Mapping[str, Any] | None, learner: Any = None) -> int:
        """A learner begins, from a checkpoint's `saved` state or from the start; returns its incarnation."""
        self._learners_in_a_row += 1
        if self._learners_in_a_row > self._setup.max_learner_failures:
            self._fatal = self._fatal or (
                f"{self._learners_in_a_row - 1} learners ended one after the other without an optimiser step; "
                "their errors stand in Ray's logs of the workers (ray_train/ of the run, and the console with ray.log_to_driver=true)"
            )
        if saved and "cursor" not in saved:
            raise RecordError(
                "the checkpoint is of a live run; to replay from its weights, start a run of its own with model.path= and name="
            )
        saved = saved or {"cursor": 0, "step": 0, "trained": 0, "dropped": {}, "incarnation": -1}
        if "recording" in saved and saved["recording"]["hash"] != self._mark["hash"]:
            self._recording.keep(saved["recording"])
            self._mark, self._ahead = self._recording.mark, None
            self._say(f"the recording has grown; the replay goes on with its first {len(self._recording)} groups")
        self._incarnation = max(self._incarnation, int(saved["incarnation"])) + 1
        self._step, self._cursor, self._trained = (int(saved[k]) for k in ("step", "cursor", "trained"))
        self._dropped = Counter(saved["dropped"])
        if self._shaper is not None:
            self._shaper.load_state(saved.get("shaper", {}))
        self._made, self._learner = None, learner
        self._since = time.time()
        if self._incarnation:
            self._rows.append(
                {"kind": "fence", "step": self._step, "time": time.time(), "incarnation": self._incarnation}
            )
            self._say(f"learner {self._incarnation} begins at step {self._step}, group {self._cursor} of the replay")
        return self._incarnation

    async def next_batch(
        self, incarnation: int, step: int, world_size: int = 1, timeout_s: float = 5.0, shared: bool = False,
        ranks: tuple[int, int] | None = None,
    ) -> Batch | None:  # fmt: skip
        """The batch for optimiser step `step`, the same for every rank that asks; None when it is not made in time.

        `shared`: the learner computes shared prefixes once. `ranks`: see `Buffer.next_batch`.
        """
        self._fence(incarnation)
        if self._made is None or self._made.batch.step != step:
            if step != self._step:
                raise ValueError(f"the learner asks for batch {step}, the replay is at batch {self._step}")
            coming = self._prepare(self._cursor, step, world_size, shared)
            await asyncio.wait([coming], timeout=timeout_s)
            self._fence(incarnation)
            if not coming.done():
                return None
            if self._made is None or self._made.batch.step != step:  # else another rank was faster
                self._made = coming.result()
                self._since = time.time()
                total = len(self._recording)
                if (self._made.cursor - 1) // total > max(0, self._cursor - 1) // total:
                    self._say(f"all {total} groups of the recording were trained; it begins again")
                if not self._made.batch.last and self._shaper is None:  # a shaper first learns from the batch before
                    self._prepare(self._made.cursor, step + 1, world_size, shared)
        return self._made.batch if ranks is None else self._made.batch.only(*ranks)

    async def settle(self, incarnation: int, step: int, row: Mapping[str, Any]) -> None:
        """The optimiser step `step` is done. `row` goes to the run's log, with the counts."""
        self._fence(incarnation)
        if step == self._step - 1:
            return  # asked again because the answer was lost
        if step != self._step or self._made is None:
            raise ValueError(f"batch {step} was settled while the replay is at batch {self._step}")
        made, self._made = self._made, None
        self._step, self._cursor, self._learners_in_a_row = step + 1, made.cursor, 0
        self._trained += made.episodes
        if self._shaper is not None:
            self._shaper.update(made.groups)
        if made.dropped:
            self._dropped["masked"] += made.dropped
        now = self._since = time.time()
        books = asdict(await self.counts())
        dropped = books.pop("dropped")
        ledger = {f"ledger/{k}": float(n) for k, n in {**books, "dropped": sum(dropped.values())}.items()}
        passes = {"replay/passes": self._cursor / len(self._recording)}
        self._rows.append(
            {"kind": "train", "step": self._step, "time": now, **row, **made.batch.stats, **passes, **ledger}
        )
        began = now - float(row.get("time/train_s", 0.0))
        parts = {k: row[f"time/{k}_s"] for k in ("pack", "forward", "backward", "optimiser") if f"time/{k}_s" in row}
        self._span("wait", began - float(row.get("time/wait_s", 0.0)), began)
        self._span("train", began, now, seconds=parts)

    async def published(self, incarnation: int, version: int, row: Mapping[str, Any]) -> None:
        """Nobody samples, so nobody waits for the weights."""
        self._fence(incarnation)

    async def checkpointed(self, incarnation: int, step: int, seconds: float = 0.0) -> None:
        """A checkpoint of step `step` is on disk."""
        self._fence(incarnation)
        self._span("checkpoint", time.time() - seconds, time.time())

    async def state(self) -> dict[str, Any]:
        """Plain values that go into a checkpoint together with the learner's."""
        return {
            "cursor": self._cursor, "step": self._step, "trained": self._trained, "dropped": dict(self._dropped),
            "incarnation": self._incarnation, "recording": self._mark, "shaper": self._shaper.state() if self._shaper else {},
        }  # fmt: skip

    async def stop(self, reason: str) -> None:
        """The run must end; `reason` is one line for the user."""
        self._fatal = self._fatal or reason

    # -------------------------------------------------------------------------------------------------- driver

    async def counts(self) -> Counts:
        """Episodes read so far, by place. A group is admitted when it goes into a batch, or is passed over."""
        held = (self._made.episodes, self._made.dropped) if self._made else (0, 0)
        dropped = self._dropped + Counter({"masked": held[1]})
        return Counts(self._trained + held[0] + dropped.total(), 0, 0, held[0], self._trained, dict(dropped))

    async def rows(self) -> list[dict[str, Any]]:
        """Log rows since the last call. Raises OutOfOrder when the run cannot go on."""
        if self._fatal:
            raise OutOfOrder(self._fatal)
        rows, self._rows = self._rows, []
        return rows

    async def event(self, message: str) -> None:
        """Adds a line for people to the run's log."""
        self._say(message)

    async def pulse(self) -> Pulse:
        """What the run waits for here, and since when (unix seconds)."""
        if self._incarnation < 0:
            return pulse_of("a learner", self._since)
        return pulse_of(f"{'the learner to train' if self._made else 'disk for'} batch {self._step}", self._since)

    async def idle_learner(self, longer_than_s: float) -> Any:
        """The learner's handle when it has had its batch for so long, else None."""
        return self._learner if self._made and time.time() - self._since > longer_than_s else None

    async def close(self) -> None:
        """Nothing is under way but a batch that nobody will ask for."""
        self._ahead = None

    # -------------------------------------------------------------------------------------------------- inside

    def _prepare(self, cursor: int, step: int, world_size: int, shared: bool) -> asyncio.Task[_Made]:
        """The batch of a place, being made; there is at most one."""
        key = (cursor, step, world_size, shared)
        if self._ahead is None or self._ahead[0] != key:
            self._ahead = key, asyncio.create_task(asyncio.to_thread(self._make, *key))
        return self._ahead[1]

    def _make(self, cursor: int, step: int, world_size: int, shared: bool) -> _Made:
        recording, setup = self._recording, self._setup
        begin, groups, at, dropped = cursor, list[Group](), dict[str, int](), 0
        while len(groups) < setup.buffer.groups_per_batch:
            if cursor - begin >= len(recording):
                raise RecordError(f"{recording.folder} has fewer groups that can be trained than one batch takes")
            entry = recording.entries[cursor % len(recording)]
            group = entry.frame.read(Group)
            cursor += 1
            if lost_cause(group):
                dropped += len(group.members)
                continue
            groups.append(group)
            at |= {g.id: trained_at(group, entry.step) for g in (group, *group.steps)}
        last = step + 1 >= setup.steps or time.time() >= setup.ends_at
        shaped = groups if self._shaper is None else self._shaper.shape(groups)
        whole = make_batch(step, shaped, setup.advantage, max_staleness=None, last=last)
        aged = [(s, sample_age(s, at[s.group_id])) for s in whole.shards[0]]
        kept = [(s, age) for s, age in aged if self._max_staleness is None or age <= self._max_staleness]
        samples, ages = [s for s, _ in kept], [age for _, age in kept] or [0]
        stats = {
            **whole.stats, "masked/stale": float(len(aged) - len(kept)), "staleness/mean": sum(ages) / len(ages),
            "staleness/max": float(max(ages)),
        }  # fmt: skip
        parts = tuple(map(tuple, shards(samples, world_size, shared=shared)))
        batch = replace(whole, shards=parts, stats=stats)
        return _Made(batch, cursor, sum(len(g.members) for g in groups), dropped, groups if self._shaper else [])

    def _fence(self, incarnation: int) -> None:
        if incarnation != self._incarnation:
            raise Fenced(f"learner {incarnation} was replaced by learner {self._incarnation}")

    def _say(self, message: str) -> None:
        self._rows.append({"kind": "event", "step": self._step, "time": time.time(), "message": message})

    def _span(self, phase: str, began: float, ended: float, **more: Any) -> None:
        row = {"kind": "span", "actor": "learner", "phase": phase, "began": round(began, 4), "ended": round(ended, 4)}
        self._rows.append({**row, "step": self._step, "time": ended, **more})


def trained_at(group: Group, step: int) -> int:
    """The optimiser step a group was trained in; where nobody knows, that of its newest weights."""
    return step if step >= 0 else max((v.step for t in group.trajectories for v in t.versions), default=0)


# ------------------------------------------------------------------------------------------------------ driver


class Staff:
    """Who works beside the learner of a replay: nobody but the replay itself."""

    def __init__(self, config: RunConfig, setup: BufferSetup, source: Path) -> None:
        import ray

        from cluster.actors import LASTING
        from cluster.runtime import actor
        from cluster.watchdog import Watchdog

        self.buffer: Any = actor(Replay, **LASTING).remote(setup, str(source))
        ray.get(self.buffer.counts.remote(), timeout=config.watch.start_s)
        self.watchdog = Watchdog(config.watch)
        self.watchdog.watch("replay", self.buffer)

    def tend(self) -> list[str]:
        return self.watchdog.look()

    def fence(self, incarnation: int) -> None:
        """Nobody plays for earlier learners."""


def run_replay(config: RunConfig) -> dict[str, Any]:
    """Trains from the groups that `config.replay` names. Returns what also lies in the run's `summary.json`."""
    import ray

    from cluster.learner import LearnerRun, Setup
    from cluster.model import prepare_model
    from cluster.rundir import open_run
    from cluster.runtime import ray_session
    from cluster.train import ends_at, newest, over, result, sampled_tokens
    from cluster.watch import Teller, watch

    source = check(config)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_run(config))
        if (done := over(folder, config.train)) is not None:
            return done
        teller = stack.enter_context(
            Teller(folder, config.train.steps, wandb=config.train.wandb, monitor=config.monitor)
        )
        with teller.phase("model and Ray"):
            model = prepare_model(config.model, folder.path, config.seed)
            train = config.train
            stack.enter_context(ray_session(config.ray, needs(alone(config))))
        with teller.phase("training"):
            setup = BufferSetup(
                config.buffer,
                config.advantage,
                train.steps,
                ends_at=ends_at(config, folder),
                max_learner_failures=train.max_failures,
                shaper=config.shaper,
            )
            staff = Staff(config, setup, source)
            learner = LearnerRun(
                Setup(
                    model, train, config.learner, staff.buffer, None, "", str(folder.checkpoints), token=folder.token
                ),
                folder.path,
            )
            stack.callback(learner.end)
            watch(staff, learner, teller, config.watch, train.batch_timeout_s)
        summary = {
            "name": config.name, "steps": teller.step, "sampled_tokens": sampled_tokens(folder), "seconds": teller.seconds,
            "ledger": asdict(ray.get(staff.buffer.counts.remote(), timeout=config.watch.start_s)), "checkpoint": newest(folder), "replayed": str(source),
        }  # fmt: skip
        teller.log.summary(summary)
    return result(folder, summary)
