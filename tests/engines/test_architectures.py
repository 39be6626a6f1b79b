"""Each architecture that a recipe names, as a tiny random model: learner and engine hold the same weights.

Two optimiser steps on what a real engine samples, with a publish between them. A new recipe whose model has another architecture is taken
up by itself. One that vLLM cannot run on CPU is skipped with its reason. (Whole runs: `test_replay.py`, `test_real_text.py`.)
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.learning.config import LearnerConfig
from agents.learning.learner import Learner
from agents.learning.model import load_model, named_weights_for_publish
from agents.learning.weights import Stacked
from agents.types import Sample
from cluster.config import ROOT, load_config
from cluster.model import resolve
from cluster.schema import RunConfig
from cluster.vllm.engine import EngineConfig, Generation, PolicyEngine
from cluster.vllm.preflight import EngineError
from cluster.vllm.segment import ShmWriter
from cluster.vllm.transfer import ShmTransport, publish
from tests.runs import run_configs

POLICY = ROOT / "envs" / "world" / "policy"
TINY = {
    "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 2048,
    "vocab_size": 896, "initializer_range": 0.08,
}  # fmt: skip
"""Sizes that replace a recipe's, where its configuration has them. The kernel for experts wants multiples of 32, and so do heads,
which of some architectures are the width over their number."""


def architectures() -> dict[str, Path]:
    """By architecture: the configuration of one recipe's model."""
    found: dict[str, Path] = {}
    for name in run_configs():
        model = load_config(name, [], RunConfig).model
        for path in (resolve(model.path) / "config.json", resolve(model.shape)):
            if path.is_file():
                found.setdefault(json.loads(path.read_text())["model_type"], path)
    return found


ARCHITECTURES = architectures()


def tiny(architecture: str, folder: Path) -> Path:
    """A folder to start a random model of that architecture from: its configuration, made small, and a tokenizer."""
    config: dict[str, Any] = json.loads(ARCHITECTURES[architecture].read_text())
    shutil.copytree(POLICY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    small = {key: value for key, value in TINY.items() if key in config or key == "initializer_range"}
    own = {key: value for key, value in config.items() if key not in ("layer_types", "architectures")}
    (folder / "config.json").write_text(json.dumps({**own, **small}))
    return folder


NO_KERNEL = r"MoE backend.* supports? the deployment configuration"
"""vLLM's words where no kernel of this processor fits a model's experts."""


def random_model(architecture: str, folder: Path) -> Path:
    """A tiny checkpoint of that architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny(architecture, folder))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def a_sample(prompt: list[int], sampled: Generation, number: int) -> Sample:
    """A prompt and what an engine sampled after it; every other one was good."""
    length, count = len(prompt), len(sampled.token_ids)
    mask = np.repeat(np.array([0, 1], np.int8), (length, count))
    return Sample(
        token_ids=np.array([*prompt, *sampled.token_ids]), mask=mask, logprobs=np.array([*[0.0] * length, *sampled.logprobs]),
        advantages=np.where(mask, (-1.0) ** number, 0.0), versions=np.where(mask, 0, -1), temperatures=np.ones(length + count), group_id="g",
        rollout_id=f"r{number}", reward=0.0,
    )  # fmt: skip


# Qwen3 in its dense form is the policy of the whole runs.
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"qwen3"}))
async def test_an_engine_samples_by_the_weights_that_the_learner_steps(architecture: str, tmp_path: Path) -> None:
    folder, prompts = random_model(architecture, tmp_path / "model"), [[7, 11, 13 + i] * 4 for i in range(4)]
    learner = Learner(load_model(folder), LearnerConfig(lr=0.01))
    engine, writer = PolicyEngine(EngineConfig(str(folder), max_model_len=256, kv_cache_gb=0.1)), ShmWriter(tmp_path)
    try:
        await engine.start()
    except EngineError as error:
        assert re.search(NO_KERNEL, str(error)), error
        pytest.skip(f"no CPU kernel for {architecture}: {error}")
    try:
        for step in (1, 2):
            sampled = [
                await engine.generate(p, request_id=f"{step}-{i}", max_tokens=24, temperature=1.0)
                for i, p in enumerate(prompts)
            ]
            told = learner.step([a_sample(p, g, i) for i, (p, g) in enumerate(zip(prompts, sampled, strict=True))])
            print({key: told[key] for key in ("grad_norm", "mismatch/kl_k3", "ratio/max")})
            assert told["grad_norm"] > 0
            assert abs(told["mismatch/kl_k3"]) < 1e-6 and abs(told["ratio/max"] - 1) < 1e-2
            manifest = writer.write(named_weights_for_publish(learner.model))
            assert (await publish({"a": engine}, ShmTransport(manifest), f"v{step}")).ok
    finally:
        await engine.shutdown()
        writer.close()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_published_names_are_those_of_the_checkpoint(architecture: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = random_model(architecture, tmp_path / "model")
    saved, policy = load_file(folder / "model.safetensors"), load_model(folder)
    published = {name: weight.contiguous() for name, weight in named_weights_for_publish(policy)}
    assert published.keys() == saved.keys() and all(torch.equal(published[name], saved[name]) for name in saved)
    tied = {"lm_head.weight"} if policy.hf.config.tie_word_embeddings else set()
    held = {name: weight for name, weight in policy.hf.named_parameters() if name not in tied}
    again = Stacked(published)
    assert again.keys() == held.keys() and all(torch.equal(again[name], held[name]) for name in held)
