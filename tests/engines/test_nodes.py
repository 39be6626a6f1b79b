"""Two nodes: what is reserved on them, what they are sent, and a fleet and a retrieval that go on when one of them is lost and returns.

The sampler actors are processes of their own, as always, but have no vLLM behind them; a whole run loses a node in `tests/kills/test_nodes.py`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.types import Document, Query, Sampling, Version
from cluster import nodes
from cluster.errors import UserError
from cluster.fleet import Fleet, FleetConfig
from cluster.nodecache import ship
from cluster.placement import Demand, RolePlacement, reserve
from cluster.retrieval_actors import arrange
from cluster.runtime import RayConfig, ray_session
from cluster.storage import prove_shared
from cluster.vllm.engine import EngineConfig
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
    prove_shared(tmp_path, everyone)
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
