"""A tiny Qwen3 and samples for it, shared by the learner's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.types import Sample

VOCAB = 61


def tiny_qwen3(seed: int = 0, tied: bool = True, attention: str = "sdpa") -> Any:
    """A Hugging Face Qwen3 of about 20,000 weights, float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied, max_position_embeddings=256,
        attn_implementation=attention,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0 if p.ndim > 1 else 1.0)  # far from uniform, so that mistakes show
    return model


def save_tiny(folder: Path, seed: int = 0) -> Path:
    tiny_qwen3(seed).save_pretrained(str(folder))
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
