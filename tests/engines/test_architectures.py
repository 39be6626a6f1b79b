"""Each architecture that a recipe names, as a tiny random model: two optimiser steps by the real pipeline.

What is asserted is that learner and samplers hold the same weights: after a publish their log-probs agree. A new recipe
whose model has another architecture is taken up by itself. One that vLLM cannot run on CPU is skipped with its reason.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.learning.model import load_model, named_weights_for_publish
from agents.learning.weights import stack_experts
from cluster.config import ROOT, load_config
from cluster.model import resolve
from cluster.schema import RunConfig
from tests.runs import SMALL, gumshoe, rows, run_configs, wait_for

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


def missing_kernel(output: str) -> str:
    """Why vLLM cannot run the model on this processor, or nothing."""
    cause = re.search(r"did not start: (.*)", output)
    known = r"MoE backend.* supports? the deployment configuration"  # vLLM's, where no kernel fits a model's experts
    return cause[1].strip() if cause and re.search(known, cause[1]) else ""


PPO = {
    "qwen2": (
        "advantage.name=gae", "learner.critic.kind=model", "learner.loss.kl_coef=0.001", "learner.loss.kl_in=reward",
    ),
}  # fmt: skip
"""By architecture: what else its steps are taken with. The recipes of Qwen2.5 that come first are PPO."""


# A random Qwen3 takes its two steps in test_real_text.py.
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"qwen3"}))
def test_two_steps_by_the_real_pipeline(architecture: str, tmp_path: Path) -> None:
    log, model = tmp_path / "log", tiny(architecture, tmp_path / "model")
    overrides = (
        "name=tiny", f"storage_path={tmp_path}", f"model.path={model}", "model.init=random", *SMALL, "train.steps=2", "train.eval_tasks=1",
        "buffer.max_staleness=0", "protocol.tools.bare_answer=true", "sampling.on_length=final", "sampling.max_turn_tokens=24",
        "sampling.max_turns=2", "engine.kv_cache_gb=0.1",
        # Random models are always wrong: what moves the weights, and by enough to be seen, is the entropy bonus.
        "learner.lr=0.01", "learner.loss.entropy_coef=1.0", *PPO.get(architecture, ()),
    )  # fmt: skip
    with gumshoe("train", "demo", *overrides, log=log) as process:
        wait_for(
            lambda: process.poll() is not None or len(rows(tmp_path / "tiny", "publish")) == 3,
            process,
            log,
            timeout_s=240,
        )
        code = process.poll()
    output = log.read_text()
    reason = missing_kernel(output)
    if code and reason:
        print(f"{architecture} is not run: {reason}")
        pytest.skip(f"no CPU kernel for {architecture}: {reason}")
    assert not code, output[-3000:]
    steps = rows(tmp_path / "tiny", "train")
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        print({key: row.get(key) for key in ("grad_norm", "mismatch/kl_k3", "ratio/max", "staleness/max")})
    assert all(row["grad_norm"] > 0 and row["staleness/max"] == 0 for row in steps)
    if architecture in PPO:
        assert steps[0]["gae/return_mean"] == 0, "nothing was right, and nothing had moved away from the reference"
        assert steps[1]["gae/kl_charged"] != 0 and steps[1]["value/loss"] > 0 and steps[1]["value/grad_norm"] > 0
    # The second batch was sampled with published weights.
    assert abs(steps[1]["mismatch/kl_k3"]) < 1e-6 and abs(steps[1]["ratio/max"] - 1) < 1e-2


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_published_names_are_those_of_the_checkpoint(architecture: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny(architecture, tmp_path / "model")
    hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    hf.save_pretrained(folder)
    saved, policy = load_file(folder / "model.safetensors"), load_model(folder)
    published = {name: weight.contiguous() for name, weight in named_weights_for_publish(policy)}
    assert published.keys() == saved.keys() and all(torch.equal(published[name], saved[name]) for name in saved)
    tied = {"lm_head.weight"} if policy.hf.config.tie_word_embeddings else set()
    held = {name: weight for name, weight in policy.hf.named_parameters() if name not in tied}
    again = stack_experts(published)
    assert again.keys() == held.keys() and all(torch.equal(again[name], held[name]) for name in held)
