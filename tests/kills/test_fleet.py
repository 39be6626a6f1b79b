"""The fleet under loss: a dead engine is fenced, sessions move on, its successor gets the published weights first.

The sampler actors are processes of their own, as always, but have no vLLM behind them: a policy turn tells which weights the
actor holds. (Real engines die in `test_matrix.py`; `tests/engines/test_vllm_publish.py` publishes into real ones.)
"""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from agents.types import Sampling, Version
from cluster.errors import is_expected, one_line
from cluster.fleet import Fleet, FleetConfig
from cluster.runtime import RayConfig, ray_session
from cluster.vllm.engine import EngineConfig
from cluster.vllm.segment import ShmWriter
from tests.runs import alive

POLICY = Path(__file__).resolve().parents[2] / "envs" / "world" / "policy"
ENGINE = EngineConfig(model=str(POLICY), version=Version(0, 0).label)


class Hollow:
    """A `Sampler` without an engine. In a folder of the name `stuck` it hangs in the middle of a publish."""

    def __init__(self, config):
        self.label, self.received, self.stuck = config.version, None, Path(config.model).name == "stuck"

    async def start(self):
        return [os.getpid()]

    async def generate(self, prompt_ids, request_id, sampling, stop_token_ids):
        return self.received, self.label

    async def stats(self):
        return {"dead": False, "sampled_tokens": 0, "in_flight": 0}

    async def checksums(self):
        return {"received": self.received}

    async def call(self, method, *args):
        if method == "update_weights":
            while self.stuck:
                await asyncio.sleep(1)
            self.received = args[0]["manifest"]["checksum"]
        elif method == "set_version":
            (self.label,) = args

    async def shutdown(self):
        pass


Hollow.__module__ = "__main__"  # so that it travels to the workers by value


@pytest.fixture(scope="module", autouse=True)
def ray():
    with ray_session(RayConfig(object_store_mb=128)) as started:
        yield started


@pytest.fixture
def hollow(monkeypatch):
    monkeypatch.setattr("cluster.fleet.Sampler", Hollow)


async def turn(fleet: Fleet, session: str):
    """(engine, weights, version) of a policy turn."""
    name, handle = await fleet.route(session)
    return name, *(await handle.generate.remote([1], session, Sampling(), []))


async def until(fleet: Fleet, said: str, seen: list[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(said in line for line in seen):
        assert time.monotonic() < deadline, f"nothing said {said!r}: {seen}"
        await asyncio.sleep(0.05)
        seen += await fleet.events()


def weights(folder: Path, value: float):
    return ShmWriter(folder).write([("w", torch.full((8,), value))])


def test_a_dead_engine_is_replaced_with_the_current_weights(hollow, tmp_path):
    async def story():
        fleet = Fleet(FleetConfig(num_engines=2, health_every_s=0.1), ENGINE)
        pids = await fleet.start()
        first, second = (await turn(fleet, "a"))[0], (await turn(fleet, "b"))[0]
        assert first != second, "sessions spread over engines"
        assert (await turn(fleet, "a"))[0] == first, "a session stays on its engine"

        published, label = weights(tmp_path, 1.0), Version(0, 1).label
        report = await fleet.publish(published.to_dict(), label)
        assert report["publish/failed"] == 0 and report["publish/engines"] == 2
        assert await turn(fleet, "a") == (first, published.checksum, label)

        os.kill(pids[first][0], signal.SIGKILL)
        seen: list[str] = []
        await until(fleet, f"{first} was fenced", seen)
        moved, *holds = await turn(fleet, "a")
        assert moved != first and holds == [published.checksum, label], "the session goes on elsewhere"
        await until(fleet, "took its place", seen)
        members = await fleet.members()
        assert first not in members and sum(m["live"] for m in members.values()) == 2
        for session in range(8):
            assert (await turn(fleet, f"more-{session}"))[1:] == (published.checksum, label)
        sums = await fleet.verify()
        assert len(sums) == 2 and {s["received"] for s in sums.values()} == {published.checksum}
        await fleet.shutdown()
        return [pid for m in members.values() for pid in m["pids"]]

    left = asyncio.run(story())
    time.sleep(0.5)
    assert not any(alive(pid) for pid in left), "the fleet left processes behind"


def test_a_fleet_that_died_comes_back_with_what_was_published_last(hollow, tmp_path):
    async def story():
        state = str(tmp_path / "published.json")
        fleet = Fleet(FleetConfig(), ENGINE, state)
        await fleet.start()
        published, label = weights(tmp_path, 2.0), Version(3, 7).label
        await fleet.publish(published.to_dict(), label)
        await fleet.shutdown()

        reborn = Fleet(FleetConfig(), ENGINE, state)
        await reborn.pulse()
        assert (await turn(reborn, "a"))[1:] == (published.checksum, label)
        with pytest.raises(Exception, match="was replaced"):
            await reborn.publish(weights(tmp_path, 0.0).to_dict(), Version(2, 9).label)
        await reborn.shutdown()

    asyncio.run(story())


def test_an_engine_that_hangs_in_a_publish_is_fenced_and_the_others_go_on(hollow, tmp_path):
    async def story():
        fleet = Fleet(FleetConfig(num_engines=1, publish_deadline_s=0.5), ENGINE)
        (well,) = await fleet.start()
        fleet._engine_config = EngineConfig(model=str(tmp_path / "stuck"), version=ENGINE.version)
        await fleet._replace()
        fleet._engine_config = ENGINE
        began = time.monotonic()
        report = await fleet.publish(weights(tmp_path, 1.0).to_dict(), Version(0, 1).label)
        assert report["publish/engines"] == 2 and report["publish/failed"] == 1
        assert time.monotonic() - began < 5, "a hanging engine held the publish up"
        assert (await turn(fleet, "a"))[0] == well
        seen: list[str] = []
        await until(fleet, "failed in update", seen)
        await fleet.shutdown()

    asyncio.run(story())


def test_an_engine_that_cannot_load_says_why_in_one_line(tmp_path):
    fleet = Fleet(FleetConfig(), EngineConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(Exception, match="nothing") as caught:
        asyncio.run(fleet.start())
    cause = caught.value.cause if hasattr(caught.value, "cause") else caught.value
    assert is_expected(cause) and "\n" not in one_line(cause)
