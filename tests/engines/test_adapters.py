"""Adapters alone, published into a real engine on CPU: it samples and scores by them, also requests that were in flight."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.learning.config import LearnerConfig, LoraConfig
from agents.learning.learner import Learner
from agents.learning.lora import peft_config
from agents.learning.model import load_model
from cluster.vllm.adapters import AdapterWriter, adapter_options, load_adapter, verify_adapter
from cluster.vllm.launch import child_environment, environment, prepare_calm
from cluster.vllm.options import EngineConfig
from tests.learning_tools import random_samples, save_tiny
from tests.reference_loop import reference_logprobs

CONFIG = LearnerConfig(lora=LoraConfig(rank=3, alpha=6.0, publish="adapter"), lr=2e-2, adam_eps=1e-5)


def _engine(folder: Path) -> Any:
    """As `cluster.vllm.launch.build` makes it, with room for the adapter."""
    config = EngineConfig(str(folder), max_model_len=128, max_num_seqs=4)
    prepare_calm(config)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    with environment(child_environment(config, True)):
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folder), dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True, block_size=32,
                kv_cache_memory_bytes=1 << 26, skip_tokenizer_init=True, generation_config="vllm", disable_log_stats=True,
                logprobs_mode="processed_logprobs", **adapter_options(CONFIG.lora.rank),
            )
        )  # fmt: skip


async def _scores(llm: Any, ids: list[int], adapter: Any, name: str) -> list[float]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    async for out in llm.generate({"prompt_token_ids": ids}, params, name, lora_request=adapter):
        final = out
    return [entry[t].logprob for t, entry in zip(ids[1:], final.prompt_logprobs[1:], strict=True)]


async def _long(llm: Any, adapter: Any) -> int:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=100, temperature=1.0, ignore_eos=True, detokenize=False)
    async for out in llm.generate({"prompt_token_ids": [1, 2, 3]}, params, "long", lora_request=adapter):
        final = out
    return len(final.outputs[0].token_ids)


async def test_an_engine_follows_published_adapters(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    learner = Learner(load_model(source, CONFIG), CONFIG)
    writer = AdapterWriter(tmp_path / "published", peft_config(CONFIG.lora, str(source)))
    sample = random_samples(1, seed=9, lengths=(30, 30))[0]
    ids = sample.token_ids.tolist()
    llm = _engine(source)
    try:
        found, wanted, running = [], [], None
        for step in range(3):
            manifest = writer.write(learner.adapters())
            verify_adapter(manifest)
            await llm.pause_generation(mode="keep", clear_cache=True)
            adapter = await load_adapter(llm, manifest)
            await llm.resume_generation()
            found.append(await _scores(llm, ids, adapter, f"s{step}"))
            merged = load_model(source, replace(CONFIG, lora=LoraConfig()))
            merged.hf.load_state_dict(dict(learner.weights()), strict=False)
            with torch.no_grad():
                wanted.append(reference_logprobs(merged.hf, sample)[0].tolist())
            if running is None:
                running = asyncio.create_task(_long(llm, adapter))  # lives through the next publish
                await asyncio.sleep(0)
            learner.step(random_samples(6, seed=step))
        assert await running == 100
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == pytest.approx([w / 1.0 for w in theirs], abs=2e-3)
        assert max(abs(a - b) for a, b in zip(found[0], found[2], strict=True)) > 0.05
    finally:
        llm.shutdown()
        writer.close()
