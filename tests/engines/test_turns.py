"""Turns with a real engine on CPU: vLLM takes the calls, holds requests and goes on with them; no memory is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import ROOT
from cluster.vllm.engine import EngineConfig, PolicyEngine
from cluster.vllm.preflight import EngineError
from cluster.vllm.transfer import ShmTransport, ShmWriter, publish

POLICY = ROOT / "envs" / "world" / "policy"
PROMPT = list(range(5, 25))


def weights(scale: float) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor.float() * scale for name, tensor in load_file(POLICY / "model.safetensors").items()}


def test_an_engine_sleeps_holds_its_requests_and_wakes_with_new_weights(tmp_path: Path) -> None:
    async def play() -> None:
        engine = PolicyEngine(EngineConfig(str(POLICY), max_model_len=512, max_num_seqs=4, kv_cache_gb=0.1))
        await engine.start()
        writer = ShmWriter(tmp_path, prefix="weights-0")

        async def send(scale: float, version: str) -> Any:
            transport = ShmTransport(writer.write(weights(scale).items()))
            return (await publish({"one": engine}, transport, version)).results["one"]

        def ask(name: str, tokens: int) -> asyncio.Task[Any]:
            return asyncio.create_task(engine.generate(PROMPT, request_id=name, max_tokens=tokens, temperature=0.0))

        try:
            assert (await send(1.0, "0.0")).ok
            before = await ask("before", 32)
            running = ask("running", 480)
            while not (await engine.stats()).in_flight:
                await asyncio.sleep(0)
            await asyncio.sleep(0.25)
            await engine.sleep()
            queued = ask("queued", 32)
            await asyncio.sleep(0.3)
            assert not running.done() and not queued.done(), "nobody samples in the learner's turn"
            for call in (engine.wake, engine.resume, engine.checksums):
                with pytest.raises(EngineError, match=r"weights|none were loaded"):
                    await call()
            assert (await send(0.5, "0.1")).ok
            await asyncio.sleep(0.3)
            assert not queued.done(), "weights alone wake nobody: the learner is still there"
            assert (await engine.checksums()).version == "0.1"
            await engine.wake()
            kept, new = await asyncio.gather(running, queued)
            assert len(kept.token_ids) == 480 and {v for *_, v in kept.version_spans} == {"0.0", "0.1"}
            assert [v for *_, v in new.version_spans] == ["0.1"]
            first = kept.version_spans[0][1]
            assert kept.token_ids[: min(first, 32)] == before.token_ids[: min(first, 32)], "what it had it kept"
            await engine.sleep()
            assert (await send(1.0, "0.2")).ok
            await engine.wake()
            assert (await ask("after", 32)).token_ids == before.token_ids
        finally:
            await engine.shutdown()

    asyncio.run(play())
