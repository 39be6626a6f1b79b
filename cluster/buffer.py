"""The buffer: who may roll out what, which groups wait for the learner, and what goes into a batch.

One of these runs as an actor; it is the only owner of the ledger and of the task order. Invariants:
- Every admitted lease ends exactly once: as a group that is ready, or as a drop with a reason. A result for a lease
  that is not running (its worker was declared dead, or it came twice) is refused.
- A batch holds no token sampled by weights more than `max_staleness` optimiser batches old (checked when it ships).
- The task of a lease that a lost worker held is leased again, before any new task.
- All waits are bounded: a call returns None when nothing came in time, and the caller asks again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.advantages import AdvantageConfig, GroupStats, summarise, to_samples
from agents.curriculum import Curriculum
from agents.sharding import shard
from agents.types import Group, Sample, StopReason, Task
from cluster.ledger import Counts, Ledger


@dataclass
class BufferConfig:
    """How far rollouts may run ahead of the learner."""

    max_staleness: int = 1
    """Oldest weights a trained token may come from, in optimiser batches. 0: plain synchronous training."""
    groups_per_batch: int = 8
    """Tasks in one optimiser batch."""
    group_size: int = 8
    """Attempts at each task."""
    max_retries: int = 2
    """How often a task is leased again after infrastructure lost it."""
    max_failures_in_a_row: int = 50
    """Leases that infrastructure may lose one after the other before the run stops with the cause."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.max_staleness < 0:
            raise ValueError(f"buffer.max_staleness is {self.max_staleness}; it must be 0 or more")
        for name in ("groups_per_batch", "group_size", "max_failures_in_a_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"buffer.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Lease:
    """Permission to roll one task out `episodes` times."""

    id: str
    task: Task
    episodes: int
    worker: str


@dataclass(frozen=True)
class Batch:
    """What the learner trains on next."""

    step: int
    """Optimiser batches trained before this one."""
    shards: tuple[tuple[Sample, ...], ...]
    """Per learner rank."""
    last: bool
    """True when training ends after this batch."""
    stats: dict[str, float] = field(default_factory=dict)


class OutOfOrder(RuntimeError):
    """The run cannot go on; the message is one line that says why."""


class Buffer:
    """See the module. Methods are coroutines where they wait; wrap with `ray.remote` to host it."""

    def __init__(
        self,
        config: BufferConfig,
        advantage: AdvantageConfig,
        curriculum: Curriculum,
        *,
        steps: int,
        max_minutes: float = 0.0,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._advantage = advantage
        self._curriculum = curriculum
        episodes = config.groups_per_batch * config.group_size
        self._ledger = Ledger(episodes, config.max_staleness)
        if state is not None:
            self._ledger = Ledger.restored(episodes, config.max_staleness, state["ledger"])
            curriculum.restore(state["curriculum"])
        self._step = self._ledger.version
        self._steps = steps
        self._ends_at = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self._serial = itertools.count(self._ledger.admitted)
        self._leases: dict[str, Lease] = {}
        self._groups: dict[str, tuple[Group, ...]] = {}
        self._again: deque[Task] = deque()
        self._retries: Counter[str] = Counter()
        self._batch: Batch | None = None
        self._rows: list[dict[str, Any]] = []
        self._closed = False
        self._gone: set[str] = set()
        self._failed_in_a_row = 0
        self._fatal = ""
        self._incarnation = -1
        self._held = False
        self._changed = asyncio.Condition()

    # -------------------------------------------------------------------------------------------- rollout side

    async def lease(self, worker: str, timeout_s: float = 5.0) -> Lease | None:
        """The next task for `worker`, or None when no episode may start within the time."""
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while self._closed or self._held or self._ledger.capacity <= 0:
                left = deadline - time.monotonic()
                if self._closed or worker in self._gone or left <= 0 or not await self._wait(left):
                    return None
            if worker in self._gone:  # a call of a worker that died since: its lease would never end
                return None
            task = self._again.popleft() if self._again else self._curriculum.sample(1)[0]
            lease = Lease(f"{task.id}/{next(self._serial)}", task, self._config.group_size, worker)
            self._ledger.admit(lease.id, lease.episodes)
            self._leases[lease.id] = lease
            return lease

    async def put(self, lease_id: str, groups: Sequence[Group]) -> bool:
        """Stores a lease's scored groups. False: refused, because the lease is not running."""
        async with self._changed:
            if not self._ledger.is_running(lease_id):
                return False
            lease = self._leases.pop(lease_id)
            if all(t.verdict is not None and t.verdict.masked for g in groups for t in g.trajectories):
                self._ledger.fail(lease_id, _cause(groups))
                self._lease_again(lease.task)
                self._note_failure(_cause(groups))
            else:
                self._failed_in_a_row = 0
                self._ledger.finish(lease_id)
                self._groups[lease_id] = tuple(groups)
            self._changed.notify_all()
            return True

    async def fail(self, lease_id: str, reason: str) -> bool:
        """A rollout that infrastructure lost: dropped with its reason, its task leased again."""
        async with self._changed:
            if not self._ledger.fail(lease_id, reason):
                return False
            self._lease_again(self._leases.pop(lease_id).task)
            self._note_failure(reason)
            self._changed.notify_all()
            return True

    async def worker_lost(self, worker: str) -> int:
        """Fails every lease of a dead worker, and gives it no more. Returns how many."""
        self._gone.add(worker)
        lost = [lease.id for lease in self._leases.values() if lease.worker == worker]
        for lease_id in lost:
            await self.fail(lease_id, "worker_lost")
        return len(lost)

    # -------------------------------------------------------------------------------------------- learner side

    async def enter(self, state: dict[str, Any] | None) -> int:
        """A learner begins, from a checkpoint's `state` or from the start; returns its incarnation.

        A later incarnation takes the ledger back with it: no lease may start before its weights are published, and
        results of earlier leases are refused.
        """
        async with self._changed:
            self._incarnation += 1
            if self._incarnation:
                ledger = state["ledger"] if state else {"version": 0, "trained": 0}
                self._ledger.rewind(int(ledger["version"]), int(ledger["trained"]))
                for lease in self._leases.values():
                    self._lease_again(lease.task)
                self._leases.clear()
                self._groups.clear()
                self._batch = None
                self._step = self._ledger.version
                self._held = True
            return self._incarnation

    async def next_batch(self, step: int, world_size: int = 1, timeout_s: float = 5.0) -> Batch | None:
        """The batch for optimiser step `step`, the same for every rank that asks; None when it is not full in time."""
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while self._batch is None or self._batch.step != step:
                if step != self._step:
                    raise ValueError(f"the learner asks for batch {step}, the ledger is at batch {self._step}")
                self._drop_stale()
                ready = self._ledger.ready_leases()
                if len(ready) >= self._config.groups_per_batch:
                    self._batch = self._ship(ready[: self._config.groups_per_batch], world_size)
                    break
                left = deadline - time.monotonic()
                if left <= 0 or not await self._wait(left):
                    return None
            return self._batch

    async def settle(self, step: int, row: dict[str, Any]) -> None:
        """The optimiser step `step` is done. `row` goes to the run's log, with the ledger's counts."""
        async with self._changed:
            if step != self._step:
                raise ValueError(f"batch {step} was settled while the ledger is at batch {self._step}")
            self._ledger.settle()
            self._step = step + 1
            stats = self._batch.stats if self._batch is not None else {}
            self._batch = None
            self._rows.append(
                {"kind": "train", "step": self._step, "time": time.time(), **stats, **row, **self._ledger_row()}
            )
            self._changed.notify_all()

    async def published(self, version: int, row: dict[str, Any]) -> None:
        """The samplers hold the weights after `version` optimiser batches: admission goes on from here."""
        async with self._changed:
            self._ledger.publish(version)
            self._held = False
            self._rows.append({"kind": "publish", "step": version, "time": time.time(), **row})
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------- others

    async def counts(self) -> Counts:
        """The books. Raises LedgerError if they do not balance."""
        return self._ledger.counts()

    async def rows(self) -> list[dict[str, Any]]:
        """Log rows since the last call. Raises OutOfOrder when leases fail one after the other."""
        if self._fatal:
            raise OutOfOrder(self._fatal)
        rows, self._rows = self._rows, []
        return rows

    async def event(self, message: str) -> None:
        """Adds a line for people to the run's log."""
        self._rows.append({"kind": "event", "step": self._step, "time": time.time(), "message": message})

    async def state(self) -> dict[str, Any]:
        """Plain values that go into a checkpoint together with the learner's."""
        return {"ledger": self._ledger.state(), "curriculum": self._curriculum.state()}

    async def close(self) -> None:
        """No more leases."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------- inside

    async def _wait(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _note_failure(self, reason: str) -> None:
        """Infrastructure that fails every time must end the run, not spin."""
        self._failed_in_a_row += 1
        limit = self._config.max_failures_in_a_row
        if self._failed_in_a_row >= limit and not self._fatal:
            last = next((r["message"] for r in reversed(self._rows) if r["kind"] == "event"), "")
            self._fatal = f"{limit} leases failed one after the other, the last with {reason}" + (
                f" ({last})" if last else ""
            )

    def _lease_again(self, task: Task) -> None:
        self._retries[task.id] += 1
        if self._retries[task.id] <= self._config.max_retries:
            self._again.append(task)

    def _drop_stale(self) -> None:
        """A lease leaves only if every member of it is over age; a single over-age member is withheld at shipping."""
        for lease_id in self._ledger.ready_leases():
            sampled = [t.versions for g in self._groups[lease_id] for t in g.trajectories if t.versions]
            if all(self._step - min(v.step for v in versions) > self._config.max_staleness for versions in sampled):
                self._ledger.drop_ready(lease_id, "stale")
                del self._groups[lease_id]

    def _ship(self, lease_ids: list[str], world_size: int) -> Batch:
        self._ledger.ship(lease_ids)
        groups = [g for lease_id in lease_ids for g in self._groups.pop(lease_id)]
        samples: list[Sample] = []
        stats: list[GroupStats] = []
        over_age = 0
        for group in groups:
            made, found = to_samples(group, self._advantage)
            young = [s for s in made if sample_age(s, self._step) <= self._config.max_staleness]
            over_age += len(made) - len(young)
            samples.extend(young)
            stats.append(found)
        row = {**batch_stats(groups), **summarise(stats), "masked/stale": float(over_age)}
        ages = [sample_age(s, self._step) for s in samples] or [0]
        row["staleness/mean"], row["staleness/max"] = float(np.mean(ages)), float(max(ages))
        judged = {g.task.id: [v.reward for v in g.verdicts if not v.masked] for g in groups}
        self._curriculum.update({task: float(np.mean(rewards)) for task, rewards in judged.items() if rewards})
        last = self._step + 1 >= self._steps or time.monotonic() >= self._ends_at
        return Batch(
            self._step, tuple(tuple(shard(samples, rank, world_size)) for rank in range(world_size)), last, row
        )

    def _ledger_row(self) -> dict[str, float]:
        counts = self._ledger.counts()
        row = {
            f"ledger/{k}": float(getattr(counts, k)) for k in ("admitted", "running", "ready", "in_batch", "trained")
        }
        row["ledger/dropped"] = float(sum(counts.dropped.values()))
        return row | {f"dropped/{reason}": float(n) for reason, n in counts.dropped.items()}


def batch_stats(groups: Sequence[Group]) -> dict[str, float]:
    """What a batch of scored groups looks like, for the log: success, lengths, tool use, endings."""
    members = [t for g in groups for t in g.trajectories]
    row: dict[str, float] = {"episodes": float(len(members))}
    outcomes = [v.parts["outcome"] for g in groups for v in g.verdicts if not v.masked and "outcome" in v.parts]
    if outcomes:
        row["success"] = float(np.mean([value == 1.0 for value in outcomes]))
    row["episode/tokens"] = float(np.mean([sum(len(t.token_ids) for t in m.turns) for m in members]))
    row["episode/sampled_tokens"] = float(np.mean([sum(int(t.mask.sum()) for t in m.turns) for m in members]))
    row["episode/turns"] = float(np.mean([sum(t.role == "policy" for t in m.turns) for m in members]))
    for tool, name in (("search", "searches"), ("open", "opens"), ("find", "finds")):
        row[f"episode/{name}"] = float(np.mean([sum(e.call.name == tool for e in m.events) for m in members]))
    for stop in StopReason:
        share = float(np.mean([m.stop is stop for m in members]))
        if share:
            row[f"stop/{stop}"] = share
    return row


def sample_age(sample: Sample, step: int) -> int:
    """Optimiser batches between the oldest trained token of a sample and the weights that train it."""
    trained = sample.versions[sample.mask == 1]
    return step - int(trained.min()) if len(trained) else 0


def _cause(groups: Sequence[Group]) -> str:
    causes = Counter(c for g in groups for v in g.verdicts for c in v.causes.values())
    return causes.most_common(1)[0][0] if causes else "masked"
