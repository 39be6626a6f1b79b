"""The actors of a run: placed, watched, replaced, and ended together.

Retrieval and reward hold no state and restart by themselves (Ray `max_restarts`); the fleet replaces samplers; a
rollout worker that dies is replaced here, after its leases were given back. Whoever is still alive at the end is ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import ray

from agents.curriculum import Curriculum
from agents.types import BackendInfo, Group, Task, Version
from cluster.buffer import Buffer
from cluster.errors import UserError, one_line
from cluster.fleet import Fleet
from cluster.rollout import Play, RolloutWorker
from cluster.runtime import actor
from cluster.schema import RunConfig
from cluster.services import Retrieval, RewardServer
from cluster.speech import make_speech
from cluster.vllm.engine import EngineConfig


class Actors:
    """Everything that runs beside the driver and the learner."""

    def __init__(self, config: RunConfig, play: Play, engine: EngineConfig, corpus_dir: str) -> None:
        self._config = config
        self._play = play
        self._names = itertools.count()
        self._workers: dict[str, Any] = {}
        self._pulses: dict[str, Any] = {}
        self._replaced = 0
        self.buffer: Any = None
        stateless = {"max_restarts": -1, "max_task_retries": 3}
        self.retrieval = actor(Retrieval, **stateless).remote(config.retrieval, config.service, corpus_dir)
        self.reward = actor(RewardServer, **stateless).remote(config.reward, config.judge)
        self.fleet = actor(Fleet).remote(config.fleet, engine)
        self.engine_pids: dict[str, list[int]] = ray.get(self.fleet.start.remote())
        self.info: BackendInfo = ray.get(self.retrieval.ready.remote())[1]
        ray.get(self.reward.ready.remote())
        for _ in range(config.rollout.workers):
            self._new_worker()
        ray.get(list(self._pulses.values()))

    def open_buffer(self, curriculum: Curriculum) -> None:
        """The ledger, and with it the rollouts, which start as soon as there is room."""
        train = self._config.train
        self.buffer = actor(Buffer).remote(
            self._config.buffer, self._config.advantage, curriculum, steps=train.steps, max_minutes=train.max_minutes
        )
        ray.get(self.buffer.counts.remote())
        for name in self._workers:
            self._start(name)

    def evaluate(self, tasks: list[Task], label: str) -> Plays:
        """Starts playing held-out tasks on all workers."""
        return Plays(self, tasks, label)

    def play(self, tasks: list[Task], label: str, share: int) -> Any:
        """One worker plays `tasks`; returns a reference to their groups."""
        train, workers = self._config.train, list(self._workers.values())
        return workers[share % len(workers)].evaluate.remote(tasks, train.eval_attempts, train.eval_temperature, label)

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    def tend(self) -> list[str]:
        """Replaces rollout workers that died. Returns lines for the log. Raises UserError when they die too often."""
        lines = list(ray.get(self.fleet.events.remote()))
        for name, pulse in list(self._pulses.items()):
            if not ray.wait([pulse], timeout=0)[0]:
                continue
            try:
                ray.get(pulse)
                self._pulses[name] = self._workers[name].ready.remote()
            except ray.exceptions.RayError as error:
                lines.append(self._replace(name, one_line(error)))
        return lines

    def _replace(self, name: str, reason: str) -> str:
        self._workers.pop(name)
        self._pulses.pop(name)
        self._replaced += 1
        if self._replaced > self._config.rollout.max_restarts:
            raise UserError(f"rollout workers died {self._replaced} times, the last with: {reason}")
        lost = ray.get(self.buffer.worker_lost.remote(name)) if self.buffer is not None else 0
        ray.get(self.fleet.worker_lost.remote(name))
        fresh = self._new_worker()
        if self.buffer is not None:
            self._start(fresh)
        return f"{name} died with {lost} leases, which are leased again; {fresh} took its place"

    def close(self) -> None:
        """Ends every actor; engines first, so that their processes end in order."""
        with contextlib.suppress(Exception):
            ray.get([w.stop.remote() for w in self._workers.values()], timeout=5)
        with contextlib.suppress(Exception):
            ray.get(self.fleet.shutdown.remote(), timeout=30)
        for handle in [*self._workers.values(), self.fleet, self.reward, self.retrieval, self.buffer]:
            if handle is not None:
                with contextlib.suppress(Exception):
                    ray.kill(handle)

    def _new_worker(self) -> str:
        name = f"rollout-{next(self._names)}"
        made = actor(RolloutWorker).remote(name, self._play, self.fleet, self.retrieval, self.info, self.reward)
        self._workers[name] = made
        self._pulses[name] = made.ready.remote()
        return name

    def _start(self, name: str) -> None:
        self._workers[name].run.remote(self.buffer)


class Plays:
    """Held-out tasks being played, a share per worker. A share whose worker died is played again by another."""

    def __init__(self, actors: Actors, tasks: list[Task], label: str) -> None:
        self._actors = actors
        self._label = label
        self._shares = [tasks[i :: actors.num_workers] for i in range(actors.num_workers)]
        self._order = [t.id for t in tasks]
        self._pending = {i: actors.play(share, label, i) for i, share in enumerate(self._shares)}
        self._groups: dict[str, Group] = {}

    def done(self) -> list[Group] | None:
        """The groups in the order of the tasks, or None while some are still being played. Never waits."""
        for i, reference in list(self._pending.items()):
            if not ray.wait([reference], timeout=0)[0]:
                continue
            try:
                self._groups.update({g.task.id: g for g in ray.get(reference)})
                del self._pending[i]
            except ray.exceptions.RayActorError:
                self._pending[i] = self._actors.play(self._shares[i], self._label, i + 1)
        return None if self._pending else [self._groups[task] for task in self._order]


@contextlib.contextmanager
def placed(config: RunConfig, model: str, index_dir: str) -> Iterator[tuple[Actors, Any]]:
    """Actors for `config` around the policy in folder `model`; ended with the block. Yields them and the speech factory."""
    speech = functools.partial(make_speech, model, config.protocol)
    play = Play(config.name, speech, config.sampling, config.sandbox, config.rollout)
    engine = dataclasses.replace(config.engine, model=model, version=Version(0, 0).label, seed=config.seed)
    actors = Actors(config, play, engine, index_dir)
    try:
        yield actors, speech
    finally:
        actors.close()
