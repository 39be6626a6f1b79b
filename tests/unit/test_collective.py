"""A collective publish whole, with real gloo groups: the fleet, two learner ranks that must gather together, and engines that are threads.

Nothing of vLLM or Ray is here: an engine's workers are threads that do what `receivers.py` does, and the fleet's actor is its object
on an event loop. `tests/engines/test_collective_publish.py` does it with real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agents.learning import agreement
from agents.types import Version
from cluster import publisher
from cluster.fleet import Fleet, FleetConfig, _Engine
from cluster.membership import EpochGuard, Place, StaleEpoch
from cluster.publisher import Publisher
from cluster.publishing import Facts
from cluster.vllm import collective, senders
from cluster.vllm.buckets import StreamDigest, from_wire, learn_layout
from cluster.vllm.collective import CollectiveError, GlooGroup, Rendezvous, arrive, receive
from cluster.vllm.deadline import Stuck, joined
from cluster.vllm.engine import EngineConfig
from cluster.vllm.handshake import Chunks, Exchange
from cluster.vllm.segment import ShmWriter
from cluster.vllm.senders import GlooSender, IpcSender
from cluster.vllm.transfer import Deadlines

LIMIT_S = 4.0
EXPORTED: dict[int, torch.Tensor] = {}
"""Buffers that processes on the same GPU may map, by what stands for a handle."""


def weights(step: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"w{i}", torch.full((40, i + 1), float(step + i))) for i in range(6)]


class Worker:
    """One tensor-parallel worker: what `receivers._Gloo` does, with a dict for a model."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.guard = EpochGuard()
        self.held: dict[str, torch.Tensor] = {}
        self.checksum: str | None = None
        self.rank = 0
        self.group: GlooGroup | None = None
        self._info: dict[str, Any] = {}
        self.gpu = ""
        self.digest = StreamDigest()

    def meet(self, info: dict[str, Any]) -> None:
        self.guard.enter(info["epoch"])
        if info["kind"] == "ipc":
            return
        self.rank, self._info = info["rank_offset"] + self.number, info
        store = arrive(info, info["epoch"], self.rank, info["limit_s"])
        self.group = GlooGroup(store, self.rank, info["world_size"], info["limit_s"], info["host"])

    def update(self, info: dict[str, Any]) -> None:
        self.guard.check(info["epoch"])
        if "handles" in info:  # as vLLM does it: copies of the parts of what is mapped
            ((key,),) = [handle for gpu, handle in info["handles"].items() if gpu == self.gpu]
            parts = EXPORTED[key][: sum(info["tensor_sizes"])].split(info["tensor_sizes"])
            for name, shape, part in zip(info["names"], info["shapes"], parts, strict=True):
                self.held[name] = part.view(torch.float32).view(shape).clone()
                self.digest.add(name, self.held[name])
            self.checksum = self.digest.hexdigest()
            return
        got: list[tuple[str, torch.Tensor]] = []
        assert self.group is not None
        self.checksum = receive(from_wire(info["layout"]), self.group, self._info["bucket_bytes"], got.extend)
        self.held = dict(got)

    def leave(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None


@dataclass
class Engine:
    """Stands for a sampler actor's handle: `handle.call.remote(method, ...)`."""

    name: str
    num_workers: int = 1
    fails: str = ""
    """Phase method in which it dies."""
    gpus: tuple[str, ...] = ()
    calls: list[str] = field(default_factory=list)
    label: str = ""
    asleep: bool = False

    def __post_init__(self) -> None:
        self.workers = [Worker(i) for i in range(self.num_workers)]
        for worker, gpu in zip(self.workers, self.gpus, strict=False):
            worker.gpu = gpu
        self.call = SimpleNamespace(remote=self._call)
        self.checksums = SimpleNamespace(remote=self._checksums)
        self._pool = ThreadPoolExecutor(self.num_workers)

    async def _checksums(self) -> dict[str, Any]:
        return {"received": self.workers[0].checksum}

    async def _call(self, method: str, *args: Any) -> None:
        self.calls.append(method)
        if "dead" in self.calls:
            raise RuntimeError("the engine's process has died")
        if method == self.fails:
            for worker in self.workers:
                worker.leave()
            self.calls.append("dead")
            raise RuntimeError(f"died in {method}")
        if method == "pause":
            self.asleep = True
        elif method == "resume":
            self.asleep = False
        elif method == "set_version":
            (self.label,) = args
        elif method == "start_weight_update":
            for worker in self.workers:
                worker.digest = StreamDigest()
        elif method == "abort_weight_update":
            for worker in self.workers:
                worker.leave()
        elif method == "init_weight_transfer" and args[0].get("epoch") != self.workers[0].guard.number:
            await self._all("meet", dict(args[0]))
        elif method == "update_weights":
            await self._all("update", dict(args[0]))

    async def _all(self, method: str, info: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._pool, getattr(w, method), info) for w in self.workers))

    @property
    def holds(self) -> float:
        """The step whose weights every worker holds; -1 if they are torn or none."""
        steps = {w.held["w0"][0, 0].item() for w in self.workers if w.held}
        whole = all(torch.equal(w.held[n], t) for w in self.workers for s in steps for n, t in weights(int(s)))
        return steps.pop() if len(steps) == 1 and whole else -1.0


class Story:
    """A fleet on a loop of its own, two learner ranks on threads, and what they say to each other."""

    def __init__(self, engines: list[Engine], limit_s: float = LIMIT_S, transport: str = "gloo") -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        config = FleetConfig(num_engines=2, publish_deadline_s=limit_s, transport=transport)
        self.engines = {engine.name: engine for engine in engines}
        self.fleet = self.run(self._make(config))
        self.fleet._weights._bucket_bytes = 1000
        for engine in engines:
            self.join(engine, live=True)
        self.published: list[int] = []
        self.gathers = [0, 0]
        """Weights that each rank ran through."""
        self._step, self._gathering = threading.Barrier(2), threading.Barrier(2)
        self._words: list[Any] = [None, None]
        self.events: list[str] = []
        actor = SimpleNamespace(
            published=_Remote(lambda _, step, __: self.published.append(step)), event=_Remote(self.events.append)
        )
        setup = SimpleNamespace(
            fleet=_Actor(self.fleet, self.loop),
            buffer=actor,
            segments="/nowhere",
            train=SimpleNamespace(verify_every=1),
        )
        self.ranks = [Publisher(setup, 0, lambda ref: ref.result(60), rank, 1) for rank in (0, 1)]
        for rank, found in enumerate(self.ranks):
            found._world, found._tell = 2, lambda word, rank=rank: self._tell(rank, word)  # type: ignore[method-assign]
            if transport == "ipc":
                found._devices = ("gpu-0", "gpu-1")
            found._ipc = IpcSender(
                rank,
                torch.device("cpu"),
                lambda word, rank=rank: self._everybody(rank, word),
                partial(self._export, rank),
            )

    async def _make(self, config: FleetConfig) -> Fleet:
        return Fleet(config, EngineConfig(model="", version=Version(0, 0).label))

    def join(self, engine: Engine, live: bool = False) -> None:
        self.engines[engine.name] = engine
        facts = Facts(Place("here", engine.gpus), engine.num_workers)
        self.fleet._engines[engine.name] = _Engine(engine.name, engine, live=live, facts=facts)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def _tell(self, rank: int, word: Any) -> Any:
        """A broadcast from rank 0 of the learner."""
        if rank == 0:
            self._words[0] = word
        self._step.wait(30)
        found = self._words[0]
        self._step.wait(30)
        return found

    def _everybody(self, rank: int, word: Any) -> list[Any]:
        self._words[rank] = word
        self._step.wait(30)
        found = list(self._words)
        self._step.wait(30)
        return found

    def _export(self, rank: int, buffer: torch.Tensor) -> tuple[str, list[Any]]:
        EXPORTED[len(EXPORTED)] = buffer
        return f"gpu-{rank}", [len(EXPORTED) - 1]

    def gather(self, rank: int, step: int) -> Any:
        def run(dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
            for weight in weights(step):
                self._gathering.wait(20)  # a collective: it breaks if the other rank does anything else meanwhile
                self.gathers[rank] += 1
                yield weight

        return run

    def publish(self, step: int) -> float:
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(self.ranks[r].publish, self.gather(r, step), step) for r in (0, 1)]
            for one in both:
                one.result(60)
        assert self.gathers[0] == self.gathers[1] and self.gathers[0] % len(weights(0)) == 0, "a rank left the gather"
        return time.monotonic() - began

    def live(self) -> set[str]:
        return {e.name for e in self.fleet._engines.values() if e.live}


class _Remote:
    def __init__(self, call: Any, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._call, self._loop = call, loop

    def remote(self, *args: Any) -> Future[Any]:
        if self._loop is not None:
            return asyncio.run_coroutine_threadsafe(self._call(*args), self._loop)
        done: Future[Any] = Future()
        done.set_result(self._call(*args))
        return done


class _Actor:
    def __init__(self, actor: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._actor, self._loop = actor, loop

    def __getattr__(self, method: str) -> _Remote:
        return _Remote(getattr(self._actor, method), self._loop)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(*_: Any) -> None:
        return None

    monkeypatch.setattr(Fleet, "_replace", gone)
    monkeypatch.setattr("cluster.fleet.ray.kill", lambda _: None)
    monkeypatch.setattr(publisher, "_here", lambda: ("here", "127.0.0.1"))


def test_two_engines_of_unlike_size_get_the_weights_of_two_ranks() -> None:
    story = Story([Engine("a", 1), Engine("b", 2)])
    story.publish(1)
    a, b = story.engines["a"], story.engines["b"]
    assert [w.rank for e in (a, b) for w in e.workers] == [1, 2, 3]
    assert (a.holds, b.holds) == (1.0, 1.0) and a.label == b.label == Version(0, 1).label
    assert not a.asleep and not b.asleep and story.published == [1]
    number = a.workers[0].guard.number
    story.publish(2)
    assert (a.holds, b.holds) == (2.0, 2.0)
    assert a.workers[0].guard.number == number, "the same members met twice"
    assert len(story.run(story.fleet.verify())) == 2, "what was sent and what was loaded differ"
    assert story.gathers == [18, 18], "one pass to learn the layout, then one for each publish"


def test_an_engine_that_dies_in_the_broadcast_costs_the_others_nothing_but_a_second_pass() -> None:
    story = Story([Engine("a"), Engine("b", 2), Engine("c", fails="update_weights")])
    story.publish(1)
    assert story.live() == {"a", "b"} and story.published == [1]
    for name in "ab":
        engine = story.engines[name]
        assert engine.holds == 1.0 and engine.label == Version(0, 1).label and not engine.asleep
        assert [w.rank for w in engine.workers] == ([1] if name == "a" else [2, 3])
    lines = story.run(story.fleet.events())
    assert any("c was fenced: publish" in line and "failed in update" in line for line in lines), lines
    assert story.gathers == [18, 18]


@pytest.mark.parametrize("phase", ["finish_weight_update", "set_version", "resume"])
def test_an_engine_that_dies_with_the_weights_at_hand_leaves_the_others_with_weights_that_are_known(phase: str) -> None:
    story = Story([Engine("a"), Engine("b", fails=phase)])
    story.publish(1)  # and compares what the engines hold
    assert story.live() == {"a"} and story.engines["a"].holds == 1.0
    assert len(story.run(story.fleet.verify())) == 1, "a healthy engine was fenced for what another did"
    brought = story.run(story.fleet._weights.bring("c", story.fleet._peers()["a"]))
    assert brought is not None and not brought.ok, "whoever comes up samples from the checkpoint it was started with"


class Sick(Engine):
    """Takes every weight, cannot load them, and answers."""

    async def _call(self, method: str, *args: Any) -> None:
        await super()._call(method, *args)
        if method == "update_weights":
            raise RuntimeError("out of memory")


def test_after_the_last_try_who_only_stood_by_is_not_started_again() -> None:
    story = Story([Engine("a"), Sick("b")])
    story.publish(1)
    assert set(story.fleet._engines) == {"a"} and story.live() == set()
    assert story.engines["a"].calls.count("update_weights") == 3
    lines = story.run(story.fleet.events())
    assert any("a waits for the next weights: another engine failed in update: out of memory" in x for x in lines), (
        lines
    )
    assert story.run(story.fleet.starving()), "the learner would not publish again"
    story.publish(2)
    assert story.live() == {"a"} and story.engines["a"].holds == 2.0


@pytest.mark.parametrize("phase", ["init_weight_transfer", "stage_weights", "pause", "start_weight_update"])
def test_an_engine_that_fails_before_anything_was_sent_leaves_the_others_whole(phase: str) -> None:
    story = Story([Engine("a"), Engine("b", fails=phase)], limit_s=2.0)
    took_s = story.publish(1)
    a = story.engines["a"]
    assert story.live() == {"a"} and a.holds == 1.0 and not a.asleep
    assert took_s < 15, "a dead engine was waited for"
    # Its first publish was called off with the old weights whole: nothing had moved.
    if phase not in ("init_weight_transfer", "stage_weights"):
        assert a.calls.index("resume") < a.calls.index("update_weights")


def test_an_engine_that_joins_is_in_the_next_epoch_and_one_alone_is_sent_to_while_the_learner_waits() -> None:
    story = Story([Engine("a")])
    story.publish(1)
    first = story.engines["a"].workers[0].guard.number
    story.join(Engine("b", 2))
    assert not story.run(story.fleet.starving()), "one engine samples"
    story.publish(2)
    a, b = story.engines["a"], story.engines["b"]
    assert story.live() == {"a", "b"} and (a.holds, b.holds) == (2.0, 2.0)
    assert a.workers[0].guard.number > first and [w.rank for w in b.workers] == [2, 3]

    story.fleet._engines.clear()
    story.join(Engine("c"))
    batches = iter([None, None, None, "batch", "batch", "batch", "batch"])
    lock = threading.Lock()

    def fetch() -> Any:
        with lock:
            return next(batches) if not story.engines["c"].label else "batch"

    turns: list[bool] = []

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        turns.append(bool(story.engines["c"].label))
        yield

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(story.ranks[r].next_batch, fetch, story.gather(r, 2), 2, turn) for r in (0, 1)]
        assert [one.result(60) for one in asked] == ["batch", "batch"]
    assert story.engines["c"].holds == 2.0 and story.live() == {"c"}
    assert story.published == [1, 2], "the ledger was told of the same weights twice"
    assert turns == [False, False], (
        "on a device that learner and engines share, each rank takes its turn for that publish"
    )


def test_a_publish_in_an_epoch_that_is_over_reaches_nobody() -> None:
    story = Story([Engine("a"), Engine("b")])
    met = story.run(story.fleet.meet("0-1", Place("here")))
    del story.fleet._engines["b"]
    report = story.run(story.fleet.broadcast("t", met.epoch, Version(0, 1).label, {}, {}, False))
    assert report == {"publish/again": 1.0} and story.engines["a"].calls == []
    assert not story.run(story.fleet.cleared("t")), "a learner would wait for ever"
    with pytest.raises(StaleEpoch):
        story.run(story.fleet.hand_out("t", {}))
    with pytest.raises(Exception, match="was replaced"):
        story.fleet._weights.version = Version(2, 0).label
        story.run(story.fleet.broadcast("t", met.epoch, Version(1, 9).label, {}, {}, False))


def test_a_learner_that_cannot_send_leaves_engines_held_and_the_next_pass_mends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story = Story([Engine("a"), Engine("b")], limit_s=3.0)
    whole, tries = collective.send, []

    def breaks(given: Any, *args: Any) -> Any:
        tries.append(story.engines["a"].asleep)
        if len(tries) == 1:
            next(given)
            raise CollectiveError("the network went away")
        return whole(given, *args)

    monkeypatch.setattr(collective, "send", breaks)
    story.publish(1)
    assert len(tries) == 2 and all(tries), "weights were sent while an engine sampled"
    assert story.live() == {"a", "b"} and {e.holds for e in story.engines.values()} == {1.0}


def test_whatever_ends_a_learner_in_a_pass_the_engines_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story([Engine("a")], limit_s=30.0)
    began = time.monotonic()

    def breaks(*_: Any) -> None:
        raise ZeroDivisionError("of no kind that a pass may end with")

    monkeypatch.setattr(collective, "send", breaks)
    with ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(story.ranks[r].publish, story.gather(r, 1), 1) for r in (0, 1))
        with pytest.raises(ZeroDivisionError):
            one.result(20)
        story._step.abort()
        with pytest.raises(threading.BrokenBarrierError):
            other.result(20)
    while story.fleet._weights._exchange is not None:
        assert time.monotonic() - began < 10, "an engine waits for a learner that is gone"
        time.sleep(0.01)
    assert "abort_weight_update" in story.engines["a"].calls and story.live() == set()


def test_a_join_that_hangs_is_given_up_and_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    began, never = time.monotonic(), threading.Event()
    assert joined(5.0, lambda: "communicator") == "communicator"
    for error in (RuntimeError("NCCL error: unhandled system error"), TimeoutError("its own")):
        with pytest.raises(type(error), match=str(error)):
            joined(5.0, partial(_raise, error))
    with pytest.raises(Stuck, match=r"not joined within 0\.1 s"):
        joined(0.1, never.wait)

    story = Story([Engine("a")], limit_s=2.0)
    monkeypatch.setattr(GlooSender, "join", lambda *_: joined(0.1, never.wait))
    story.fleet._weights._limits = Deadlines(init_s=0.5, start_s=0.5)
    monkeypatch.setattr(publisher.os, "_exit", lambda code: _raise(SystemExit(code)))
    with ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(story.ranks[r].publish, story.gather(r, 1), 1) for r in (0, 1))
        with pytest.raises(SystemExit):
            one.result(20)
        story._step.abort()
        assert other.exception(20)
    (line,) = story.events
    assert "the learner is started again: the group was not joined" in line
    assert story.fleet._weights._exchange is None and time.monotonic() - began < 10
    never.set()


def _raise(error: BaseException) -> None:
    raise error


def test_by_ipc_one_buffer_serves_all_passes_whoever_maps_it() -> None:
    """Two engines on one GPU, none on the other; one that dies before it has mapped anything, and one while it does."""
    EXPORTED.clear()
    story = Story([Engine("a", gpus=("gpu-0",)), Engine("b", gpus=("gpu-0",))], transport="ipc")
    story.fleet._weights._bucket_bytes = 500
    for step in (1, 2):
        story.publish(step)
        assert {e.holds for e in story.engines.values()} == {float(step)} and story.live() == {"a", "b"}
    assert story.gathers == [18, 18]
    story.join(Engine("c", fails="pause", gpus=("gpu-1",)))
    story.publish(3)
    assert story.gathers == [24, 24], "a pass was begun for which the engines were not ready"
    story.join(Engine("d", fails="update_weights", gpus=("gpu-1",)))
    story.publish(4)
    assert {story.engines[name].holds for name in "ab"} == {4.0} and story.live() == {"a", "b"}
    assert sorted(len(EXPORTED[key]) for key in EXPORTED) == [960, 960], "a buffer was exported twice"


def test_by_ipc_what_fails_on_one_rank_ends_the_pass_on_all_and_the_next_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    EXPORTED.clear()
    story = Story([Engine("a", 2, gpus=("gpu-0", "gpu-1"))], transport="ipc")
    story.fleet._weights._bucket_bytes = 1000
    whole, tries = senders.pack, []

    def breaks(bucket: Any, given: Any, into: torch.Tensor) -> Any:
        if into is story.ranks[1]._ipc._buffer:
            tries.append(bucket.names)
            if len(tries) == 1:
                next(given)  # and leaves two of this piece's
                raise RuntimeError("CUDA error: out of memory")
        return whole(bucket, given, into)

    monkeypatch.setattr(senders, "pack", breaks)
    took_s = story.publish(1)
    assert story.engines["a"].holds == 1.0 and story.live() == {"a"} and took_s < 5
    assert story.gathers == [18, 18] and len(EXPORTED) == 2 and tries[0] == ("w0", "w1", "w2")


@pytest.mark.parametrize("transport", ["gloo", "ipc"])
def test_a_rank_that_cannot_gather_ends_the_learner_on_all_ranks_with_its_words(transport: str) -> None:
    """The others would wait in their next gather, or tell each other of a piece that this rank never filled."""
    story = Story([Engine("a", 2, gpus=("gpu-0", "gpu-1"))], transport=transport)
    everybody = [partial(story._everybody, rank) for rank in (0, 1)]
    began = time.monotonic()

    def gather(rank: int) -> Any:
        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for number, weight in enumerate(weights(1)):
                agreement.heard(everybody[rank](agreement.Word()))
                if (rank, number) == (1, 2) and story.ranks[0]._layout:  # behind what the others gather
                    raise RuntimeError("CUDA out of memory")
                yield weight

        return lambda dtype: agreement.said(gathered(), everybody[rank])

    if transport == "gloo":
        story.ranks[0]._layout = story.ranks[1]._layout = learn_layout(weights(1))
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(story.ranks[r].publish, gather(r), 1) for r in (0, 1)]
        for one in both:
            with pytest.raises(agreement.GatherError, match=r"^rank 1: CUDA out of memory$"):
                one.result(20)
    assert time.monotonic() - began < 10 and story.published == []
    (line,) = story.events
    assert "step 1 were not gathered" in line and "rank 1: CUDA out of memory" in line
    assert not story.live() or story.engines["a"].holds == -1.0, "half-new weights may be sampled from"


def test_who_does_not_come_to_the_meeting_is_an_error_within_the_deadline() -> None:
    meeting = Rendezvous("127.0.0.1")
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(arrive, meeting.endpoint, 1, 1, 0.6)
        with pytest.raises(CollectiveError, match="rank 2 of 3 did not come to membership epoch 1"):
            meeting.gather(1, 3, 0.3)
        with pytest.raises(CollectiveError, match="called off: another rank did not come"):
            came.result()
    with pytest.raises(CollectiveError, match="epoch 7 did not meet"):
        arrive(meeting.endpoint, 7, 1, 0.1)
    with pytest.raises(CollectiveError):
        meeting.gather(2, 2, 60, lambda: True)  # nobody will come: the fleet has given up
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("interface", ["", "lo"])
def test_ranks_listen_where_they_met_and_not_where_the_machines_name_leads(
    interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.2 is an address of this machine that no name has, as a node's is where its name is 127.0.1.1."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    meeting = Rendezvous("127.0.0.2")
    sent, got = torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)

    def worker() -> None:
        group = GlooGroup(arrive(meeting.endpoint, 1, 1, 5), 1, 2, 5, meeting.endpoint["host"])
        group.broadcast(got)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(worker)
        store = meeting.gather(1, 2, 5)
        GlooGroup(store, 0, 2, 5, meeting.endpoint["host"]).broadcast(sent)
        other.result(5)
    assert torch.equal(sent, got)
    told = [store.get(f"gloo/0/{rank}") for rank in (0, 1)]  # where each rank says that it listens
    assert (
        all(socket.inet_aton("127.0.0.1") in one for one in told)
        if interface
        else socket.inet_aton("127.0.0.2") in told[0]
    )


def test_the_next_bucket_is_gathered_while_one_is_being_sent() -> None:
    gathered, sent = threading.Event(), []

    class Slow:
        def broadcast(self, payload: torch.Tensor) -> None:
            sent.append(payload)
            assert len(sent) > 1 or gathered.wait(5), "the gather waited for the first bucket to be sent"

        def close(self) -> None: ...

    def given() -> Iterator[tuple[str, torch.Tensor]]:
        for index, weight in enumerate(weights(0)):
            if index == 1:
                gathered.set()
            yield weight

    done = collective.send(given(), learn_layout(weights(0)), Slow(), 1)
    assert len(sent) == len(weights(0)) and done.nbytes == sum(t.nbytes for _, t in weights(0))


async def chunks(taken: list[Any], fails: bool) -> tuple[list[str], Exchange]:
    """Two engines and a learner by way of pieces, as CUDA IPC does it."""
    exchange = Exchange()
    way = Chunks(SimpleNamespace(number=3), {}, exchange, 2)  # type: ignore[arg-type]
    seen: list[str] = []

    async def engine(index: int) -> None:
        updates = way.updates(index)
        try:
            async for piece in updates:
                if fails and index == 1 and piece["piece"] == 1:
                    raise RuntimeError("out of memory")
                await asyncio.sleep(0.01 * (index + 1))
                taken.append((index, piece["piece"]))
        except RuntimeError as error:
            seen.append(str(error))
        finally:
            await updates.aclose()

    async def learner() -> None:
        try:
            assert await exchange.cleared()
            for number in range(3):
                await way.hand_out({"piece": number})
                seen.append(f"filled again after {len(taken)}")
            exchange.sent("sum")
        except RuntimeError as error:
            exchange.sent("", str(error))

    async def send() -> None:
        try:
            await way.send()
        except RuntimeError as error:
            seen.append(str(error))

    async with asyncio.timeout(5):
        await asyncio.gather(engine(0), engine(1), learner(), send())
    return seen, exchange


async def test_a_buffer_is_filled_again_only_when_every_engine_has_taken_it() -> None:
    taken: list[Any] = []
    seen, exchange = await chunks(taken, fails=False)
    assert seen == [f"filled again after {n}" for n in (2, 4, 6)] and exchange.checksum == "sum"


async def test_an_engine_that_fails_in_the_middle_releases_learner_and_engines() -> None:
    seen, _ = await chunks([], fails=True)
    assert "out of memory" in seen and sum("gave the update up" in line for line in seen) >= 2


def test_a_relay_fetches_once_per_node_and_by_another_engine_if_the_first_cannot(tmp_path: Any) -> None:
    story = Story([Engine("a"), Engine("b"), Engine("c"), Engine("d")], transport="auto")
    seen: list[tuple[str, str]] = []
    manifest = ShmWriter(tmp_path).write(weights(1))

    async def land(name: str, given: dict[str, Any], parcel: list[Any]) -> dict[str, Any]:
        seen.append((name, parcel[0]))
        if name in ("b", "d"):
            raise RuntimeError(f"{name} has no room")
        return {**given, "path": f"on the node of {name}"}

    for name, node in (("b", "far"), ("c", "far"), ("d", "lost")):
        member = story.fleet._engines[name]
        member.facts = Facts(Place(node))
        member.handle.land = SimpleNamespace(remote=lambda *args, name=name: land(name, *args))
    assert story.run(story.fleet.meet("0-1", Place("here"))).kind == "relay"
    mapped: dict[str, str] = {}
    for name, engine in story.engines.items():

        async def call(method: str, *args: Any, name: str = name) -> None:
            if method == "update_weights":
                mapped[name] = args[0]["manifest"]["path"]

        engine.call = SimpleNamespace(remote=call)
    report = story.run(story.fleet.publish(manifest.to_dict(), Version(0, 1).label, ["bytes"]))
    assert mapped == {"a": manifest.path, "b": "on the node of c", "c": "on the node of c"}
    assert sorted(seen) == [("b", "bytes"), ("c", "bytes"), ("d", "bytes")]
    assert report["publish/failed"] == 1 and story.live() == {"a", "b", "c"}
    assert any("d has no room" in line for line in story.run(story.fleet.events()))


def test_a_learner_publishes_again_when_no_engine_holds_weights_whatever_the_transport() -> None:
    story = Story([Engine("a")], transport="shm")
    story.fleet._engines["a"].live = False  # as after a death of the fleet, with a segment that it cannot see
    published = []

    def publish(gather: Any, step: int, *, again: bool = False) -> float:
        published.append((step, again))
        story.fleet._engines["a"].live = True
        return 0.0

    one = story.ranks[0]
    one.publish, one._tell = publish, lambda word: word  # type: ignore[method-assign]
    assert one.next_batch(lambda: "batch" if published else None, story.gather(0, 3), 3) == "batch"
    assert published == [(3, True)]
    story.fleet._engines["a"].live, story.fleet._engines["a"].loading = False, True
    assert not story.run(story.fleet.starving()), "it is being brought what was published last"


def test_engines_that_may_come_later_start_once_however_often_the_driver_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[Any] = []

    async def replace(_: Fleet, seat: Any) -> None:
        begun.append(seat)

    monkeypatch.setattr(Fleet, "_replace", replace)
    story = Story([Engine("a")])
    story.fleet._seats = ["first"]  # type: ignore[list-item]
    story.run(story.fleet.learner_sits("its group"))
    assert story.run(story.fleet.seated()) == (None, 1), "no learner has published: it may be the first"
    for _ in range(2):
        story.run(story.fleet.grow(["first", "second", "third"]))
    assert story.run(story.fleet.seated()) == (None, 3) and begun == ["second", "third"]
    story.publish(1)
    assert story.run(story.fleet.seated()) == ("its group", 3)
