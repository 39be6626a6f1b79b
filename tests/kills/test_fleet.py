"""The fleet under loss: a dead engine is fenced, sessions move on, its successor gets the published weights first."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.types import Sampling, Version
from cluster.fleet import Fleet, FleetConfig
from cluster.runtime import RayConfig, actor, ray_session
from cluster.vllm.engine import EngineConfig
from cluster.vllm.segment import ShmWriter
from tests.runs import alive

POLICY = Path(__file__).resolve().parents[2] / "envs" / "world" / "policy"
PROMPT = list(range(20, 40))
GREEDY = Sampling(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def ray():
    with ray_session(RayConfig(object_store_mb=128)) as started:
        yield started


@pytest.fixture
def fleet(ray):
    engine = EngineConfig(model=str(POLICY), max_model_len=256, kv_cache_gb=0.1, version=Version(0, 0).label)
    made = actor(Fleet).remote(FleetConfig(num_engines=2, health_every_s=0.5), engine)
    ray.get(made.start.remote())
    yield made
    ray.get(made.shutdown.remote())
    ray.kill(made)


def test_a_dead_engine_is_replaced_with_the_current_weights(ray, fleet, tmp_path):
    def generate(session: str):
        name, handle = ray.get(fleet.route.remote(session))
        return name, ray.get(handle.generate.remote(PROMPT, f"{session}-{time.monotonic_ns()}", GREEDY, []))

    first, before = generate("a")
    second, same = generate("b")
    assert first != second, "sessions spread over engines"
    assert generate("a")[0] == first, "a session stays on its engine"
    assert before.token_ids == same.token_ids

    torch.manual_seed(0)
    weights = {k: v + 0.05 * torch.randn_like(v) for k, v in load_file(POLICY / "model.safetensors").items()}
    writer = ShmWriter(tmp_path)
    report = ray.get(fleet.publish.remote(writer.write(weights.items()).to_dict(), Version(0, 1).label))
    assert report["publish/failed"] == 0 and report["publish/engines"] == 2
    _, after = generate("a")
    assert {s.version for s in after.version_spans} == {Version(0, 1)}
    assert after.token_ids != before.token_ids or after.logprobs != before.logprobs

    pids = ray.get(fleet.members.remote())[first]["pids"]
    os.kill(pids[0], signal.SIGKILL)
    deadline = time.monotonic() + 120
    lines: list[str] = []
    while not any("took its place" in line for line in lines):
        assert time.monotonic() < deadline, "no successor came up"
        ray.get(fleet.report.remote(first, "seen dead by the test"))
        lines += ray.get(fleet.events.remote())
        time.sleep(0.5)
    members = ray.get(fleet.members.remote())
    assert first not in members and sum(m["live"] for m in members.values()) == 2
    assert not any(alive(pid) for pid in pids), "the dead engine left processes behind"
    (fresh,) = set(members) - {second}
    name, moved = generate("a")
    while name != fresh:
        name, moved = generate(f"more-{time.monotonic_ns()}")
    assert moved.token_ids == after.token_ids, "the successor samples with the published weights"
    assert {s.version for s in moved.version_spans} == {Version(0, 1)}
    sums = ray.get(fleet.verify.remote())
    assert len({s["received"] for s in sums.values()}) == 1


def test_an_engine_that_cannot_load_says_why_in_one_line(ray, tmp_path):
    made = actor(Fleet).remote(FleetConfig(num_engines=1), EngineConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(Exception, match="nothing") as caught:
        ray.get(made.start.remote())
    from cluster.errors import is_expected, one_line

    cause = caught.value.cause if hasattr(caught.value, "cause") else caught.value
    assert is_expected(cause) and "\n" not in one_line(cause)
    ray.kill(made)
