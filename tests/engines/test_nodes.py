"""Two nodes: what is reserved on them, what they are sent, and a fleet and a retrieval that go on when one of them is lost and returns.

The sampler actors are processes of their own, as always, but have no vLLM behind them; a whole run loses a node in `tests/kills/test_nodes.py`.
The nodes see the same `tmp_path` and nothing of each other's shared memory, caches and `pair.disk`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.learning.config import LearnerConfig
from agents.types import Document, Query, Sampling, Version
from cluster import nodes
from cluster.errors import UserError
from cluster.fleet import Fleet, FleetConfig
from cluster.learner import LearnerRun, Setup, TrainConfig
from cluster.membership import Place
from cluster.nodecache import at_hand, ship
from cluster.placement import Demand, RolePlacement, reserve
from cluster.retrieval_actors import arrange
from cluster.rundir import segment_dir
from cluster.runtime import RayConfig, actor, ray_session
from cluster.sampler import Sampler
from cluster.storage import leave_token, prove_shared
from cluster.vllm import relay
from cluster.vllm.engine import EngineConfig
from cluster.vllm.segment import Manifest, SegmentReader, ShmWriter
from retrieval.backend import BackendConfig, build_backend
from retrieval.service import ServiceConfig
from tests.support.two_nodes import TwoNodes, two_nodes, within

ENGINE = EngineConfig(model="unread", version=Version(0, 0).label)


@pytest.fixture(scope="module")
def pair() -> Iterator[TwoNodes]:
    with two_nodes() as there, ray_session(RayConfig(address=there.address, wait_s=5)):
        yield there


def samplers(count: int, where: RolePlacement, fewest: int = -1, **each: float) -> Demand:
    return Demand("sampler", "sampler", "samplers", count, each or {"CPU": 0.5}, where, "fleet.num_engines", fewest)


class Hollow:
    """A `Sampler` without an engine."""

    def __init__(self, config: Any) -> None:
        self.label = config.version

    async def start(self) -> list[int]:
        return [os.getpid()]

    async def generate(self, *_: Any) -> tuple[str, str]:
        import ray

        return ray.get_runtime_context().get_node_id(), self.label

    async def stats(self) -> dict[str, Any]:
        counts = {f"{kind}_tokens": 0 for kind in ("sampled", "prompt", "cached", "cacheable")}
        return {"dead": False, "in_flight": 0, **counts}

    async def shutdown(self) -> None:
        pass


Hollow.__module__ = "__main__"  # so that it travels to the workers by value


def where_is_our_code() -> str:
    import cluster.placement

    return str(cluster.placement.__file__)


where_is_our_code.__module__ = "__main__"


def slow() -> None:
    time.sleep(30)


slow.__module__ = "__main__"


def test_every_node_gets_this_checkout_and_reads_what_the_driver_writes(pair: TwoNodes, tmp_path: Path) -> None:
    everyone = nodes.living()
    assert [n.labels["side"] for n in everyone] == ["head", "other"], "the driver's node comes first"
    answers = nodes.on_each(everyone, where_is_our_code)
    assert all("working_dir_files" in str(a.value) for a in answers), answers
    assert len({a.value for a in answers}) == 2, "raylets that share the folder take it away from each other"
    prove_shared(tmp_path, everyone)
    with pytest.raises(UserError, match=r"is not shared: node .* does not see what the driver writes there"):
        prove_shared(pair.disk, everyone)
    (late,) = nodes.on_each(everyone[:1], slow, timeout_s=0.5)
    assert late.problem == "no answer within 0.5 s"


def test_roles_sit_where_they_are_told_to_and_what_is_lacking_is_one_line(pair: TwoNodes) -> None:
    import ray

    ids = {n.labels["side"]: n.id for n in nodes.living()}
    learner = Demand(
        "learner", "learner", "learners", 1, {"CPU": 0.5, "head": 0.1}, RolePlacement(), "train.num_workers"
    )
    judge = Demand(
        "judge", "judge", "judges", 2, {"CPU": 0.5}, RolePlacement(labels={"side": "other"}), "judge.engines"
    )
    with reserve([learner, samplers(2, RolePlacement("strict_spread")), judge], 30) as seats:
        assert {s.node() for s in seats.of("sampler")} == set(ids.values())
        assert [s.node() for s in seats.of("learner")] == [ids["head"]]
        assert [s.node() for s in seats.of("judge")] == [ids["other"]] * 2
        full = samplers(2, RolePlacement("strict_spread"), CPU=1.5)
        with (
            pytest.raises(
                UserError,
                match=r"no room for 2 samplers with 1.5 CPU each within ray.wait_s=1: its 2 nodes have .* free",
            ),
            reserve([full], 1),
        ):
            pass
        seats.release("learner")
    with (
        pytest.raises(
            UserError, match=r"3 samplers with 0.5 CPU each \(strict_spread\), and the cluster has room for 2"
        ),
        reserve([samplers(3, RolePlacement("strict_spread"))], 1),
    ):
        pass
    with reserve([samplers(9, RolePlacement("strict_spread"), 1, CPU=2)], 30) as seats:
        assert [bool(s.node()) for s in seats.of("sampler")] == [True], "others would queue for the learner's room"
        within(30, lambda: sum(bool(s.node()) for s in seats.all("sampler")) == 2)
    within(30, lambda: ray.available_resources().get("CPU") == 4), "all was given back"


def test_each_node_serves_a_copy_of_its_own(pair: TwoNodes, tmp_path: Path) -> None:
    import ray

    documents = [Document(f"d{i}", f"title {i}", f"colour {i} thing{i % 7}") for i in range(50)]
    backend, folder = BackendConfig(kind="bm25"), tmp_path / "index"
    asyncio.run(build_backend(backend, documents, folder).close())
    everyone = nodes.living()
    place = ship(str(folder), everyone, str(tmp_path), copy=True)
    new_router, _ = arrange(backend, ServiceConfig(), place)
    routers = [new_router(**nodes.bound_to(n.id)) for n in everyone for _ in range(2)]
    ray.get([r.ready.remote() for r in routers], timeout=120)
    answers = ray.get([r.ask.remote([(Query("colour 7", k=3), 30.0)]) for r in routers], timeout=60)
    assert answers[0][0][0][0] == "d7" and all(a == answers[0] for a in answers)
    copies = [list((pair.folder / f"cache-{side}").glob("index-*/manifest.json")) for side in ("head", "other")]
    assert [len(found) for found in copies] == [1, 1], "one on each node's disk, for both of its routers"
    for router in routers:
        ray.kill(router)


def files(place: str) -> list[str]:
    return sorted(str(p) for p in Path(at_hand(place)).iterdir())


files.__module__ = "__main__"


def test_a_node_that_joins_has_what_only_the_first_one_saw(pair: TwoNodes, tmp_path: Path) -> None:
    model, second = pair.disk / "model", pair.disk / "second"
    for folder in (model, second):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    home, other = nodes.living()
    place = ship(str(model), [home], f"local://{tmp_path}/bucket", joined=True)
    assert [files(place)] == [a.value for a in nodes.on_each([home], files, place)] == [[str(model / "config.json")]]
    assert not (tmp_path / "bucket").exists(), "nobody has asked for it"
    (found,) = nodes.on_each([other], files, place)
    assert not found.problem and found.value[-1].startswith(f"{pair.folder}/cache-other/model-"), found
    unseen = ship(str(second), [home], str(pair.disk), joined=True)
    (found,) = nodes.on_each([other], files, unseen)
    assert "this node sees neither" in found.problem and "mount one of them" in found.problem, found


class Stops:
    """A `Buffer` for a learner that must not come so far as to use one."""

    def __init__(self) -> None:
        self.reason = ""

    async def stop(self, reason: str) -> None:
        self.reason = reason

    async def told(self) -> str:
        return self.reason


Stops.__module__ = "__main__"


def test_a_learner_that_does_not_see_the_runs_storage_says_so_and_trains_nothing(
    pair: TwoNodes, tmp_path: Path
) -> None:
    """It was restarted on a node that joined: its own folder of that name is empty, and looks like the beginning of a run."""
    import ray

    (checkpoints := pair.disk / "run" / "checkpoints").mkdir(parents=True)
    buffer = actor(Stops).remote()
    setup = Setup(
        "unread", TrainConfig(), LearnerConfig(), buffer, None, "", str(checkpoints), place=RolePlacement(labels={"side": "other"}),
        token=leave_token(checkpoints),
    )  # fmt: skip
    learner = LearnerRun(setup, tmp_path)
    within(240, lambda: not learner.running)
    reason = ray.get(buffer.told.remote())
    assert f"does not see {checkpoints} of this run; mount the run's storage on every node that may train" in reason


class Receiver(Hollow):
    """One that reads the weights it is told of."""

    land, _land = Sampler.land, Sampler._land

    def __init__(self, config: Any) -> None:
        self.label, self.received = config.version, ""
        self._stack, self._landing = contextlib.ExitStack(), None

    async def facts(self) -> dict[str, Any]:
        import ray

        return {"node": ray.get_runtime_context().get_node_id(), "devices": [], "num_workers": 1, "dtype": "F32"}

    async def call(self, method: str, *arguments: Any) -> None:
        if method == "update_weights":
            reader = SegmentReader(manifest := Manifest.from_dict(arguments[0]["manifest"]))
            reader.verify_checksum()
            self.received = manifest.checksum

    async def checksums(self) -> dict[str, Any]:
        return {"received": self.received}

    async def shutdown(self) -> None:
        self._stack.close()


Receiver.__module__ = "__main__"


def test_weights_reach_an_engine_on_another_node_by_relay_alone(
    pair: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fleet.Sampler", Receiver)

    async def story(seats: Any, folder: str) -> None:
        fleet = Fleet(FleetConfig(num_engines=2), ENGINE, seats=seats)
        await fleet.start()
        writer = ShmWriter(folder)
        manifest = writer.write([("w", torch.arange(1000.0))])
        (_, seen) = nodes.on_each(nodes.living(), os.path.exists, manifest.path)
        assert seen.value is False, "the other node has a memory of its own"
        meeting = await fleet.meet("learner", Place(nodes.here()))
        assert meeting.kind == "relay"
        parcel = relay.load(manifest, 1 << 10)
        report = await fleet.publish(manifest.to_dict(), Version(0, 1).label, parcel)
        assert report["publish/engines"] == 2 and report["publish/failed"] == 0, await fleet.events()
        assert [s["received"] for s in (await fleet.verify()).values()] == [manifest.checksum] * 2
        report = await fleet.publish(writer.write([("w", torch.ones(9))]).to_dict(), Version(0, 2).label, [])
        assert report["publish/failed"] == 1, "without the parcel there is nothing to read over there"
        await fleet.shutdown()

    with reserve([samplers(2, RolePlacement("strict_spread"))], 30) as seats, segment_dir() as folder:
        asyncio.run(story(seats.of("sampler"), folder))


def test_a_fleet_that_loses_a_node_goes_on_and_is_whole_again_when_one_joins(
    pair: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fleet.Sampler", Hollow)

    async def story(seats: Any) -> None:
        fleet = Fleet(FleetConfig(num_engines=2, health_every_s=0.2, max_restarts=1), ENGINE, seats=seats)
        await fleet.start()
        members = await fleet.members()
        assert {m["node"] for m in members.values()} == {n.id for n in nodes.living()}
        lost = next(name for name, m in members.items() if m["node"] != nodes.here())
        await asyncio.to_thread(pair.kill)
        seen: list[str] = []

        async def says(text: str) -> None:
            deadline = time.monotonic() + 120
            while not any(text in line for line in seen):
                assert time.monotonic() < deadline, f"nothing said {text!r}: {seen}"
                await asyncio.sleep(0.1)
                seen.extend(await fleet.events())

        await says(f"{lost} was fenced")
        await says("waits for a node with 0.5 CPU to join; 1 of 2 engines work")
        name, handle = await fleet.route("a")
        assert await handle.generate.remote([1], "a", Sampling(), []) == (nodes.here(), ENGINE.version) and name != lost
        pair.join()  # Ray sets signal handlers, which only the main thread may
        await says("took its place")
        assert sum(m["live"] for m in (await fleet.members()).values()) == 2
        assert fleet._restarts.count == 0, "the loss of a node is nobody's fault"
        await fleet.shutdown()

    with reserve([samplers(2, RolePlacement("strict_spread"))], 30) as seats:
        asyncio.run(story(seats.of("sampler")))
