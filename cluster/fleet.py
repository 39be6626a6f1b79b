"""The sampler fleet: one vLLM engine per sampler actor, supervised by one fleet actor that owns the membership.

Invariants:
- A session stays on one engine as long as that engine lives, so its prefix stays cached there.
- An engine is routed to only while it holds the weights that were published last. One that fails to update, dies or
  stays silent is fenced (no routes), killed and started again; it gets the current weights before it is routed to.
- A publish never waits for a dead engine longer than its phase deadlines, and the others go on. One of a learner that
  another has replaced is refused.
- An engine whose node was lost starts again in its seat, wherever Ray finds that room, or waits until a node joins; the run goes
  on with fewer engines meanwhile, and says so. The loss of a node is no engine's fault and is not counted as one.
- Where a learner shares the GPUs (`cluster.turns`), engines start, take weights and sample in the samplers' turn alone.
- What was published last is on disk beside the weights, so that a fleet whose process died starts its engines with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster import nodes
from cluster.errors import one_line
from cluster.fleet_config import FleetConfig as FleetConfig
from cluster.membership import Place, StaleEpoch
from cluster.nodecache import UNPACK_S, is_place, unpack
from cluster.placement import Seat
from cluster.publishing import START_SLACK_S, Facts, Meeting, Peer, Publishing, deadlines
from cluster.sampler import Client, Sampler
from cluster.turns import FleetTurns
from cluster.vllm.engine import EngineConfig
from cluster.vllm.preflight import EngineError
from cluster.vllm.segment import Manifest
from cluster.vllm.transfer import Phase, PublishReport
from cluster.watchdog import Pulse, Tally, Waits, pulse_of

_ROOM_S = 1.0
"""Between two looks for a node, or for weights, that an engine waits for."""
_UNFIT_S = 10.0
"""Between two tries of a node that could not have the policy's folder."""


async def _node_of(seat: Seat | None) -> str:
    """Id of the node that a seat is on; empty while there is none."""
    return "" if seat is None else await asyncio.to_thread(seat.node)


@dataclass
class _Engine:
    name: str
    handle: Any
    pids: list[int] = field(default_factory=list)
    live: bool = False
    """Holds the weights that were published last, and may be routed to."""
    facts: Facts | None = None
    """What it said of itself when it was up: from then on it can be published to."""
    sessions: int = 0
    loading: bool = False
    """It is being brought the weights that were published last."""
    seat: Seat | None = None
    """Its room on the cluster; None: Ray puts it anywhere."""
    node: str = ""
    """Where it runs, once it is up."""


def _timings(report: PublishReport) -> dict[str, float]:
    return {
        "publish/seconds": report.seconds, "publish/pause_ms": report.pause_ms,
        "publish/engines": float(len(report.results)), "publish/failed": float(len(report.failed)),
    }  # fmt: skip


def _started_again() -> bool:
    """Whether this process stands for an actor that died."""
    try:
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
    except AssertionError:  # no actor's process
        return False


class Fleet:
    """Owns the sampler actors. Create, `await start()`, then `route`, `publish`, `report`."""

    def __init__(self, config: FleetConfig, engine: EngineConfig, state: str = "", seats: Sequence[Seat] = ()) -> None:
        """`seats`: room for each engine, those that must be there at the start first, others perhaps later (`grow`); empty: Ray finds it."""
        self._config = config
        self._engine_config = engine
        self._state = Path(state) if state else None
        self._seats: list[Seat | None] = list(seats) or [None] * config.num_engines
        self._engines: dict[str, _Engine] = {}
        self._routes: dict[str, str] = {}
        self._owners: dict[str, str] = {}
        self._weights = Publishing(
            config.transport, config.bucket_mb << 20, deadlines(config), engine.version, self._state,
            adapters=engine.lora_rank > 0,
        )  # fmt: skip
        self._learner_room: Any = None
        self._names = itertools.count()
        self._prefix = "sampler-"
        self._began = False
        self._restarts = Tally(config.max_restarts)
        self._events: list[str] = []
        self._fatal = ""
        self._membership = asyncio.Lock()
        self._turns = FleetTurns(Path(state).with_name("turn") if state else None)
        self._watch: asyncio.Task[None] | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._load: list[np.ndarray] = []
        self._counted: dict[str, np.ndarray] = {}
        self._waits = Waits()

    async def start(self) -> dict[str, list[int]]:
        """Starts the engines that must be there; returns their pids by name. Raises EngineError of the first that cannot start."""
        self._began = True
        first = self._config.min_engines or len(self._seats)
        fresh = [self._create(seat) for seat in self._seats[:first]]
        room = asyncio.Semaphore(os.cpu_count() or 1)  # most of a start is one thread that imports

        async def bring_up(engine: _Engine) -> None:
            async with room:
                engine.pids = await self._brought_up(engine)
                engine.node = await _node_of(engine.seat)
                engine.live = True

        await asyncio.gather(*(bring_up(engine) for engine in fresh))
        self._watch = asyncio.create_task(self._watch_health())
        for seat in self._seats[first:]:
            self._background(self._replace(seat))
        return {e.name: e.pids for e in fresh}

    async def learner_sits(self, room: Any) -> None:
        """From a learner that begins: the placement group it is in."""
        self._learner_room = room

    async def seated(self) -> tuple[Any, int]:
        """The placement group of the learner that came last, None before the first publish; and how many seats are known here."""
        return self._learner_room if self._weights.rounds else None, len(self._seats)

    async def grow(self, seats: Sequence[Seat]) -> None:
        """All seats there are, in the order they came: an engine starts on each that is not known yet."""
        for seat in seats[len(self._seats) :]:
            self._seats.append(seat)
            self._background(self._replace(seat))

    async def pulse(self) -> Pulse:
        """For the watchdog; a fleet that Ray has started again brings its engines up first."""
        if not self._began and (_started_again() or (self._state is not None and self._state.is_file())):
            self._come_back()
        return pulse_of(*self._waits.oldest())

    async def route(self, session: str, worker: str = "", timeout_s: float = 120.0) -> tuple[str, Any]:
        """(name, handle) of the engine that serves `session`. Raises EngineError when none comes up in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            known = self._engines.get(self._routes.get(session, ""))
            if known is not None and known.live:
                return known.name, known.handle
            live = [e for e in self._engines.values() if e.live]
            if live:
                chosen = min(live, key=lambda e: (e.sessions, e.name))
                chosen.sessions += 1
                self._routes[session] = chosen.name
                self._owners[session] = worker
                return chosen.name, chosen.handle
            if self._fatal or time.monotonic() > deadline:
                raise EngineError("dead", self._fatal or f"no sampler engine came up within {timeout_s:g} s")
            await asyncio.sleep(0.05)

    async def release(self, session: str) -> None:
        """The session is over."""
        self._owners.pop(session, None)
        engine = self._engines.get(self._routes.pop(session, ""))
        if engine is not None:
            engine.sessions -= 1

    async def worker_lost(self, worker: str) -> None:
        """A rollout worker died: its sessions are over."""
        for session in [s for s, owner in self._owners.items() if owner == worker]:
            await self.release(session)

    async def report(self, name: str, reason: str) -> None:
        """Somebody saw engine `name` fail: it is fenced and started again."""
        engine = self._engines.get(name)
        if engine is not None:
            self._fence(engine, reason)

    async def meet(self, sender: str, learner: Place) -> Meeting:
        """How the next publish of the learner process `sender`, which sits there, goes. Raises UserError when it cannot."""
        async with self._membership:
            return self._weights.meet(sender, learner, self._peers())

    async def publish(self, manifest: dict[str, Any], version: str, parcel: Sequence[Any] = ()) -> dict[str, Any]:
        """Brings a segment into all engines that are up; a failing one is fenced. Returns timings and who failed.

        `parcel`: the segment's bytes in Ray's object store, for engines on other nodes."""
        segment = Manifest.from_dict(manifest)
        async with self._membership:
            report = await self._weights.segment(segment, version, parcel, self._peers())
            self._take_stock(report, last=True)
        return {**_timings(report), "publish/bytes": float(segment.nbytes)}

    async def broadcast(
        self, ticket: str, epoch: int, version: str, endpoint: dict[str, Any], layout: dict[str, Any], last: bool
    ) -> dict[str, Any]:
        """The same by a collective, in which the learner sends when it is `cleared`. `publish/again`: it broke, and those that are left can
        be sent to in a new epoch; unless this was the `last` try."""
        async with self._membership:
            try:
                report = await self._weights.broadcast(ticket, epoch, version, endpoint, layout, self._peers())
            except StaleEpoch as error:
                self._events.append(f"publish {version} meets anew: {error}")
                return {"publish/again": 1.0}
            again = self._take_stock(report, last)
        return {**_timings(report), "publish/again": float(again)}

    async def cleared(self, ticket: str) -> bool:
        """For the learner: whether it is to send in that publish, as soon as it is known."""
        return await self._weights.cleared(ticket)

    async def called_off(self, ticket: str) -> bool:
        """For the learner that waits for the engines: whether not all of them can come."""
        return self._weights.called_off(ticket)

    async def hand_out(self, ticket: str, piece: dict[str, Any]) -> None:
        """From the learner, by CUDA IPC: one piece for all engines; returns when they have taken it."""
        await self._weights.hand_out(ticket, piece)

    async def sent(self, ticket: str, checksum: str, reason: str) -> None:
        """From the learner: it has sent everything, or why it could not."""
        self._weights.sent(ticket, checksum, reason)

    async def starving(self) -> bool:
        """Whether engines are up, and none holds weights that may be sampled from: only another publish helps."""
        up = [e for e in self._engines.values() if e.facts is not None]
        return bool(up) and not any(e.live or e.loading for e in up)

    async def sleep(self) -> None:
        """The learner's turn: returns when every engine has given its memory back. One that does not is fenced, which ends it."""
        with contextlib.suppress(TimeoutError):  # whoever starts for longer waits for a node, and holds no memory
            async with asyncio.timeout(self._engine_config.start_timeout_s + START_SLACK_S):
                await self._turns.to_learner()
        async with self._membership:
            await self._all("sleep", [e for e in self._engines.values() if e.pids])

    async def wake(self) -> None:
        """The samplers' turn: engines with the weights that were published last go on. One that lacks them is fenced."""
        async with self._membership:
            await self._all("wake", [e for e in self._engines.values() if e.live])
            self._turns.to_samplers()

    async def slept_s(self, since: float) -> float:
        """Seconds after `since` (unix) in which no engine sampled because it was the learner's turn."""
        return self._turns.slept_s(since)

    async def gpus(self) -> dict[str, list[str]]:
        """Ids of the engines' GPUs by node."""
        found: dict[str, list[str]] = {}
        for engine in list(self._engines.values()):
            node, ids = await engine.handle.gpus.remote()
            found.setdefault(node, []).extend(ids)
        return found

    async def verify(self) -> dict[str, Any]:
        """Compares what every live engine received with what was published last; one that differs is fenced."""
        sums = {}
        async with self._membership:
            expected = self._weights.checksum
            for engine in [e for e in self._engines.values() if e.live]:
                try:
                    async with asyncio.timeout(self._config.health_timeout_s):
                        found = await engine.handle.checksums.remote()
                except Exception as error:
                    self._fence(engine, f"gave no checksum: {one_line(error) or 'no answer in time'}")
                    continue
                if found["received"] == expected:
                    sums[engine.name] = found
                else:
                    self._fence(engine, f"holds weights {found['received']}, published were {expected}")
        return sums

    async def load(self) -> dict[str, float]:
        """Requests running, tokens sampled per second, and the tokens that were in the prefix cache as a share of all prompt tokens and
        of those an ideal cache would have held, over all engines and the time since the last call."""
        found, self._load = self._load, []
        if not found:
            return {}
        live = float(sum(e.live for e in self._engines.values()))
        running, sampled, prompted, cached, possible = np.sum(found, axis=0).tolist()
        load = {
            "engine/live": live,
            "engine/running": running / len(found),
            "engine/tokens_per_s": sampled / (len(found) * self._config.health_every_s),
        }
        shares = {"engine/prefix_hits": (cached, prompted), "engine/prefix_of_possible": (cached, possible)}
        return load | {name: part / whole for name, (part, whole) in shares.items() if whole}

    async def members(self) -> dict[str, dict[str, Any]]:
        """What the fleet knows of each engine."""
        return {
            e.name: {"live": e.live, "pids": e.pids, "sessions": e.sessions, "node": e.node}
            for e in self._engines.values()
        }

    async def events(self) -> list[str]:
        """Lines for the run's log since the last call. Raises EngineError when the engines failed too often to go on."""
        if self._fatal:
            raise EngineError("dead", self._fatal)
        events, self._events = self._events, []
        return events

    async def shutdown(self) -> None:
        """Ends every engine and its processes."""
        if self._watch is not None:
            self._watch.cancel()
        for job in self._jobs:
            job.cancel()
        for engine in self._engines.values():
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.wrap_future(engine.handle.shutdown.remote().future()), 10.0)
            ray.kill(engine.handle)
        self._engines.clear()

    # ------------------------------------------------------------------------------------------------- inside

    async def _brought_up(self, engine: _Engine) -> list[int]:
        """Its pids, once it is up: on a GPU that a learner shares, in the samplers' turn."""
        async with self._turns.start():
            pids = await self._started(engine)
            engine.facts = await self._facts(engine)
            return pids

    async def _started(self, engine: _Engine) -> list[int]:
        limit_s = left_s = self._engine_config.start_timeout_s + 60
        asked = asyncio.ensure_future(engine.handle.start.remote())
        while not (await asyncio.wait([asked], timeout=_ROOM_S))[0]:
            await self._room(engine.seat)  # which may have lost its node meanwhile: that is no time of the engine's
            left_s -= _ROOM_S
            if left_s <= 0:
                asked.cancel()
                raise EngineError(
                    "start", f"{engine.name} did not come up within {limit_s:g} s: no room for it on the cluster?"
                )
        return list(asked.result())

    def _create(self, seat: Seat | None = None) -> _Engine:
        number = next(self._names)
        name = f"{self._prefix}{number}"
        # Engines of one seed would draw the same noise for the same prompt.
        config = replace(self._engine_config, seed=self._engine_config.seed + number)
        options = {"num_cpus": self._config.num_cpus, "num_gpus": self._config.num_gpus, "max_concurrency": 2048}
        options |= seat.options if seat is not None else {}
        engine = _Engine(name, ray.remote(Sampler).options(**options).remote(config), seat=seat)
        self._engines[name] = engine
        return engine

    def _fence(self, engine: _Engine, reason: str) -> None:
        if self._engines.pop(engine.name, None) is None:
            return
        engine.live = False
        self._events.append(f"{engine.name} was fenced: {reason}{self._strength()}")
        with contextlib.suppress(Exception):
            ray.kill(engine.handle)
        self._background(self._replace(engine.seat, engine.node, reason))

    async def _all(self, method: str, engines: Sequence[_Engine]) -> None:
        """One call to each engine, side by side; who fails or is late is fenced."""

        async def one(engine: _Engine) -> None:
            try:
                async with asyncio.timeout(self._config.publish_deadline_s):
                    await engine.handle.call.remote(method)
            except Exception as error:
                limit = f"no answer to {method} within {self._config.publish_deadline_s:g} s"
                self._fence(engine, f"could not {method}: {one_line(error) or limit}")

        await asyncio.gather(*(one(engine) for engine in engines))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        job = asyncio.create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _replace(self, seat: Seat | None = None, was: str = "", reason: str = "") -> None:
        """A new engine from the checkpoint, then the current weights, then routes. `was`: the node of the one before, which ended for
        `reason`."""
        node_lost = bool(was) and not await asyncio.to_thread(nodes.alive, was)
        if reason and not node_lost and self._restarts.exceeded():
            self._fatal = f"sampler engines failed {self._restarts.count} times within an hour, last: {reason}"
            return
        node = await self._furnished(seat)
        engine = self._create(seat)
        engine.node = node
        try:
            engine.pids = await self._brought_up(engine)
            engine.node = await _node_of(seat)
            await self._take_weights(engine)
        except Exception as error:
            self._fence(engine, f"could not take its place: {one_line(error)}")
            return
        self._events.append(f"{engine.name} took its place with weights {self._weights.version}{self._strength()}")

    async def _room(self, seat: Seat | None) -> str:
        """The node of a seat, waited for as long as it takes: its node may have been lost, or not have joined yet."""
        told = False
        while seat is not None and not (node := await _node_of(seat)):
            if not told:
                told = True
                self._events.append(f"a sampler waits for a node with {seat} to join{self._strength()}")
            await asyncio.sleep(_ROOM_S)
        return node if seat is not None else ""

    async def _furnished(self, seat: Seat | None) -> str:
        """The node of a seat, when it has the policy's folder: unpacking counts into no engine's start. A node that cannot have it is no
        engine's fault either, and is tried again."""
        told = ""
        while (node := await self._room(seat)) and is_place(self._engine_config.model):
            unpacked = nodes.on_one(node, unpack, self._engine_config.model)
            try:
                async with asyncio.timeout(UNPACK_S):
                    await unpacked
                return node
            except Exception as error:
                reason = one_line(error) or f"it took longer than {UNPACK_S:g} s"
                ray.cancel(unpacked, force=True)
            if not await asyncio.to_thread(nodes.alive, node):
                continue
            if reason != told:
                told = reason
                self._events.append(f"a sampler waits for node {node[:8]}, or another: {reason}{self._strength()}")
            await asyncio.sleep(_UNFIT_S)
        return node

    async def _take_weights(self, engine: _Engine) -> None:
        """Brings what was published last into an engine that is up, and opens it for routes."""
        told, engine.loading = False, True
        while not engine.live:
            # No publish may slip in between these weights and the first route, nor the turn of a learner on the same GPU.
            async with self._turns.start(), self._membership:
                if engine.live:  # one came while the lock was awaited
                    return
                rounds = self._weights.rounds
                result = await self._weights.bring(engine.name, self._peer(engine))
                if result is not None and result.ok:
                    await Client(engine.handle).wake()  # it may have slept since it came up
                engine.live = result is None or result.ok
            engine.loading = False
            if result is None or result.ok:
                return
            if result.serving != "old" or result.failed_phase not in (Phase.INIT, Phase.STAGE):
                raise EngineError("weights", result.reason)
            if not told:
                told = True
                self._events.append(f"{engine.name} waits for the next weights: {result.reason}")
            while not engine.live and self._weights.rounds == rounds:  # until a learner publishes again
                if engine.name not in self._engines:
                    raise EngineError("weights", "it was fenced while it waited for weights")
                await engine.handle.stats.remote()
                await asyncio.sleep(_ROOM_S)

    async def _facts(self, engine: _Engine) -> Facts:
        if not hasattr(engine.handle, "facts"):  # a stand-in, as tests have
            return Facts()
        async with asyncio.timeout(self._config.health_timeout_s):
            found = await engine.handle.facts.remote()
        return Facts(Place(found["node"], tuple(found["devices"])), found["num_workers"], found["dtype"])

    def _peer(self, engine: _Engine) -> Peer:
        async def land(manifest: dict[str, Any], parcel: Sequence[Any]) -> dict[str, Any]:
            return dict(await engine.handle.land.remote(manifest, list(parcel)))

        return Peer(Client(engine.handle), engine.facts or Facts(), land)

    def _peers(self) -> dict[str, Peer]:
        """Every engine that is up, those that wait for weights too."""
        return {e.name: self._peer(e) for e in self._engines.values() if e.facts is not None}

    def _take_stock(self, report: PublishReport, last: bool) -> bool:
        """After a publish: who has the weights may be routed to, who failed is fenced. In a collective others fail with it; they are kept, and
        the answer is True: it is worth another try. After the `last` one those that failed by no fault of theirs wait for the next publish,
        as long as somebody else can be blamed: else what never works would be tried without end."""
        again, blamed = False, any(not r.ok and r.own_fault for r in report.results.values())
        for name, result in report.results.items():
            engine = self._engines.get(name)
            if engine is None:  # fenced meanwhile
                continue
            if result.ok:
                engine.live = True
            elif not last and (result.serving == "held" or (result.serving == "old" and not result.own_fault)):
                engine.live = engine.live and result.serving == "old"
                again = True
            elif last and blamed and not result.own_fault and result.serving in ("held", "old"):
                engine.live = False
                self._events.append(f"{name} waits for the next weights: {result.reason}{self._strength()}")
            else:
                self._fence(engine, f"publish {report.version} failed in {result.failed_phase}: {result.reason}")
        return again

    def _strength(self) -> str:
        """How many engines work, where it is not all of them."""
        live = sum(e.live for e in self._engines.values())
        return f"; {live} of {self._config.num_engines} engines work" if live < self._config.num_engines else ""

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(self._config.health_every_s)
            engines = [e for e in self._engines.values() if e.live]
            found = await asyncio.gather(*(self._check(engine) for engine in engines))
            self._load = [*self._load[-999:], np.sum(found, axis=0)]

    async def _check(self, engine: _Engine) -> np.ndarray:
        """[5]: requests running; tokens sampled, prompted, cached and cacheable since the last look. An engine that is dead or silent is
        fenced."""
        try:
            with self._waits(f"{engine.name}, for its state"):
                async with asyncio.timeout(self._config.health_timeout_s):
                    stats = await engine.handle.stats.remote()
        except Exception as error:
            self._fence(engine, one_line(error) or f"no answer within {self._config.health_timeout_s:g} s")
            return np.zeros(5)
        if stats["dead"]:
            self._fence(engine, "its engine process is gone")
        counted = np.array(
            [stats[f"{kind}_tokens"] for kind in ("sampled", "prompt", "cached", "cacheable")], dtype=float
        )
        before = self._counted.get(engine.name, counted)
        self._counted[engine.name] = counted
        return np.array([stats["in_flight"], *(counted - before)])

    def _come_back(self) -> None:
        """After a death of this process, and of its engines with it: as many new ones, with what was published last."""
        self._began = True
        self._weights.restore()
        self._events.append(
            f"the fleet came back; {self._config.num_engines} engines start with weights {self._weights.version}"
        )
        self._prefix = f"sampler-{os.getpid()}-"  # somebody may still report the dead ones by their names
        for seat in self._seats:
            self._background(self._replace(seat))
        self._watch = asyncio.create_task(self._watch_health())
