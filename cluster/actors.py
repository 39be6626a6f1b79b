"""The actors of a run: placed, watched, replaced, and ended together.

Retrieval, reward, buffer and fleet are restarted by Ray (`max_restarts`): the first two hold no state, the buffer comes back
from its journal, the fleet from what was published last. The fleet replaces samplers; a rollout worker that dies is
replaced here, after its leases were given back. Whoever is still alive at the end is ended.

Over several nodes (`cluster.placement`) the fleet, the buffer, the reward and the first router stand beside the driver, whose end is theirs
anyway; rollout workers are spread over the nodes that live, and go on elsewhere when one is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from agents.interfaces import Speech
from agents.types import BackendInfo, Group, Task, Version
from cluster import nodes
from cluster.buffer import Buffer, BufferSetup
from cluster.errors import UserError, one_line
from cluster.fleet import Fleet
from cluster.judges import checkpoint as judge_checkpoint
from cluster.judges import place as place_judges
from cluster.layout import learner_place, node_gone, one_node
from cluster.model import resolve
from cluster.nodecache import at_hand, furnish, is_place, ship, unpack
from cluster.placement import RolePlacement, Seats, counted, demands, labelled, reserve, unlabelled
from cluster.retrieval_actors import LASTING, arrange, num_shards
from cluster.rollout import Play, RolloutWorker
from cluster.runtime import actor, joined_address, sealed
from cluster.schema import ProtocolConfig, RunConfig
from cluster.services import RewardServer
from cluster.sizes import shares_gpus
from cluster.speech import make_speech
from cluster.storage import is_object_store, prove_shared
from cluster.vllm.engine import EngineConfig
from cluster.watchdog import Poll, Tally, Watchdog

_CLEAR_S = 10.0
_LOOK_S = 5.0
"""Between two looks whether the node that learners are bound to is still there."""


class Actors:
    """Everything that runs beside the driver and the learner."""

    def __init__(
        self,
        config: RunConfig,
        play: Play,
        engine: EngineConfig,
        corpus_dir: str,
        segments: str = "",
        seats: Seats | None = None,
        furnished: Collection[str] = (),
        judge_source: str = "",
    ) -> None:
        """`furnished`: ids of the nodes that have the index where it is one to unpack. `judge_source`: place of the judge's checkpoint."""
        self._config = config
        self.model = engine.model
        """The policy's place, for a learner on any node (`cluster.nodecache`)."""
        self._seats = seats or Seats()
        shared = bool(segments) and shares_gpus(config)
        self._shared = {seat.node() for seat in self._seats.of("sampler")} if shared else set()
        """Nodes whose GPUs samplers and learners share."""
        self._looked = time.monotonic()
        self._home, self._segments, self._index = nodes.here(), segments, corpus_dir
        self._furnished, self._furnishing = {self._home, *furnished}, dict[str, Any]()
        here = nodes.bound_to(self._home)
        self._play = play
        self._names = itertools.count()
        self._workers: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        """Where each worker is."""
        self._routers: dict[str, Any] = {}
        """By node, of those that have one of their own."""
        self._replaced = Tally(config.rollout.max_restarts)
        self.watchdog = Watchdog(config.watch)
        self.buffer: Any = None
        self._new_router, self._leans_on = arrange(config.retrieval, config.service, corpus_dir, self._seats)
        self.retrieval = self._new_router(**here)
        whole = lambda path: str(resolve(path)) if path else ""  # noqa: E731 - actors have working directories of their own
        judge = config.judge
        judge = dataclasses.replace(
            judge, cache_dir=whole(judge.cache_dir), record=whole(judge.record), replay=whole(judge.replay)
        )
        self.judges = {
            f"judge engine {i}": handle
            for i, handle in enumerate(place_judges(judge, self._seats.of("judge"), judge_source))
        }
        state = str(Path(segments) / "published.json") if segments else ""
        # Engines that need not be there yet would queue for the learner's room, so theirs is asked for when it has it.
        elastic = bool(segments) and self._seats.more("sampler")
        seated = self._seats.of("sampler") if elastic else self._seats.all("sampler")
        self.fleet = actor(Fleet, **LASTING, **here).remote(config.fleet, engine, state, seated)
        self._seated = Poll(self.fleet.seated.remote) if elastic else None
        self._learner_room: Any = None
        """The placement group of the learner that came last."""
        starting = self.fleet.start.remote()  # takes longest, so the others come up meanwhile
        for name, handle in self._leans_on.items():
            self.up(f"retrieval's {name}", handle.ready.remote())
        self.info: BackendInfo = self.up("retrieval", self.retrieval.ready.remote())[1]
        self.reward = actor(RewardServer, **LASTING, **here).remote(
            config.reward,
            judge,
            sealed(list(self.judges.values())),
            sealed(self.retrieval),
            self.info,
            config.rollout.search_timeout_s,
        )
        workers = [self._new_worker().ready.remote() for _ in range(config.rollout.workers)]
        self.up("the reward", self.reward.ready.remote(), config.judge.start_s if self.judges else 0.0)
        self.engine_pids: dict[str, list[int]] = self.up("the fleet", starting)
        for ready in workers:
            self.up("a rollout worker", ready)
        self._events = Poll(self.fleet.events.remote)
        self._loads = [Poll(busy.load.remote) for busy in (self.fleet, self.retrieval, self.reward)]
        for name, handle in (("retrieval", self.retrieval), ("reward", self.reward), ("fleet", self.fleet)):
            self.watchdog.watch(name, handle)
        for name, handle in [*((f"retrieval's {n}", h) for n, h in self._leans_on.items()), *self.judges.items()]:
            self.watchdog.watch(name, handle)

    def open_buffer(self, setup: BufferSetup) -> None:
        """The ledger, and with it the rollouts, which start as soon as there is room. The learner's seats are free from here on."""
        self._seats.release("learner")
        self.buffer = actor(Buffer, **LASTING, **nodes.bound_to(self._home)).remote(setup)
        self.up("the buffer", self.buffer.counts.remote())
        self.watchdog.watch("buffer", self.buffer)
        for worker in self._workers.values():
            worker.run.remote(self.buffer)

    def evaluate(self, tasks: list[Task], label: str) -> Plays:
        """Starts playing held-out tasks on all workers."""
        return Plays(self, tasks, label)

    def play(self, tasks: list[Task], label: str, share: int, sampler: str = "full") -> Any:
        """One worker plays `tasks`, as evaluations do by full trajectories; returns a reference to their groups."""
        train, workers = self._config.train, list(self._workers.values())
        worker = workers[share % len(workers)]
        return worker.evaluate.remote(tasks, train.eval_attempts, train.eval_temperature, label, sampler)

    @property
    def learner_place(self) -> RolePlacement:
        """Where the learner may sit: beside the engines where it shares their GPUs."""
        return learner_place(self._config, {seat.node() for seat in self._seats.of("sampler")})

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    def tend(self) -> list[str]:
        """Looks after everybody; returns lines for the log. Raises UserError when somebody dies too often, or it cannot go on."""
        self._look_for_shared()
        return [*self._grow(), *self.watchdog.look(), *(self._events.take() or ())]

    def _look_for_shared(self) -> None:
        """Learners are bound to the node whose GPUs they share, and would wait for it without end. Raises UserError."""
        if not self._shared or time.monotonic() < self._looked + _LOOK_S:
            return
        self._looked = time.monotonic()
        for node in self._shared:
            if nodes.given_up(node):
                raise UserError(node_gone(self._config, node))

    def _grow(self) -> list[str]:
        """Engines beyond `fleet.min_engines`, while a learner has its room; also for a fleet that Ray has started again."""
        room, known = (self._seated.take() if self._seated else None) or (None, self._config.fleet.num_engines)
        self._learner_room = room or self._learner_room  # such a fleet knows it no more
        if self._learner_room is None or known >= self._config.fleet.num_engines:
            return []
        seats, given_back = self._seats.come("sampler", self._learner_room)
        if len(seats) > known:
            self.fleet.grow.remote(seats)
        if not given_back:
            return []
        waiting = counted(given_back, "samplers")
        return [
            f"the learner's room is free: none is asked for {waiting} that wait for some, until a learner has it again"
        ]

    def load(self) -> dict[str, float]:
        """How busy the engines were since the last answer, and what retrieval and the judge have to tell. Never waits."""
        return {name: value for poll in self._loads for name, value in (poll.take() or {}).items()}

    def fence(self, incarnation: int) -> None:
        """A learner has begun: what is rolled out for earlier ones ends."""
        for worker in self._workers.values():
            worker.fence.remote(incarnation)

    def close(self) -> None:
        """Ends every actor; engines first, so that their processes end in order."""
        with contextlib.suppress(Exception):
            ray.get([w.stop.remote() for w in self._workers.values()], timeout=5)
        with contextlib.suppress(Exception):
            ray.get(self.fleet.shutdown.remote(), timeout=30)
        with contextlib.suppress(Exception):
            ray.get([judge.close.remote() for judge in self.judges.values()], timeout=30)
        with contextlib.suppress(Exception):
            self._clear_segments()
        others = [
            self.fleet, self.reward, self.retrieval, *self._routers.values(), *self._leans_on.values(), *self.judges.values(), self.buffer,
        ]  # fmt: skip
        for handle in [*self._workers.values(), *others]:
            if handle is not None:
                with contextlib.suppress(Exception):
                    ray.kill(handle)

    def _clear_segments(self) -> None:
        """What a learner elsewhere has left in the memory of its node; here the run's end clears it."""
        elsewhere = [n for n in nodes.living() if n.id != self._home] if self._segments else []
        nodes.on_each(elsewhere, shutil.rmtree, self._segments, True, timeout_s=_CLEAR_S)

    def up(self, what: str, ready: Any, at_least_s: float = 0.0) -> Any:
        """What an actor says when it has come up. Raises UserError when it does not."""
        return came_up(what, ready, max(self._config.watch.start_s, at_least_s))

    def _new_worker(self) -> Any:
        name, node = f"rollout-{next(self._names)}", self._next_node()
        labels = self._config.placement.rollout.labels
        # Not softly: Ray then takes another node at will, and who is lost with a node would not be known.
        where = nodes.bound_to(node) if node else {"label_selector": dict(labels)}
        made = actor(RolloutWorker, **where).remote(
            name, self._play, self.fleet, self._router_on(node), self.info, self.reward
        )
        self._workers[name], self._nodes[name] = made, node
        self.watchdog.watch(name, made, functools.partial(self._replace, name))
        return made

    def _next_node(self) -> str:
        """Of those that live and have the labels, the one with the fewest workers; empty: one has to join first."""
        fits = [n.id for n in nodes.living() if labelled(n, self._config.placement.rollout.labels)]
        taken = list(self._nodes.values())
        return min([n for n in fits if self._has_index(n)] or fits, key=taken.count, default="")

    def _has_index(self, node: str) -> bool:
        """Whether a router of its own could serve there. A node that joined later begins to unpack the index, and comes in question when it
        is asked for again."""
        if self._config.placement.routers == "driver" or not is_place(self._index) or node in self._furnished:
            return True
        if node not in self._furnishing:
            self._furnishing[node] = nodes.on_one(node, unpack, self._index)
        elif ray.wait([self._furnishing[node]], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # it could not: who asks again has it tried again
                ray.get(self._furnishing.pop(node))
                self._furnished.add(node)
        return node in self._furnished

    def _router_on(self, node: str) -> Any:
        """The router that workers of a node ask."""
        if self._config.placement.routers == "driver" or node in ("", self._home):
            return self.retrieval
        if node not in self._routers:
            self._routers[node] = self._new_router(**nodes.bound_to(node, soft=True))
            self.watchdog.watch(f"retrieval on {node[:8]}", self._routers[node])
        return self._routers[node]

    def _forget_lost_routers(self) -> None:
        """Of nodes that are gone, with the workers that asked them."""
        for node in [n for n in self._routers if n not in self._nodes.values() and not nodes.alive(n)]:
            self.watchdog.forget(f"retrieval on {node[:8]}")
            ray.kill(self._routers.pop(node))

    def _replace(self, name: str, reason: str) -> str:
        with contextlib.suppress(Exception):
            ray.kill(self._workers.pop(name))  # it may only seem dead, and nobody listens to it any more
        node_lost = bool(was := self._nodes.pop(name)) and not nodes.alive(was)
        self._forget_lost_routers()
        if not node_lost and self._replaced.exceeded():
            raise UserError(
                f"rollout workers died {self._replaced.count} times within an hour, the last with: {reason}"
            )
        self.fleet.worker_lost.remote(name)
        fresh = self._new_worker()
        if self.buffer is not None:
            self.buffer.worker_lost.remote(name)  # its leases are leased again
            fresh.run.remote(self.buffer)
        return f"{name} died{' with its node' if node_lost else ''}, and another took its place: {reason}"


def came_up(what: str, ready: Any, limit_s: float) -> Any:
    """What an actor says when it has come up. Raises UserError when it does not."""
    try:
        return ray.get(ready, timeout=limit_s)
    except ray.exceptions.RayActorError as error:
        raise UserError(f"{what} did not come up: {one_line(error)[:300]}") from error
    except ray.exceptions.GetTimeoutError:
        raise UserError(
            f"{what} did not come up within {limit_s:g} s; look at the cluster's dashboard for what it waits for, or raise watch.start_s"
        ) from None


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
            except (
                ray.exceptions.RayActorError,
                ray.exceptions.ObjectLostError,
            ):  # an answer may be lost with its node
                self._pending[i] = self._actors.play(self._shares[i], self._label, i + 1)
        return None if self._pending else [self._groups[task] for task in self._order]


def _speech(model: str, protocol: ProtocolConfig) -> Speech:
    """How the policy speaks, on whatever node that is asked."""
    return make_speech(at_hand(model, weights=False), protocol)


def _unpacked(
    config: RunConfig, seats: Seats, model: str, index_dir: str, everyone: Sequence[nodes.Node], judge: str = ""
) -> set[str]:
    """Brings models and index to the nodes that need them, before any actor's time to start runs there; returns ids of those with the
    index. Raises UserError."""

    def those(wanted: set[str]) -> list[nodes.Node]:
        return [n for n in everyone if n.id in wanted]

    home = everyone[0].id
    furnish(model, those({seat.node() for name in ("sampler", "learner") for seat in seats.of(name)}))
    furnish(judge, those({seat.node() for seat in seats.of("judge")}))
    place = config.placement
    serve = {home, *(seat.node() for name in ("encoder", "store", "shard") for seat in seats.of(name))}
    if place.routers == "node":
        serve |= {n.id for n in everyone if labelled(n, place.rollout.labels)}
    furnish(index_dir, those(serve))
    return serve


@contextlib.contextmanager
def placed(
    config: RunConfig, model: str, index_dir: str, run_dir: Path, segments: str = ""
) -> Iterator[tuple[Actors, Any]]:
    """Actors for `config` around the policy in folder `model`; ended with the block. Yields them and the speech factory."""
    everyone, storage = (
        nodes.living(),
        config.storage_path if is_object_store(config.storage_path) else str(run_dir.parent),
    )
    if line := unlabelled("rollout", config.placement.rollout.labels, everyone):
        raise UserError(line)
    if not is_object_store(storage):
        prove_shared(run_dir, everyone)
    joined = bool(joined_address(config.ray))  # and then nodes may come that are not there yet
    model = ship(model, everyone, storage, joined=joined)
    index_dir = ship(index_dir, everyone, storage, copy=config.placement.copy_index, joined=joined)
    judge = ship(judge_checkpoint(config.judge), everyone, storage, joined=joined)
    speech = functools.partial(_speech, model, config.protocol)
    journal = config.sandbox.journal  # workers have folders of their own, so paths are made whole here
    journal = dataclasses.replace(
        journal,
        folder=str(resolve(journal.folder) if journal.folder else run_dir / "journals"),
        replay=str(resolve(journal.replay)) if journal.replay else "",
    )
    sandbox = dataclasses.replace(config.sandbox, journal=journal)
    play = Play(config.name, speech, config.sampling, sandbox, config.rollout, config.seed)
    lora = config.learner.lora
    engine = dataclasses.replace(
        config.engine, model=model, version=Version(0, 0).label, seed=config.seed,
        lora_rank=lora.rank if segments and lora.publish == "adapter" else 0,
        lora_targets=tuple(lora.targets),
    )  # fmt: skip
    wanted = demands(
        config, training=bool(segments), num_shards=num_shards(config.retrieval, config.service, index_dir)
    )
    with reserve(wanted, config.ray.wait_s) as seats:
        if line := one_node(config, {seat.node() for seat in seats.of("sampler")}):
            raise UserError(line)
        serve = _unpacked(config, seats, model, index_dir, everyone, judge)
        actors = Actors(config, play, engine, index_dir, segments, seats, serve, judge)
        try:
            yield actors, speech
        finally:
            actors.close()
