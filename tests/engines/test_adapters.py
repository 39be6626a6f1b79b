"""Adapters alone, published into a real engine on CPU: it samples and scores by them, also requests that were in flight."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.learning.config import LearnerConfig, LoraConfig
from agents.learning.learner import Learner
from agents.learning.lora import peft_config
from agents.learning.model import load_model
from cluster.vllm.adapters import SETTINGS, AdapterWriter
from cluster.vllm.engine import EngineConfig, PolicyEngine
from cluster.vllm.segment import ShmWriter
from cluster.vllm.transfer import Phase, ShmTransport, publish
from tests.learning_tools import random_samples, save_tiny
from tests.reference_loop import reference_logprobs

CONFIG = LearnerConfig(lora=LoraConfig(rank=3, alpha=6.0, publish="adapter"), lr=2e-2, adam_eps=1e-5)


async def test_an_engine_follows_published_adapters(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", head_dim=32)
    learner = Learner(load_model(source, CONFIG), CONFIG)
    writer = AdapterWriter(tmp_path / "published", peft_config(CONFIG.lora, str(source)))
    sample = random_samples(1, seed=9, lengths=(30, 30))[0]
    ids = sample.token_ids.tolist()
    engine = PolicyEngine(
        EngineConfig(
            str(source),
            max_model_len=128,
            max_num_seqs=4,
            kv_cache_gb=0.0625,
            lora_rank=CONFIG.lora.rank,
            lora_targets=tuple(CONFIG.lora.targets),
            version="0",
        )
    )
    await engine.start()
    try:
        assert (await engine.checksums()).received is None, "still the checkpoint"
        found, wanted, running = [], [], None
        for step in range(1, 4):
            manifest = writer.write(learner.adapters(torch.float32))
            report = await publish({"one": engine}, ShmTransport(manifest), f"v{step}")
            assert report.ok, report.results["one"].reason
            sums = await engine.checksums()
            assert (sums.version, sums.received) == (f"v{step}", manifest.checksum)
            found.append(await engine.score(ids, request_id=f"s{step}"))
            merged = load_model(source, replace(CONFIG, lora=LoraConfig()))
            merged.hf.load_state_dict(dict(learner.weights()), strict=False)
            with torch.no_grad():
                wanted.append(reference_logprobs(merged.hf, sample)[0].tolist())
            if running is None:  # lives through the next publish
                running = asyncio.create_task(engine.generate([1, 2, 3], request_id="long", max_tokens=100))
                while not (await engine.stats()).in_flight:
                    await asyncio.sleep(0)
            learner.step(random_samples(6, seed=step))
        long = await running
        assert len(long.token_ids) == 100 and "v1" in {label for _, _, label in long.version_spans}
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-3)
        assert max(abs(a - b) for a, b in zip(found[0], found[2], strict=True)) > 0.05

        settings = Path(writer.write(learner.adapters(torch.float32)).path) / SETTINGS
        damaged = replace(manifest, path=str(settings.parent))
        refused = (await publish({"one": engine}, ShmTransport(damaged), "v9")).results["one"]
        assert (refused.serving, refused.failed_phase) == ("old", Phase.STAGE)
        whole = ShmWriter(tmp_path / "whole").write(learner.weights())
        refused = (await publish({"one": engine}, ShmTransport(whole), "v9")).results["one"]
        assert refused.serving == "old" and "takes adapter" in refused.reason
        assert await engine.score(ids, request_id="again") == pytest.approx(found[2], abs=1e-4)
    finally:
        await engine.shutdown()
        writer.close()
