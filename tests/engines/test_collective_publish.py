"""Publishing by a collective: two real vLLM engines on CPU, two gloo learner ranks that hold half of the model each.

Nothing between them is a stand-in but the wire that Ray would be: the fleet, the state machine, the meeting, the buckets and the
layer-wise load are those of a run. transformers' float32 forward judges which weights an engine computes with.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from transformers import Qwen3Config, Qwen3ForCausalLM

import gumshoe
from agents.types import Version
from cluster.fleet import Fleet, FleetConfig, _Engine
from cluster.membership import Place
from cluster.publishing import Facts
from cluster.vllm.engine import EngineConfig, PolicyEngine
from tests.support.publishing_rank import KEY

VOCAB, MAX_DIFF, MEAN_DIFF = 600, 2e-3, 2e-4
WAIT_S = 280.0


def make_policy() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float().eval()


class Handle:
    """A sampler actor's handle around an engine of this process."""

    def __init__(self, engine: PolicyEngine) -> None:
        self.call = SimpleNamespace(remote=self._call)
        self.checksums = SimpleNamespace(remote=self._checksums)
        self._engine = engine

    async def _call(self, method: str, *args: Any) -> None:
        await getattr(self._engine, method)(*args)

    async def _checksums(self) -> dict[str, Any]:
        return {"received": (await self._engine.checksums()).received}


class Bench:
    """The fleet and its engines on one loop, the learner's ranks as processes."""

    def __init__(self, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self.model = folder / "policy"
        make_policy().save_pretrained(self.model)
        self.engines: dict[str, PolicyEngine] = {}
        self.fleet = self.run(self._make_fleet())
        self.listener = Listener(str(folder / "wire"), authkey=KEY)
        threading.Thread(target=self._serve, daemon=True).start()
        environment = {**os.environ, **gumshoe.child_env(), "OMP_NUM_THREADS": "1"}
        self.ranks = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "tests.support.publishing_rank", str(rank), "2", str(folder / "wire"),
                    str(self.model), str(folder),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )
            for rank in range(2)
        ]  # fmt: skip
        self.policy = make_policy()

    def run(self, work: Any) -> Any:
        return self.runner.run(asyncio.wait_for(work, WAIT_S))

    async def _make_fleet(self) -> Fleet:
        config = FleetConfig(num_engines=2, transport="gloo", publish_deadline_s=60.0)
        fleet = Fleet(config, EngineConfig(model=str(self.model), version=Version(0, 0).label))
        fleet._weights._bucket_bytes = 20_000  # some layers take several buckets, the embedding one of its own
        return fleet

    def _serve(self) -> None:
        def answer(connection: Any) -> None:
            with connection:
                method, args = connection.recv()
                try:
                    work = getattr(self.fleet, method)(*args)
                    found = asyncio.run_coroutine_threadsafe(work, self.runner.get_loop()).result(WAIT_S)
                except Exception as error:
                    found = RuntimeError(f"{type(error).__name__}: {error}")
                connection.send(found)

        while True:
            try:
                connection = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def join(self, name: str) -> PolicyEngine:
        config = EngineConfig(str(self.model), max_model_len=256, kv_cache_gb=0.05, version=Version(0, 0).label)
        engine = self.engines[name] = PolicyEngine(config)
        self.run(engine.start())
        facts = self.run(engine.facts())
        assert facts == {"devices": [], "num_workers": 1, "dtype": "F32"}
        self.fleet._engines[name] = _Engine(
            name, Handle(engine), live=True, facts=Facts(Place("here"), facts["num_workers"], facts["dtype"])
        )
        return engine

    async def publish(self, step: int) -> None:
        """Both ranks take the step and publish it."""
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(1 + step / 20)
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"publish {step}\n")
            rank.stdin.flush()
        for rank in self.ranks:
            assert rank.stdout is not None
            while (line := await asyncio.to_thread(rank.stdout.readline)).strip() != f"published {step}":
                assert line, "a learner rank died"

    async def check(self, name: str, version: str) -> None:
        """The engine computes with the learner's weights of now, and says so."""
        ids = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(1))
        found = torch.tensor(await self.engines[name].score(ids.tolist(), request_id=f"check-{name}-{version}"))
        with torch.no_grad():
            wanted = torch.log_softmax(self.policy(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        diff = (found - wanted).abs()
        print(f"\n{name} at {version}: log-prob difference max {diff.max():.1e} mean {diff.mean():.1e}")
        assert diff.max() <= MAX_DIFF and diff.mean() <= MEAN_DIFF
        assert self.engines[name].version == version

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        self.listener.close()
        for engine in self.engines.values():
            self.run(engine.shutdown())
        self.runner.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("collective"))
    yield made
    made.close()


def test_engines_join_and_leave_a_collective_and_always_compute_with_the_learners_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: Any) -> None:
        return None

    monkeypatch.setattr(Fleet, "_replace", gone)
    monkeypatch.setattr("cluster.fleet.ray.kill", lambda _: None)
    bench.join("a")

    async def alone() -> None:
        flight = asyncio.ensure_future(bench.engines["a"].generate([1, 2, 3], request_id="in-flight", max_tokens=180))
        while not bench.engines["a"]._in_flight:
            await asyncio.sleep(0.001)
        await bench.publish(1)
        made = await flight
        assert len(made.token_ids) == 180, "a generation did not survive the publish"
        await bench.check("a", Version(0, 1).label)

    bench.run(alone())
    first = bench.fleet._weights._membership.number
    bench.join("b")

    async def both() -> None:
        await bench.publish(2)
        for name in "ab":
            await bench.check(name, Version(0, 2).label)
        assert bench.fleet._weights._membership.number > first, "the one that joined was not met"
        await bench.publish(3)
        for name in "ab":
            await bench.check(name, Version(0, 3).label)
        assert len(await bench.fleet.verify()) == 2, "what was loaded is not what was sent"

    bench.run(both())
    met = bench.fleet._weights._membership.number

    async def bereaved() -> None:
        for pid in bench.engines["b"].pids:
            os.kill(pid, signal.SIGKILL)
        await bench.publish(4)
        await bench.check("a", Version(0, 4).label)
        assert [e.name for e in bench.fleet._engines.values() if e.live] == ["a"]
        assert any("b was fenced" in line for line in await bench.fleet.events())
        assert bench.fleet._weights._membership.number > met

    bench.run(bereaved())
