"""The run stage: units are played by workers, and written as they end.

Invariants: so many questions are under way as the workers have room for, no more; a unit that infrastructure failed is begun again after a
pause, `tries` times, then written as failed; a worker that died is replaced, and what it played is begun again: in smaller and smaller company,
until the question that it dies of plays alone and has its tries, while the others lost none; each unit that ended is written once, by this
process alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from agents.text import exact_match
from agents.types import BackendInfo, Version
from cluster.actors import came_up
from cluster.errors import UserError, one_line
from cluster.evaluation.config import TOKEN_AGENT, EvalConfig
from cluster.evaluation.engines import place as place_engines
from cluster.evaluation.engines import place_turns, served
from cluster.evaluation.journal import UNITS, Folder, Key
from cluster.evaluation.plan import Job, guarded
from cluster.evaluation.records import Played, State
from cluster.evaluation.workers import EvalWorker, Kit
from cluster.fleet import Fleet
from cluster.model import prepare_model
from cluster.progress import LOG_EVERY_S, Progress
from cluster.retrieval_actors import LASTING
from cluster.retrieval_actors import place as place_retrieval
from cluster.runlog import RunLog
from cluster.runtime import actor
from cluster.speech import make_speech
from cluster.watchdog import Poll, Tally, Watchdog

POLL_S = 0.1
RETRY_S = 2.0
"""Pause before a unit is begun again; doubles with every try."""


class Teller:
    """What an evaluation tells: a progress line, and lines that stay."""

    def __init__(self, log: RunLog, total: int, unit: str) -> None:
        self.log, self.progress = log, Progress(total, unit=unit, every_s=LOG_EVERY_S)
        self._began = time.monotonic()
        self.right = self.judged = self.done = 0
        self.cost = 0.0

    def begin(self) -> None:
        """From now on the pace counts."""
        self._began = time.monotonic()
        self.progress.begin()

    def event(self, message: str) -> None:
        self.log.event(self.done, message)
        self.progress.note(message)

    def ended(self, played: Played, folder: Folder) -> None:
        """A unit came to its end."""
        self.done += 1
        trajectory = played.trajectory
        if trajectory is not None:
            self.cost += sum(turn.usage.cost for turn in trajectory.turns if turn.usage)
            answers = folder.tasks[played.unit.task].answers
            if played.state is State.done and answers and not played.probe:
                self.judged += 1
                self.right += exact_match(trajectory.answer, answers)
        row = {"questions_per_min": self.rate}
        row |= {"success": self.right / self.judged} if self.judged else {}
        row |= {"cost": self.cost} if self.cost else {}
        self.progress.update(self.done, row)

    @property
    def rate(self) -> float:
        """Questions per minute."""
        return 60 * self.done / max(1e-3, time.monotonic() - self._began)

    def close(self) -> None:
        self.progress.close()


@dataclass
class Staff:
    """Everybody who plays. `staffed` makes and ends one."""

    config: EvalConfig
    kit: Kit
    fleet: Any = None
    engines: list[Any] = field(default_factory=list)
    retrieval: Any = None
    info: BackendInfo | None = None
    turns: Any = None
    """`cluster.evaluation.engines.Turns`, where several workers share chat engines."""

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.config.watch)
        self.workers: dict[str, Any] = {}
        self._names = itertools.count()
        self._replaced = Tally(self.config.rollout.max_restarts)
        self._events = Poll(self.fleet.events.remote) if self.fleet is not None else None

    def new_worker(self) -> Any:
        name = f"player-{next(self._names)}"
        made = actor(EvalWorker).remote(name, self.kit, self.fleet, self.engines, self.retrieval, self.info, self.turns)
        self.workers[name] = made
        self.watchdog.watch(name, made, functools.partial(self.replace, name))
        return made

    def replace(self, name: str, reason: str) -> str:
        """Another worker for one that died, or seems to have."""
        if name not in self.workers:
            return f"{name} was replaced already"
        self.watchdog.forget(name)
        _kill(self.workers.pop(name))
        if self._replaced.exceeded():
            raise UserError(f"workers died {self._replaced.count} times within an hour, the last with: {reason}")
        for told in (self.fleet, self.turns):
            if told is not None:
                told.worker_lost.remote(name)
        self.new_worker()
        return f"{name} died, and another took its place: {reason}"

    def tend(self) -> list[str]:
        """Looks after everybody; returns lines for the log. Raises UserError when somebody dies too often."""
        return [*self.watchdog.look(), *((self._events.take() or ()) if self._events is not None else ())]


def play(config: EvalConfig, folder: Folder, jobs: list[Job], index_dir: str | None, teller: Teller) -> None:
    """Plays the jobs to their end, in an open Ray session. Raises UserError when nothing works any more."""
    with staffed(config, folder, index_dir, len(jobs)) as staff:
        work(staff, folder, jobs, teller)


def work(staff: Staff, folder: Folder, jobs: Sequence[Job], teller: Teller) -> None:
    """Plays the jobs by a staff that is there."""
    config = staff.config
    teller.begin()
    with folder.writer(UNITS) as writer:
        waiting = deque((job, 1, 0.0) for job in jobs)
        playing: dict[Any, tuple[Job, int, str]] = {}
        seats = Seats(per_worker(config))
        causes: deque[str] = deque(maxlen=config.patience)
        while waiting or playing:
            for name in sorted(staff.workers, key=seats.taken) * seats.most:
                if not waiting or waiting[0][2] > time.monotonic() or not seats.free(name, waiting[0][0].key):
                    continue
                job, tries, _ = waiting.popleft()
                playing[staff.workers[name].play.remote(job.task, job.unit, job.probe)] = job, tries, name
                seats.take(name, job.key)
            for reference in _ended(playing):
                job, tries, name = playing.pop(reference)
                played, death = _result(reference, job)
                alone = seats.leave(name, job.key, died=bool(death))
                if death:
                    if name in staff.workers:
                        teller.event(staff.replace(name, death))
                    if not alone:
                        waiting.append((job, tries, time.monotonic() + RETRY_S))
                        continue
                played = replace(played, tries=tries)
                if played.state is State.failed and tries < config.tries:
                    waiting.append((job, tries + 1, time.monotonic() + RETRY_S * 2 ** (tries - 1)))
                    continue
                writer.write(played)
                teller.ended(played, folder)
                if played.state is State.done:
                    causes.clear()
                    continue
                causes.append(played.error)
                if len(causes) == config.patience:
                    raise UserError(
                        f"{config.patience} questions failed one after the other, the last with: {played.error[:300]}; mend that, then give the "
                        "same command with --retry-errors: what was played stays"
                    )
            writer.sync()
            if waiting and waiting[0][2] > time.monotonic():  # those that are tried again come when their time has come
                waiting = deque(sorted(waiting, key=lambda entry: entry[2]))
                if not playing:
                    time.sleep(POLL_S)
            for line in staff.tend():
                teller.event(line)


class Seats:
    """Who plays where. A question whose worker died shares the next one with a quarter as many others, down to none."""

    def __init__(self, most: int) -> None:
        """`most`: questions one worker plays at a time."""
        self.most = most
        self._at: dict[str, set[Key]] = {}
        self._company: dict[Key, int] = {}
        self._at_death: dict[str, int] = {}

    def taken(self, name: str) -> int:
        return len(self._at.get(name, ()))

    def free(self, name: str, key: Key) -> bool:
        """Whether a question may join those at a worker."""
        there = self._at.get(name, set())
        return len(there) < self.most and len(there) < min(self._company.get(k, self.most) for k in (key, *there))

    def take(self, name: str, key: Key) -> None:
        self._at.setdefault(name, set()).add(key)

    def leave(self, name: str, key: Key, *, died: bool) -> bool:
        """A question has ended, or its worker did: then whether it was alone there."""
        there = self._at[name]
        company = self._at_death.setdefault(name, len(there)) if died else len(there)
        there.discard(key)
        if died:
            self._company[key] = max(1, min(company, self._company.get(key, self.most)) // 4)
        if not there:
            self._at_death.pop(name, None)
        return company == 1


def per_worker(config: EvalConfig) -> int:
    """Questions one worker plays at a time."""
    return config.rollout.groups_in_flight


def num_workers(config: EvalConfig, num_jobs: int) -> int:
    """Workers that have something to do, and a share of the endpoint's limits."""
    wanted = min(config.rollout.workers, -(-num_jobs // per_worker(config)))
    return max(1, min(wanted, config.policy.chat.concurrency) if config.policy.kind == "chat" else wanted)


def _ended(playing: dict[Any, Any]) -> list[Any]:
    """References whose unit has ended; waits a little for the first."""
    if not playing:
        return []
    found, rest = ray.wait(list(playing), timeout=POLL_S)
    return [*found, *(ray.wait(rest, num_returns=len(rest), timeout=0)[0] if found and rest else ())]


def _result(reference: Any, job: Job) -> tuple[Played, str]:
    """What became of a unit, a failure of infrastructure where nothing did; and of what its worker died, if it did."""
    try:
        return ray.get(reference), ""
    except ray.exceptions.RayError as error:
        death = isinstance(error, ray.exceptions.RayActorError) and not isinstance(error, ray.exceptions.RayTaskError)
        said = one_line(error)[:200]
        failed = Played(job.unit, State.failed, None, f"its worker died: {said}" if death else said, probe=job.probe)
        return failed, (said or "it died") if death else ""


@contextlib.contextmanager
def staffed(config: EvalConfig, folder: Folder, index_dir: str | None, num_jobs: int) -> Iterator[Staff]:
    """Engines, retrieval and workers for an evaluation; ended with the block."""
    by_tokens = config.agent.name == TOKEN_AGENT
    model = prepare_model(config.model, folder.path, config.seed) if config.policy.kind == "checkpoint" else ""
    fleet: Any = None
    engines: list[Any] = []
    leans_on: dict[str, Any] = {}
    retrieval, info, staff, turns = None, None, None, None
    try:
        if model and by_tokens:
            engine = replace(config.engine, model=model, version=Version(0, 0).label, seed=config.seed)
            fleet = actor(Fleet, **LASTING).remote(config.fleet, engine, "")
        elif model:
            engines = place_engines(config, model)
        starting = fleet.start.remote() if fleet is not None else [engine.ready.remote() for engine in engines]
        if index_dir is not None:
            retrieval, leans_on = place_retrieval(config.retrieval, config.service, index_dir)
            for name, handle in leans_on.items():
                came_up(f"retrieval's {name}", handle.ready.remote(), config.watch.start_s)
            info = came_up("retrieval", retrieval.ready.remote(), config.watch.start_s)[1]
        workers = num_workers(config, num_jobs)
        turns = place_turns() if engines and workers > 1 else None
        kit = Kit(
            run_id=config.name,
            agent=config.agent.name,
            settings=config.agent.settings,
            temperature=config.policy.temperature,
            seed=config.seed,
            budget=config.budget,
            deadline_s=config.deadline_s,
            sandbox=guarded(config.sandbox, folder.benchmark, folder.path),
            rollout=config.rollout,
            sampling=config.sampling,
            chat=served(config),
            speech=functools.partial(make_speech, model, config.protocol) if by_tokens else None,
            parallel=config.corpus.source == "parallel_world",
            without_gold=config.without_gold,
            clients=workers,
            start_s=config.policy.start_s,
        )
        came_up("the policy", starting, max(config.watch.start_s, config.policy.start_s))
        staff = Staff(config, kit, fleet, engines, retrieval, info, turns)
        for ready in [staff.new_worker().ready.remote() for _ in range(workers)]:
            came_up("a worker", ready, config.watch.start_s)
        for name, handle in [
            ("fleet", fleet),
            ("retrieval", retrieval),
            *((f"retrieval's {n}", h) for n, h in leans_on.items()),
        ]:
            if handle is not None:
                staff.watchdog.watch(name, handle)
        for number, handle in enumerate(engines):
            staff.watchdog.watch(f"chat engine {number}", handle)
        yield staff
    finally:
        for handle in staff.workers.values() if staff is not None else ():
            _kill(handle)
        if fleet is not None:
            with contextlib.suppress(Exception):
                ray.get(fleet.shutdown.remote(), timeout=30)
        with contextlib.suppress(Exception):
            ray.get([engine.close.remote() for engine in engines], timeout=30)
        for handle in (fleet, retrieval, turns, *engines, *leans_on.values()):
            _kill(handle)


def _kill(handle: Any) -> None:
    if handle is not None:
        with contextlib.suppress(Exception):
            ray.kill(handle)
