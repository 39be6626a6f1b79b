"""A tiny Qwen3 and samples for it, shared by the learner's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.learning.config import CriticConfig, LearnerConfig
from agents.learning.critic import as_critic
from agents.learning.learner import Learner
from agents.learning.model import PolicyModel
from agents.types import Sample

VOCAB = 61


def tiny_qwen3(seed: int = 0, tied: bool = True, attention: str = "sdpa", head_dim: int = 16) -> Any:
    """A Hugging Face Qwen3 of about 20,000 weights, float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, tie_word_embeddings=tied, max_position_embeddings=256,
        attn_implementation=attention,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0 if p.ndim > 1 else 1.0)  # far from uniform, so that mistakes show
    return model


def save_tiny(folder: Path, seed: int = 0, head_dim: int = 16) -> Path:
    """`head_dim`: vLLM takes multiples of 32 on CPU."""
    tiny_qwen3(seed, head_dim=head_dim).save_pretrained(str(folder))
    return folder


def random_samples(
    count: int, seed: int = 0, lengths: Sequence[int] = (4, 40), temperature: float = 1.0, group: int = 4, **aux: float
) -> list[Sample]:
    """Samples with several trained stretches, observations between and behind them, and unequal lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        T = int(rng.integers(lengths[0], lengths[1] + 1))
        mask = (rng.random(T) < 0.5).astype(np.int8)
        mask[0], mask[1] = 0, 1
        if i % 3 == 0:
            mask[-1] = 0  # ends with an observation
        out.append(
            Sample(
                token_ids=rng.integers(0, VOCAB, T),
                mask=mask,
                logprobs=-rng.uniform(2.0, 6.0, T) * mask,
                advantages=rng.normal() * mask,
                versions=np.where(mask, 0, -1),
                temperatures=np.where(mask, temperature, 1.0),
                group_id=f"g{i // group}",
                rollout_id=f"r{i}",
                reward=0.0,
                aux={name: -rng.uniform(1.0, 4.0, T) * mask * scale for name, scale in aux.items()},
            )
        )
    return out


def step_samples(
    episodes: int, seed: int = 0, steps: int = 3, k: int = 5, prompt: int = 120, candidate: int = 40,
    observation: int = 120, vocab: int = VOCAB,
) -> list[Sample]:  # fmt: skip
    """What truncated step sampling leaves: at each step k candidates of one prefix, of which one is kept and observed.

    Lengths are drawn within a quarter of those given. Only a candidate's own tokens are trained.
    """
    rng = np.random.default_rng(seed)

    def draw(length: int) -> np.ndarray:
        return rng.integers(0, vocab, max(1, round(length * rng.uniform(0.75, 1.25))))

    out = []
    for e in range(episodes):
        prefix = draw(prompt)
        for t in range(steps):
            candidates = [draw(candidate) for _ in range(k)]
            advantages = rng.normal(size=k)
            for j, own in enumerate(candidates):
                ids = np.concatenate([prefix, own])
                mask = (np.arange(len(ids)) >= len(prefix)).astype(np.int8)
                out.append(
                    Sample(
                        token_ids=ids, mask=mask, logprobs=-rng.uniform(2.0, 6.0, len(ids)) * mask,
                        advantages=advantages[j] * mask, versions=np.where(mask, t, -1),
                        temperatures=np.where(mask, 0.9, 1.0), group_id=f"e{e}#{t}", rollout_id=f"e{e}#{t}/{j}", reward=0.0,
                        prefix_id=f"e{e}", prefix_len=len(prefix),
                        aux={"ref_logprobs": -rng.uniform(1.0, 4.0, len(ids)) * mask},
                    )
                )  # fmt: skip
            prefix = np.concatenate([prefix, candidates[rng.integers(k)], draw(observation)])
    return out


def rewarded(count: int, seed: int = 0, **aux: float) -> list[Sample]:
    """Random samples with a reward on every trained token, and no advantages."""
    rng = np.random.default_rng(seed + 100)
    plain = random_samples(count, seed=seed, **aux)
    return [
        replace(s, advantages=0 * s.advantages, aux={**s.aux, "rewards": rng.normal(size=s.num_tokens) * s.mask})
        for s in plain
    ]


def ppo_learner(
    kind: str, config: LearnerConfig, wrap: Callable[[PolicyModel], PolicyModel] = lambda model: model
) -> Learner:
    """A learner with a critic of that kind whose head is not 0, so that mistakes show. `wrap` may shard its models."""
    config = replace(config, critic=replace(config.critic, kind=kind))
    policy, own = PolicyModel(tiny_qwen3(), config), None
    if kind == "model":
        own = as_critic(PolicyModel(tiny_qwen3(7), replace(config, critic=CriticConfig(kind="head"))))
    head = (own or policy).value_head
    torch.manual_seed(5)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.2)
        head.bias.fill_(0.1)
    return Learner(wrap(policy), config, critic=None if own is None else wrap(own))
