"""Chat engines of a checkpoint: what `vllm serve` is told of the section `engine`."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.evaluation.config import EvalConfig
from cluster.evaluation.engines import ChatEngine, engine_arguments
from cluster.evaluation.plan import check_fits
from cluster.model import ModelShape
from cluster.sizes import CPU_KV_GIB, GIB
from cluster.vllm.launch import child_environment, environment
from cluster.vllm.options import EngineConfig

CACHE = "--kv-cache-memory-bytes"


def config(num_gpus: float, **engine: Any) -> EvalConfig:
    """An evaluation of a checkpoint by a chat agent."""
    found = EvalConfig()
    found.policy.kind, found.agent.name, found.model.path = "checkpoint", "react", "somewhere"
    found.fleet.num_gpus, found.engine = num_gpus, replace(found.engine, **engine)
    return found


def told(found: EvalConfig) -> dict[str, str]:
    arguments = [a for a in engine_arguments(found) if a != "--enforce-eager"]
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


@pytest.mark.parametrize(
    ("num_gpus", "given", "taken"),
    [
        (1.0, 12.5, 12.5),
        (1.0, None, None),  # the share of the GPU decides
        (0.0, 0.25, 0.25),  # not rounded to whole GiB
        (0.0, None, CPU_KV_GIB),
    ],
)
def test_the_cache_of_a_served_engine_is_what_the_section_engine_says(
    num_gpus: float, given: float | None, taken: float | None
) -> None:
    said = told(config(num_gpus, kv_cache_gb=given)).get(CACHE)
    assert said == (None if taken is None else str(int(taken * GIB)))


def test_blocks_and_what_a_user_adds_reach_a_served_engine() -> None:
    assert told(config(1.0, block_size=64))["--block-size"] == "64" and "--block-size" not in told(config(1.0))
    assert told(config(0.0))["--block-size"] == "32"


def test_the_environment_does_not_go_before_the_section_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would take the variable for the cache whatever its options say."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    script = f"import os, sys; raise ValueError(f\"{{os.environ.get('VLLM_CPU_KVCACHE_SPACE')}} {{sys.argv[sys.argv.index('{CACHE}') + 1]}}\")"
    with pytest.raises(UserError, match=f"did not start: None {GIB // 4};"):

        async def started() -> None:
            engine = ChatEngine(config(0.0, kv_cache_gb=0.25), "model", (sys.executable, "-c", script))
            try:
                await engine.ready()
            finally:
                await engine.close()

        asyncio.run(started())


def test_nor_before_that_of_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    with environment(child_environment(EngineConfig("model"), on_cpu=True)):
        assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ and os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "40"


def test_a_cache_that_holds_no_sequence_is_refused_however_it_is_served() -> None:
    shape = ModelShape("qwen3", 1 << 20, 1 << 16, 0)  # 256 KiB a token in float32
    for agent in ("policy", "react"):
        found = config(0.0, kv_cache_gb=0.25, max_model_len=2048)
        found.agent.name = agent
        with pytest.raises(UserError, match=r"engine.kv_cache_gb=0.25 cannot hold one sequence .* takes 0.5 GiB"):
            check_fits(found, shape)
