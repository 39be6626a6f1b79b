"""A discrete-event model of a run: rollout workers, engines, tools, judges, buffer, learner and publishing, in simulated seconds.

The admission rule, staleness and the books are not modelled: they are `cluster.ledger.Ledger` itself, driven as the buffer drives
it (oldest ready lease first, over-age leases dropped when a batch ships, over-age members withheld). What is modelled:
- An engine shares itself equally: n sequences with K tokens of context take `step_s + n * per_sequence_s + K * per_context_s` for a
  token each. Prefill is done first and delays the tokens of all (its work is kept, how chunks interleave is not).
- Tools, judges and every actor of one thread are servers in order of arrival with a fixed time per request.
- A publish holds the learner for `publish_s`, and the engines for its last `pause_s`; cached prefixes of older weights are then
  computed again, if `recompute`.
- Learner and engines of one `Host` slow one another down when they ask for more cores than it has.
Failures, evaluations, checkpoints and step-wise sampling are not modelled.

Invariants: the books balance after every event; events happen in order of time, ties in order of their making, so a run is
repeatable by its seed; no server works more than one second a second.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np

from benchmarks.simulation_parts import Episode, Outcome, Step, System, Turn, Workload
from benchmarks.simulation_servers import Engine, Request, Servers
from cluster.ledger import Ledger


class Lease:
    """A group of episodes on its way."""

    __slots__ = ("began", "episodes", "id", "left", "number", "versions", "worker")

    def __init__(self, number: int, worker: int, began: float, episodes: Sequence[Episode]) -> None:
        self.number = number
        self.id = str(number)
        self.worker = worker
        self.began = began
        self.episodes = episodes
        self.left = len(episodes)
        self.versions = [0] * len(episodes)
        """Of each episode: the oldest weights that sampled a token of it."""


class Session:
    """One episode under way."""

    __slots__ = ("attempt", "cached_version", "context", "engine", "episode", "lease", "place")

    def __init__(self, lease: Lease, attempt: int, engine: Engine) -> None:
        self.lease = lease
        self.attempt = attempt
        self.episode = lease.episodes[attempt]
        self.engine = engine
        self.place = 0
        self.context = 0.0
        self.cached_version = -1


class Run:
    """Simulates `steps` optimiser batches: `Run(system, workload, steps).play()`."""

    def __init__(
        self,
        system: System,
        workload: Workload,
        steps: int,
        seed: int = 0,
        watch: Callable[[Run], Any] | None = None,
    ) -> None:
        self.system = system
        self.now = 0.0
        self.serial = count()
        self.ledger = Ledger(system.batch_episodes, system.max_staleness)
        self.engines = [Engine(system.engine, self, i) for i in range(system.engines)]
        self.leases: dict[str, Lease] = {}
        """Those that are running or ready."""
        self.outcome = Outcome()
        self._workload = workload
        self._steps = steps
        self._rng = np.random.default_rng(seed)
        self._watch = watch
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()
        self._workers = [Servers(1) for _ in range(system.workers)]
        self._room = [system.groups_in_flight] * system.workers
        self._asking = deque(range(system.workers if system.groups_in_flight else 0))
        """Workers that wait at the buffer for a lease."""
        self._fleet, self._buffer = Servers(1), Servers(1)
        self._judges, self._tools = Servers(system.judges), Servers(system.tools)
        self._by_load = [(0, i) for i in range(system.engines)]
        self._learner_free = True
        self._asked_at = 0.0
        self._learner_busy_s = self._publish_s = 0.0
        self._under_way = 0
        """Episodes running: kept beside the books, which add them up at every question."""
        self._job: tuple[float, float, float] | None = None
        """The learner's step under way: seconds of work left, of which moment, at what speed."""
        self._job_done: Callable[[], None] = lambda: None
        self._job_turn = 0
        self._integrals = {"at": 0.0, "running": 0.0, "paced": 0.0}

    # ------------------------------------------------------------------------------------------------- events

    def after(self, seconds: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self.serial), do, args))

    def play(self) -> Outcome:
        """To the end of the last step. Raises RuntimeError when nothing can happen any more."""
        self.ledger.enter(0, 0)
        self.ledger.publish(0)
        self._serve_leases()
        while len(self.outcome.steps) < self._steps:
            if not self._events:
                raise RuntimeError(f"the simulated run stands still at step {self.ledger.step}: {self.ledger.counts()}")
            at, _, do, args = heapq.heappop(self._events)
            self._integrate(at)
            self.now = at
            do(*args)
            if self._watch is not None:
                self._watch(self)
        return self._closed()

    def _integrate(self, at: float) -> None:
        sums = self._integrals
        passed = at - sums["at"]
        if passed > 0:
            sums["at"] = at
            sums["running"] += passed * self._under_way
            sums["paced"] += passed * bool(self._asking)

    def _closed(self) -> Outcome:
        made, counts = self.outcome, self.ledger.counts()
        for engine in self.engines:
            engine.settle_accounts()
        made.seconds = self.now
        made.admitted, made.dropped = counts.admitted, sum(counts.dropped.values())
        made.running_mean = self._integrals["running"] / self.now
        made.paced = self._integrals["paced"] / self.now
        made.sampled_tokens = sum(e.made_tokens for e in self.engines)
        busy = sum(e.busy_s for e in self.engines)
        made.batch_mean = sum(e.sequence_s for e in self.engines) / max(1e-9, busy)
        made.busy = {
            "engines": busy / (len(self.engines) * self.now), "learner": self._learner_busy_s / self.now,
            "publish": self._publish_s / self.now, "judges": self._judges.share(self.now), "tools": self._tools.share(self.now),
            "buffer": self._buffer.share(self.now), "fleet": self._fleet.share(self.now),
            "workers": max(w.share(self.now) for w in self._workers),
        }  # fmt: skip
        return made

    # ------------------------------------------------------------------------------------------------ rollouts

    def _serve_leases(self) -> None:
        """What the buffer's condition does: whoever waits for a lease gets one while there is room."""
        while self._asking and self.ledger.capacity > 0:
            worker = self._asking.popleft()
            lease_id = str(number := next(self._numbers))
            self.ledger.admit(lease_id, self.system.group_size)
            self._under_way += self.system.group_size
            episodes = self._workload(number, self._rng)
            if len(episodes) != self.system.group_size:
                raise ValueError(f"lease {number} has {len(episodes)} episodes, a group has {self.system.group_size}")
            lease = Lease(number, worker, self.now, episodes)
            self.leases[lease_id] = lease
            self._room[worker] -= 1
            self.after(self._buffer.done(self.now, self.system.lease_s) - self.now, self._leased, lease)

    def _leased(self, lease: Lease) -> None:
        if self._room[lease.worker] > 0:
            self._asking.append(lease.worker)
            self._serve_leases()
        for attempt in range(len(lease.episodes)):
            self.after(self._fleet.done(self.now, self.system.route_s) - self.now, self._route, lease, attempt)

    def _route(self, lease: Lease, attempt: int) -> None:
        """To the engine with the fewest sessions, where it stays."""
        while True:
            load, place = self._by_load[0]
            engine = self.engines[place]
            if load == engine.sessions:
                break
            heapq.heapreplace(self._by_load, (engine.sessions, place))
        engine.sessions += 1
        heapq.heapreplace(self._by_load, (engine.sessions, place))
        self._ask(Session(lease, attempt, engine))

    def _ask(self, session: Session) -> None:
        """The worker's thread first, then the engine."""
        worker = self._workers[session.lease.worker]
        cost = self.system.turn_s + self.system.turn_per_token_s * session.episode[session.place].sampled_tokens
        wait = worker.done(self.now, cost) - self.now
        if wait:
            self.after(wait, self._submit, session)
        else:
            self._submit(session)

    def _submit(self, session: Session) -> None:
        turn, engine = session.episode[session.place], session.engine
        fresh = session.cached_version == engine.version or not self.system.recompute
        cached = engine.cached(session.context) if fresh else 0.0
        prompt = session.context + turn.prompt_tokens
        session.context = prompt + turn.sampled_tokens
        engine.live_tokens += turn.prompt_tokens + turn.sampled_tokens

        def done(request: Request) -> None:
            if not session.place:
                session.lease.versions[session.attempt] = request.version
            self._answered(session, turn)

        engine.submit(Request(prompt - cached, prompt + turn.sampled_tokens / 2, turn.sampled_tokens, done))

    def _answered(self, session: Session, turn: Turn) -> None:
        session.cached_version = session.engine.version
        session.place += 1
        if session.place == len(session.episode):
            self._ended(session)
            return
        latency_s = max(0.0, turn.tool_s - self.system.tool_service_s)
        served = self._tools.done(self.now, self.system.tool_service_s if turn.tool_s else 0.0)
        self.after(served + latency_s - self.now, self._ask, session)

    def _ended(self, session: Session) -> None:
        engine, lease = session.engine, session.lease
        engine.sessions -= 1
        engine.live_tokens -= session.context
        heapq.heappush(self._by_load, (engine.sessions, engine.place))
        lease.left -= 1
        if not lease.left:
            judged = max(self._judges.done(self.now, self.system.judge_s) for _ in lease.episodes)
            self.after(judged - self.now, self._judged, lease)

    def _judged(self, lease: Lease) -> None:
        self.after(self._buffer.done(self.now, self.system.put_s) - self.now, self._delivered, lease)

    def _delivered(self, lease: Lease) -> None:
        self.ledger.finish(lease.id)
        self._under_way -= self.system.group_size
        self.outcome.lease_s.append(self.now - lease.began)
        self._room[lease.worker] += 1
        if self._room[lease.worker] == 1:
            self._asking.append(lease.worker)
        self._serve_leases()
        self._ship()

    # ------------------------------------------------------------------------------------------------- learner

    def _ship(self) -> None:
        """When the learner waits and a batch is full: as `Buffer.next_batch` does it."""
        if not self._learner_free:
            return
        books, step, most = self.ledger, self.ledger.step, self.system.max_staleness
        for lease_id in books.ready_leases():
            if step - max(self.leases[lease_id].versions) > most:
                books.drop_ready(lease_id, "stale")
                del self.leases[lease_id]
        self._serve_leases()  # what is dropped leaves both sides of the rule
        ready = books.ready_leases()
        if len(ready) < self.system.groups_per_batch:
            return
        self._learner_free = False
        taken = ready[: self.system.groups_per_batch]
        books.ship(taken)
        batch = [self.leases.pop(i) for i in taken]
        ages: list[int] = []
        tokens: list[float] = []
        sampled = 0.0
        for lease in batch:
            for version, episode in zip(lease.versions, lease.episodes, strict=True):
                if step - version <= most:
                    ages.append(step - version)
                    sampled += sum(t.sampled_tokens for t in episode)
                    tokens.append(sum(t.sampled_tokens + t.prompt_tokens for t in episode))
        made = self._buffer.done(self.now, self.system.ship_s * self.system.batch_episodes)
        withheld = self.system.batch_episodes - len(ages)
        self.after(made - self.now, self._train, tokens, sampled, tuple(ages), withheld)

    def _train(self, tokens: Sequence[float], sampled: float, ages: tuple[int, ...], withheld: int) -> None:
        system, began = self.system, self.now
        wait_s = began - self._asked_at

        def done() -> None:
            self._learner_busy_s += self.now - began
            self.ledger.settle()
            self.outcome.steps.append(Step(self.now, wait_s, self.now - began, sum(tokens), sampled, ages, withheld))
            self._publish()

        work = system.learner_s + system.learner_per_token_s * sum(tokens)
        if system.learner_of is not None:
            work = system.learner_of(tokens)
        self._job, self._job_done = (work, self.now, 1.0), done
        self.share_host()
        self._plan_job()

    def _plan_job(self) -> None:
        self._job_turn += 1
        if self._job is not None:
            left, _, speed = self._job
            self.after(left / speed, self._tick_job, self._job_turn)

    def _tick_job(self, turn: int) -> None:
        if turn == self._job_turn:
            self._job = None
            self.share_host()
            self._job_done()

    def _publish(self) -> None:
        pause_s = min(self.system.pause_s, self.system.publish_s)
        self._publish_s += self.system.publish_s
        self.after(self.system.publish_s - pause_s, self._hold)
        self.after(self.system.publish_s, self._published)

    def _hold(self) -> None:
        if self.system.pause_s:
            for engine in self.engines:
                engine.pause()
            self.share_host()

    def _published(self) -> None:
        for engine in self.engines:
            engine.resume(self.ledger.step)
        self.share_host()
        self.ledger.publish(self.ledger.step)
        self.ledger.checkpointed(self.ledger.step)
        self._learner_free, self._asked_at = True, self.now
        self._serve_leases()
        self._ship()

    # ---------------------------------------------------------------------------------------------- one machine

    def share_host(self) -> None:
        """Gives everybody on a shared machine his share of its cores."""
        if not self.system.cores:
            return
        asked = sum(e.cores for e in self.engines) + (self._job is not None)
        speed = min(1.0, self.system.cores / asked) if asked else 1.0
        for engine in self.engines:
            engine.set_speed(speed)
        if self._job is not None and self._job[2] != speed:
            left, at, before = self._job
            self._job = (max(0.0, left - (self.now - at) * before), self.now, speed)
            self._plan_job()
