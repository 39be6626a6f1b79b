"""The buffer: who may roll out what, which groups wait for the learner, and what goes into a batch.

One of these runs as an actor; it is the only owner of the ledger and of the task order. Invariants:
- Every admitted lease ends exactly once: as a group that is trained, or as a drop with a reason. A result for a lease
  that is not running (its worker or its learner's incarnation is dead, or it came twice) is refused.
- A batch holds no token sampled by weights more than `max_staleness` optimiser batches old (checked when it ships),
  nor by weights that the current ones do not descend from.
- Every move of the ledger is in the journal before it is made: a buffer whose process died comes back with exact
  books; the groups it held are dropped as `buffer_lost` and their tasks leased again. What was masked, and a pause for it, stand
  there too.
- A learner that (re)starts takes ledger and task order back with it; calls of an earlier incarnation raise `Fenced`.
- All waits are bounded: a call returns None when nothing came in time, and the caller asks again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.advantages import AdvantageConfig, lost_cause, masked_cause, masked_causes, trained_members
from agents.curriculum import CURRICULA, Curriculum
from agents.recordfile import RecordWriter, read_records
from agents.types import Group, Member, RecordError, Task
from cluster.batch import Batch, make_batch, sampled_tokens
from cluster.errors import Fenced, UserError
from cluster.journal import Seen
from cluster.ledger import Counts, Ledger, LedgerError
from cluster.watchdog import Pulse, pulse_of
from rewards.judges.health import JUDGE, TOOLS, MaskConfig, MaskMonitor
from rewards.registry import make_shaper
from rewards.seeds.shaping import ShaperConfig

SHOWN = 3
"""Step-sampled groups of a batch that are kept for the report."""
NOBODYS_FAULT = frozenset({"worker_lost", "lineage", "lease_lost"})
"""Reasons that say nothing about the task, nor about infrastructure that fails every time."""


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
    lease_timeout_s: float = 14400.0
    """A lease that was not delivered after so long is given up: its answer got lost."""
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
class BufferSetup:
    """What a buffer is made from, in one value that crosses processes."""

    buffer: BufferConfig
    advantage: AdvantageConfig
    steps: int
    """Optimiser batches of the run."""
    curriculum: str = "uniform"
    tasks: str = ""
    """File of the training tasks. A file, because an actor that is started again is made from its arguments, and Ray may
    have dropped large ones by then."""
    seed: int = 0
    ends_at: float = float("inf")
    """Unix time after which no further batch ships."""
    max_sampled_tokens: int = 0
    """Sampled tokens with which the run ends; 0: no limit."""
    sampled_tokens: Mapping[int, float] = field(default_factory=dict)
    """Those of earlier starts of the run, by optimiser step from 1."""
    max_learner_failures: int = 5
    """Learners that may begin one after the other without an optimiser step between them."""
    journal: str = ""
    """File of the ledger's moves; empty: none is kept (tests)."""
    record: str = ""
    """Folder that keeps every delivered group; empty: none."""
    about: Mapping[str, Any] | None = None
    """What the recorded groups say of themselves: run, protocol, fingerprints."""
    shaper: ShaperConfig = field(default_factory=ShaperConfig)
    """What happens to the rewards of a batch when it ships."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """When masked rollouts pause the run."""


@dataclass(frozen=True)
class Lease:
    """Permission to roll one task out `episodes` times."""

    id: str
    task: Task
    episodes: int
    worker: str
    incarnation: int = 0
    began: float = 0.0
    """Unix seconds."""


class OutOfOrder(RuntimeError):
    """The run cannot go on; the message is one line that says why."""


class Buffer:
    """See the module. Methods are coroutines where they wait; wrap with `ray.remote` to host it."""

    def __init__(self, setup: BufferSetup, curriculum: Curriculum | None = None) -> None:
        config = setup.buffer
        self._setup, self._config = setup, config
        self._curriculum = curriculum or CURRICULA[setup.curriculum](read_records(setup.tasks, Task), setup.seed)
        self._shaper = make_shaper(setup.shaper)
        self._masks = MaskMonitor(setup.mask)
        self._leases: dict[str, Lease] = {}
        """Every lease that may still be trained, or be taken back by a restore."""
        self._groups: dict[str, tuple[Group, ...]] = {}
        self._again: deque[Task] = deque()
        self._spare: Counter[str] = Counter()
        """Tasks the curriculum will draw once more though their groups are at hand: to be passed over."""
        self._retries: Counter[str] = Counter()
        self._tokens = dict(setup.sampled_tokens)
        self._batch: Batch | None = None
        self._stepped: list[Group] = []
        self._rows: list[dict[str, Any]] = []
        self._closed = False
        self._gone: set[str] = set()
        self._failed_in_a_row = 0
        self._learners_in_a_row = 0
        self._fatal = ""
        self._waited_s = 0.0
        self._learner: Any = None
        self._lost_batch: list[Task] = []
        self._lost_stats: Mapping[str, float] = {}
        """Of the batch that the learner held when this process's predecessor died."""
        self._saved_step = 0
        """Step of the last checkpoint."""
        self._since = time.time()
        """When what the run waits for last changed."""
        self._changed = asyncio.Condition()
        self._recorder: Any = None
        if setup.record:
            from cluster.record import Recorder

            self._recorder = Recorder(Path(setup.record), setup.about or {})
        episodes = config.groups_per_batch * config.group_size
        self._initial = {"curriculum": self._curriculum.state(), "pending": [], "spare": {}, "shaper": {}}
        self._journal: RecordWriter | None = None
        self._reborn = False
        self._serial = itertools.count()
        if not setup.journal:
            self._ledger = Ledger(episodes, config.max_staleness)
            return
        self._open_journal(Path(setup.journal), episodes)

    def _open_journal(self, path: Path, episodes: int) -> None:
        """Opens it, and comes back from what it holds. One that cannot be followed steps aside: checkpoints have the books too."""
        seen = Seen()
        try:
            self._journal = RecordWriter(path)  # mends what a killed writer left half-written
            self._ledger = Ledger.replayed(episodes, self._config.max_staleness, seen.all(path), self._write)
        except (RecordError, LedgerError) as error:
            aside = path.with_name(f"damaged-{int(time.time())}-{path.name}")
            path.rename(aside)
            self._journal = RecordWriter(path)
            self._ledger = Ledger(episodes, self._config.max_staleness, self._write)
            self._serial = itertools.count(int(time.time()))  # no lease of before has such a number
            self._say(f"the journal was set aside as {aside.name}, the books go on from the checkpoint: {error}")
            return
        self._serial = itertools.count(seen.leases)
        self._saved_step = seen.saved
        if seen.masks:
            self._masks.restore(seen.masks)
        if seen.moves:
            self._come_back(seen)

    # -------------------------------------------------------------------------------------------- rollout side

    async def lease(self, worker: str, timeout_s: float = 5.0) -> Lease | None:
        """The next task for `worker`, or None when no episode may start within the time."""
        if self._closed or worker in self._gone:
            await asyncio.sleep(timeout_s)  # else the worker would ask again at once, for ever
            return None
        began = time.time()
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            idle = not any(self._leases[i].worker == worker for i in self._ledger.running_leases() if i in self._leases)
            try:
                while self._closed or self._ledger.held or self._ledger.capacity <= 0 or not self._masks.may_begin():
                    left = deadline - time.monotonic()
                    if self._closed or worker in self._gone or left <= 0 or not await self._wait(left):
                        return None
                if worker in self._gone:  # a call of a worker that died since: its lease would never end
                    return None
            finally:
                waited_s = time.time() - began
                if idle and waited_s > 0.01:  # with leases under way it waits for more work, not for work
                    self._waited_s += waited_s
                    self._span(worker, "wait", began, time.time())
            task = self._next_task()
            lease = Lease(
                f"{task.id}/{next(self._serial)}", task, self._config.group_size, worker, self._ledger.incarnation, time.time()
            )  # fmt: skip
            self._ledger.admit(lease.id, lease.episodes, task.id)
            self._leases[lease.id] = lease
            self._masks.began(lease.id)
            return lease

    async def put(self, lease_id: str, groups: Sequence[Group]) -> bool:
        """Stores a lease's scored groups. False: refused, because the lease is not running."""
        if self._recorder is not None and self._ledger.is_running(lease_id):
            try:
                for group in groups:
                    await asyncio.to_thread(self._recorder.write, group)
            except (OSError, RecordError) as error:
                self._fatal = self._fatal or f"groups cannot be recorded in {self._setup.record}: {error}; mend that and go on with resume="  # fmt: skip
        async with self._changed:
            if not self._ledger.is_running(lease_id):
                return False
            lease = self._leases[lease_id]
            self._tell_spans(lease, groups)
            self._watch_masks(lease_id, groups)
            lost = [lost_cause(group) for group in groups] or ["masked"]
            if not all(self._descends(group) for group in groups):
                self._drop_running(lease_id, "lineage")
            elif all(lost):
                self._drop_running(lease_id, lost[0])
                if not self._masks.paused:  # a pause waits for what failed, however long that takes
                    self._note_failure(lost[0])
            else:
                self._failed_in_a_row = 0
                self._retries.pop(lease.task.id, None)
                self._ledger.finish(lease_id)
                self._groups[lease_id] = tuple(groups)
            self._changed.notify_all()
            return True

    async def fail(self, lease_id: str, reason: str) -> bool:
        """A rollout that infrastructure lost: dropped with its reason, its task leased again."""
        async with self._changed:
            if not self._ledger.is_running(lease_id):
                return False
            self._drop_running(lease_id, reason)
            if reason not in NOBODYS_FAULT:
                self._note_failure(reason)
            self._changed.notify_all()
            return True

    async def worker_lost(self, worker: str) -> int:
        """Fails every lease of a dead worker, and gives it no more. Returns how many."""
        self._gone.add(worker)
        lost = [i for i in self._ledger.running_leases() if i in self._leases and self._leases[i].worker == worker]
        for lease_id in lost:
            await self.fail(lease_id, "worker_lost")
        if lost:
            self._say(f"{worker} died with {len(lost)} leases, which are leased again")
        return len(lost)

    # -------------------------------------------------------------------------------------------- learner side

    async def enter(self, saved: Mapping[str, Any] | None, learner: Any = None) -> int:
        """A learner begins, from a checkpoint's `saved` state or from the start; returns its incarnation.

        `learner`: a handle by which the driver can end it.

        The books and the order of tasks go back with it. Groups at hand that its weights may still train return to
        ready; no lease may start before its weights are published; results of earlier leases are refused.
        """
        async with self._changed:
            self._learners_in_a_row += 1
            if self._learners_in_a_row > self._setup.max_learner_failures:
                self._fatal = self._fatal or (
                    f"{self._learners_in_a_row - 1} learners ended one after the other without an optimiser step; "
                    "their errors stand in Ray's logs of the workers (ray_train/ of the run, and the console with ray.log_to_driver=true)"
                )
            if saved and "ledger" not in saved:
                raise RecordError(
                    "the checkpoint is of a replay; start a live run under another name= (model.path: its weights)"
                )
            if not saved and self._saved_step:
                raise UserError(
                    f"learner {self._ledger.incarnation + 1} finds no checkpoint, and there was one of step {self._saved_step}: its node does not "
                    "see the run's storage, or the checkpoints were removed; mend that and go on with resume=, or begin anew by another name="
                )
            ledger = saved["ledger"] if saved else {"version": 0, "trained": 0}
            step, trained = int(ledger["version"]), int(ledger["trained"])
            if saved and (step > self._ledger.step or trained > self._ledger.trained):
                self._ledger.restore(ledger)  # the journal is gone, or of another run
            before = self._ledger.step
            at_hand = [*self._ledger.recent_leases(step), *self._ledger.batch_leases(), *self._ledger.ready_leases()]
            keep = [i for i in at_hand if i in self._groups and self._may_train(self._groups[i], step)]
            self._ledger.enter(step, trained, keep)
            self._groups = {i: self._groups[i] for i in keep}
            self._leases = {i: self._leases[i] for i in keep}
            self._set_order(saved if saved else self._initial, [lease.task.id for lease in self._leases.values()])
            self._batch, self._learner = None, learner
            self._reborn = False
            self._saved_step = step
            self._since = time.time()
            number = self._ledger.incarnation
            if number:
                self._rows.append({"kind": "fence", "step": step, "time": time.time(), "incarnation": number})
                self._say(
                    f"learner {number} begins at step {step} (the one before was at {before}); "
                    f"{len(keep)} groups return to ready, the rest since is dropped as lineage"
                )
            self._changed.notify_all()
            return number

    async def next_batch(
        self, incarnation: int, step: int, world_size: int = 1, timeout_s: float = 5.0, shared: bool = False,
        ranks: tuple[int, int] | None = None,
    ) -> Batch | None:  # fmt: skip
        """The batch for optimiser step `step`, the same for every rank that asks; None when it is not full in time.

        `shared`: the learner computes shared prefixes once (see `agents.sharding`). `ranks`: (first, count) of those whose parts the caller
        trains, and is sent; None: all.
        """
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while self._batch is None or self._batch.step != step:
                self._fence(incarnation)
                if step != self._ledger.step:
                    raise ValueError(f"the learner asks for batch {step}, the ledger is at batch {self._ledger.step}")
                if self._reborn and self._ledger.in_batch:
                    if world_size > 1:  # another rank may hold the batch that was lost here
                        raise Fenced(f"batch {step} was lost with the buffer while it was handed out")
                    self._ledger.lose("buffer_lost", ["in_batch"])
                    self._again.extend(self._lost_batch)
                self._drop_stale()
                self._drop_lost()
                ready = self._ledger.ready_leases()
                if len(ready) >= self._config.groups_per_batch:
                    self._batch = self._ship(ready[: self._config.groups_per_batch], world_size, shared)
                    self._since = time.time()
                    break
                left = deadline - time.monotonic()
                if left <= 0 or not await self._wait(left):
                    return None
            self._fence(incarnation)
            return self._batch if ranks is None else self._batch.only(*ranks)

    async def settle(self, incarnation: int, step: int, row: dict[str, Any]) -> None:
        """The optimiser step `step` is done. `row` goes to the run's log, with the ledger's counts."""
        async with self._changed:
            self._fence(incarnation)
            if step == self._ledger.step - 1:
                return  # asked again because the answer was lost
            if step != self._ledger.step:
                raise ValueError(f"batch {step} was settled while the ledger is at batch {self._ledger.step}")
            now = time.time()
            stats = self._batch.stats if self._batch is not None else self._lost_stats
            whole = {"kind": "train", "step": step + 1, "time": now, **stats, "rollout/wait_s": self._waited_s, **row}
            whole["incarnation"] = float(incarnation)
            self._waited_s = 0.0
            leases = self._ledger.batch_leases()
            whole.update(self._ledger_row(settled=True) | self._masks.row())
            if self._shaper is not None:
                self._shaper.update([g for i in leases for g in self._groups.get(i, ())])
            self._ledger.settle(row=whole)
            if step - self._saved_step > self._config.max_staleness:
                for lease_id in leases:  # no restore could use them any more
                    self._groups.pop(lease_id, None)
                    self._leases.pop(lease_id, None)
            self._write({"op": "order", **self._order()})
            self._batch, self._reborn, self._learners_in_a_row = None, False, 0
            self._since = now
            self._rows.append(whole)
            train_s, wait_s = float(row.get("time/train_s", 0.0)), float(row.get("time/wait_s", 0.0))
            parts = {
                k: row[f"time/{k}_s"] for k in ("pack", "forward", "backward", "optimiser") if f"time/{k}_s" in row
            }
            self._span("learner", "wait", now - train_s - wait_s, now - train_s)
            self._span("learner", "train", now - train_s, now, seconds=parts)
            self._changed.notify_all()

    async def published(self, incarnation: int, version: int, row: dict[str, Any]) -> None:
        """The samplers hold the weights after `version` optimiser batches: admission goes on from here."""
        async with self._changed:
            self._fence(incarnation)
            self._ledger.publish(version)
            now = self._since = time.time()
            self._rows.append({"kind": "publish", "step": version, "time": now, **row})
            pause = {"pause": row.get("publish/pause_ms", 0.0) / 1000}
            self._span("fleet", "publish", now - row.get("publish/seconds", 0.0), now, seconds=pause)
            self._span("learner", "publish", now - row.get("time/publish_s", 0.0), now)
            self._changed.notify_all()

    async def checkpointed(self, incarnation: int, step: int, seconds: float = 0.0) -> None:
        """A checkpoint of step `step` is on disk: what was trained before it will not be taken back."""
        async with self._changed:
            self._fence(incarnation)
            self._ledger.checkpointed(step)
            if self._journal is not None:
                self._journal.sync()  # the checkpoint is on the disk, so its books must be
            self._saved_step = step
            held = {*self._ledger.running_leases(), *self._ledger.ready_leases(), *self._ledger.batch_leases()}
            held.update(self._ledger.recent_leases())
            self._groups = {i: g for i, g in self._groups.items() if i in held}
            self._leases = {i: lease for i, lease in self._leases.items() if i in held}
            self._span("learner", "checkpoint", time.time() - seconds, time.time())

    async def state(self) -> dict[str, Any]:
        """Plain values that go into a checkpoint together with the learner's."""
        return {"ledger": self._ledger.state(), **self._order()}

    async def stop(self, reason: str) -> None:
        """The run must end; `reason` is one line for the user."""
        self._fatal = self._fatal or reason
        await self.close()

    # ------------------------------------------------------------------------------------------------- driver

    async def counts(self) -> Counts:
        """The books. Raises LedgerError if they do not balance."""
        return self._ledger.counts()

    async def rows(self) -> list[dict[str, Any]]:
        """Log rows since the last call. Raises OutOfOrder when the run cannot go on."""
        if self._fatal:
            raise OutOfOrder(self._fatal)
        rows, self._rows = self._rows, []
        return rows

    async def stepped(self) -> list[Group]:
        """A few groups of the last batch that were sampled step by step, for the report: evaluations show none."""
        return self._stepped

    async def event(self, message: str) -> None:
        """Adds a line for people to the run's log."""
        self._say(message)

    async def pulse(self) -> Pulse:
        """What the run waits for here, and since when (unix seconds)."""
        books, batch = self._ledger, self._config.groups_per_batch
        if books.held:
            what = f"learner {books.incarnation} to publish its weights" if books.incarnation >= 0 else "a learner"
        elif books.in_batch:
            what = f"the learner to train batch {books.step}"
        elif books.version < books.step:
            what = f"the weights of step {books.step} to be published"
        elif self._masks.paused:
            what = f"an end of {self._masks.paused}, which masks too many rollouts"
        else:
            ready, running = len(books.ready_leases()), books.running_leases()
            what = f"batch {books.step}, which has {ready} of {batch} groups; {len(running)} leases are running"
            oldest = min((self._leases[i] for i in running if i in self._leases), key=lambda x: x.began, default=None)
            if oldest is not None:
                what += f", the oldest ({oldest.id}) at {oldest.worker} for {time.time() - oldest.began:.0f} s"
        return pulse_of(what, self._since)

    async def idle_learner(self, longer_than_s: float) -> Any:
        """The learner's handle when the run has waited for it so long, else None."""
        books = self._ledger
        its_turn = books.held or books.in_batch or books.version < books.step
        return self._learner if its_turn and time.time() - self._since > longer_than_s else None

    async def close(self) -> None:
        """No more leases."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.close()

    # -------------------------------------------------------------------------------------------------- inside

    async def _wait(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _write(self, move: dict[str, Any]) -> None:
        """A move, to the journal. A disk that takes no more ends the run: books that are not kept cannot be trusted."""
        if self._journal is None:
            return
        try:
            self._journal.write({**move, "time": round(time.time(), 3)})
        except OSError as error:
            self._fatal = self._fatal or (
                f"the journal {self._setup.journal} cannot be written: {error.strerror}; the last checkpoint is whole: "
                "free some space and go on with resume="
            )
            raise

    def _fence(self, incarnation: int) -> None:
        if incarnation != self._ledger.incarnation:
            raise Fenced(f"learner {incarnation} was replaced by learner {self._ledger.incarnation}")

    def _come_back(self, seen: Seen) -> None:
        """After a death of the process: the books are exact, what it held is gone."""
        books = self._ledger
        lost = len(books.running_leases()) + len(books.ready_leases())
        if lost:
            books.lose("buffer_lost")
        self._lost_batch = [self._curriculum.task(seen.tasks[i]) for i in books.batch_leases()]
        self._set_order(seen.order or self._initial, [task.id for task in self._lost_batch])
        self._lost_stats = seen.stats
        self._tokens |= seen.tokens
        self._reborn = True
        self._since = time.time()
        if books.incarnation >= 0:  # the driver may not have fetched these
            began = {"kind": "fence", "step": books.branches[-1], "time": self._since, "incarnation": books.incarnation}
            self._rows.append(began)
        self._say(f"the buffer came back from its journal; {lost} leases it held are leased again")
        self._rows.extend({**row, "again": 1.0} for row in seen.rows)

    def _order(self) -> dict[str, Any]:
        """Where the order of tasks stands: the curriculum's own state, and tasks that it has drawn and nobody has trained."""
        drawn = [*self._ledger.running_leases(), *self._ledger.ready_leases()]
        pending = [self._leases[i].task.id for i in drawn if i in self._leases] + [t.id for t in self._again]
        shaper = self._shaper.state() if self._shaper is not None else {}
        return {
            "curriculum": self._curriculum.state(), "pending": pending, "spare": dict(self._spare), "shaper": shaper,
        }  # fmt: skip

    def _set_order(self, saved: Mapping[str, Any], at_hand: Sequence[str]) -> None:
        """Inverse of `_order`. Groups of the tasks `at_hand` exist already, so these are not drawn again."""
        self._curriculum.restore(saved["curriculum"])
        if self._shaper is not None:
            self._shaper.load_state(saved.get("shaper", {}))
        pending, have = Counter(saved["pending"]), Counter(at_hand)
        self._again = deque(self._curriculum.task(t) for t in (pending - have).elements())
        self._spare = Counter(saved.get("spare", {})) + (have - pending)
        self._write({"op": "order", **self._order()})

    def _next_task(self) -> Task:
        if self._again:
            return self._again.popleft()
        while True:
            task = self._curriculum.sample(1)[0]
            if not self._spare[task.id]:
                return task
            self._spare[task.id] -= 1

    def _drop_running(self, lease_id: str, reason: str) -> None:
        task = self._leases[lease_id].task
        self._ledger.fail(lease_id, reason)
        del self._leases[lease_id]
        if reason not in NOBODYS_FAULT:
            self._retries[task.id] += 1
        if self._retries[task.id] <= self._config.max_retries:
            self._again.append(task)

    def _note_failure(self, reason: str) -> None:
        """Infrastructure that fails every time must end the run, not spin."""
        self._failed_in_a_row += 1
        limit = self._config.max_failures_in_a_row
        if self._failed_in_a_row >= limit and not self._fatal:
            last = next((r["message"] for r in reversed(self._rows) if r["kind"] == "event"), "")
            self._fatal = f"{limit} leases failed one after the other, the last with {reason}" + (
                f" ({last})" if last else ""
            )

    def _descends(self, group: Group) -> bool:
        """Whether all weights that sampled it, discarded candidates included, are ancestors of the current ones."""
        sampled = (t for part in (group, *group.steps) for t in part.trajectories)
        return all(self._ledger.descends(v.incarnation, v.step) for t in sampled for v in t.versions)

    def _may_train(self, groups: Sequence[Group], step: int) -> bool:
        """Whether weights of `step` may train these: sampled by their ancestors, and not all over age."""
        newest = max((v.step for g in groups for part in (g, *g.steps) for t in part.trajectories for v in t.versions), default=0)  # fmt: skip
        return newest <= step and all(map(self._descends, groups)) and self._some_young(groups, step)

    def _some_young(self, groups: Sequence[Group], step: int) -> bool:
        """Whether some trained member's own tokens are no older than weights of `step` may train."""
        oldest = (_oldest(m) for g in groups for m in trained_members(g))
        return any(step - old <= self._config.max_staleness for old in oldest if old is not None)

    def _drop_stale(self) -> None:
        """A lease leaves only if every trained member of it is over age; a single over-age one is withheld at shipping."""
        for lease_id in self._ledger.ready_leases():
            if not self._some_young(self._groups[lease_id], self._ledger.step):
                self._ledger.drop_ready(lease_id, "stale")
                del self._groups[lease_id]
                del self._leases[lease_id]

    def _drop_lost(self) -> None:
        """Leases whose delivery got lost on the way: nobody will ever bring them."""
        too_old = time.time() - self._config.lease_timeout_s
        for lease_id in self._ledger.running_leases():
            if self._leases[lease_id].began < too_old:
                self._drop_running(lease_id, "lease_lost")

    def _ship(self, lease_ids: list[str], world_size: int, shared: bool) -> Batch:
        step = self._ledger.step
        groups = [g for lease_id in lease_ids for g in self._groups[lease_id]]
        last = step + 1 >= self._setup.steps or time.time() >= self._setup.ends_at
        batch = make_batch(
            step, self._shaped(groups), self._setup.advantage, max_staleness=self._config.max_staleness, world_size=world_size, last=last,
            shared=shared,
        )  # fmt: skip
        self._tokens[step + 1] = sum(map(sampled_tokens, groups))  # of a step that is taken again, the last
        most = self._setup.max_sampled_tokens
        if most and sum(n for s, n in self._tokens.items() if s <= step + 1) >= most:
            batch = replace(batch, last=True)
        self._stepped = [g for g in groups if g.steps][:SHOWN] or self._stepped
        self._ledger.ship(lease_ids, stats=batch.stats, tokens=self._tokens[step + 1])
        judged = {g.task.id: [v.reward for v in g.verdicts if not v.masked] for g in groups}
        self._curriculum.update({task: float(np.mean(rewards)) for task, rewards in judged.items() if rewards})
        return batch

    def _shaped(self, groups: list[Group]) -> list[Group]:
        return groups if self._shaper is None else self._shaper.shape(groups)

    def _watch_masks(self, lease_id: str, groups: Sequence[Group]) -> None:
        causes = [cause for g in groups for cause in masked_causes(g)]
        if line := self._masks.see(lease_id, causes, _answered(groups)):
            self._say(line)
        if line or self._masks.paused or any(causes):
            self._write({"op": "masks", **self._masks.state()})
        if self._masks.paused:
            self._since = time.time()  # the run waits on purpose, and this is a sign of life
            self._rows.append({"kind": "pause", "step": self._ledger.step, "time": self._since})

    def _ledger_row(self, *, settled: bool = False) -> dict[str, float]:
        """The books for the log; `settled`: as they will stand once what is in the batch is trained."""
        counts = self._ledger.counts()
        if settled:
            counts = replace(counts, in_batch=0, trained=counts.trained + counts.in_batch)
        row = {
            f"ledger/{k}": float(getattr(counts, k)) for k in ("admitted", "running", "ready", "in_batch", "trained")
        }
        row["ledger/dropped"] = float(sum(counts.dropped.values()))
        return row | {f"dropped/{reason}": float(n) for reason, n in counts.dropped.items()}

    def _say(self, message: str) -> None:
        self._rows.append({"kind": "event", "step": self._ledger.step, "time": time.time(), "message": message})

    def _span(self, actor: str, phase: str, began: float, ended: float, **more: Any) -> None:
        row = {"kind": "span", "actor": actor, "phase": phase, "began": round(began, 4), "ended": round(ended, 4)}
        self._rows.append({**row, "step": self._ledger.step, "time": ended, **more})

    def _tell_spans(self, lease: Lease, groups: Sequence[Group]) -> None:
        now = time.time()
        judge_s = max((g.seconds.get("judge", 0.0) for g in groups), default=0.0)
        parts = {k: sum(g.seconds.get(k, 0.0) for g in groups) for k in ("generate", "tools")}
        self._span(lease.worker, "rollout", lease.began, now - judge_s, seconds=parts)
        self._span(lease.worker, "judge", now - judge_s, now)


def _answered(groups: Sequence[Group]) -> set[str]:
    """Sources that answered a rollout, or a candidate of a step, which is not masked.

    A rollout that ended well and used no tool had no need of any.
    """
    found = set()
    for verdict in (v for g in groups for part in (g, *g.steps) for v in part.verdicts if not v.masked):
        if verdict.prompts and not verdict.status:
            found.add(JUDGE)
    for trajectory in (m.trajectory for g in groups for m in g.members if not masked_cause(m)):
        if trajectory.stop.finished or not all(event.error for event in trajectory.events):
            found.add(TOOLS)
    return found


def _oldest(member: Member) -> int | None:
    """Step of the oldest weights that sampled a token which this member trains."""
    turns = member.trajectory.turns[member.first_turn :]
    return min((span.version.step for turn in turns for span in turn.version_spans), default=None)
