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
        self._loops: dict[Any, str] = {}
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
        ray.get([w.ready.remote() for w in self._workers.values()])

    def open_buffer(self, curriculum: Curriculum, state: dict[str, Any] | None = None) -> None:
        """The ledger, and with it the rollouts, which start as soon as there is room."""
        train = self._config.train
        self.buffer = actor(Buffer).remote(
            self._config.buffer,
            self._config.advantage,
            curriculum,
            steps=train.steps,
            max_minutes=train.max_minutes,
            state=state,
        )
        ray.get(self.buffer.counts.remote())
        for name in self._workers:
            self._start(name)

    def evaluate(self, tasks: list[Task], label: str) -> Any:
        """Starts playing held-out tasks on all workers; returns references to their groups, in order of the tasks."""
        train, workers = self._config.train, list(self._workers.values())
        shares = [tasks[i :: len(workers)] for i in range(len(workers))]
        return [
            w.evaluate.remote(share, train.eval_attempts, train.eval_temperature, label)
            for w, share in zip(workers, shares, strict=True)
        ]

    def tend(self) -> list[str]:
        """Replaces rollout workers that died. Returns lines for the log."""
        lines = list(ray.get(self.fleet.events.remote()))
        done, _ = ray.wait(list(self._loops), num_returns=len(self._loops), timeout=0) if self._loops else ([], [])
        for loop in done:
            name = self._loops.pop(loop)
            try:
                ray.get(loop)
            except ray.exceptions.RayError:
                self._workers.pop(name)
                lost = ray.get(self.buffer.worker_lost.remote(name))
                fresh = self._new_worker()
                self._start(fresh)
                lines.append(f"{name} died with {lost} leases, which are leased again; {fresh} took its place")
        return lines

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
        return name

    def _start(self, name: str) -> None:
        self._loops[self._workers[name].run.remote(self.buffer)] = name


def gather(references: list[Any], num_tasks: int) -> list[Group]:
    """The groups of `Actors.evaluate`, in the order of its tasks."""
    shares: list[list[Group]] = ray.get(references)
    return [shares[i % len(shares)][i // len(shares)] for i in range(num_tasks)]


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
