"""What the checks of a learner work on: random models of published shapes, and samples of many lengths. Torch and transformers alone.

Invariants: weights and samples depend on a seed and nothing else, so two models of one shape are equal; samples look like episodes:
turns that are trained between observations that are not, lengths spread about a median, none longer than asked.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from agents.types import Sample  # noqa: E402
from cluster.gpu_check import GIB, Bench  # noqa: E402

SHAPES = {"0.6b": "qwen3_0_6b", "1.7b": "qwen3_1_7b", "4b": "qwen3_4b"}
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
"""Of a rehearsal. Heads are the narrowest that vLLM's attention on a CPU takes."""


@dataclass(frozen=True)
class Size:
    """How much work a check does."""

    num_tokens: int
    """Tokens of a batch."""
    median: int
    """Median length of a sample, in tokens."""
    longest: int


LARGE, SMALL, TINIEST = Size(65_536, 1500, 4096), Size(16_384, 700, 2048), Size(512, 64, 160)


def shape(bench: Bench, name: str) -> dict[str, Any]:
    """A published model's configuration; a tiny one of the same kind in a rehearsal."""
    found = json.loads((ROOT / "configs" / "shapes" / f"{SHAPES[name]}.json").read_text(encoding="utf-8"))
    return {**found, **TINY} if bench.tiny else dict(found)


def random_model(bench: Bench, config: dict[str, Any], attention: str = "sdpa") -> Any:
    """A causal language model with random float32 weights, made on the device itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from agents.learning.attention import register

    register()  # varlen, which transformers does not know of itself
    torch.manual_seed(0)
    with torch.device(bench.device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation=attention
        )


def samples(size: Size, vocab: int, seed: int = 0) -> list[Sample]:
    """Samples that hold `size.num_tokens` together. Log-probs of the sampler are those of a uniform policy."""
    rng = np.random.default_rng(seed)
    made: list[Sample] = []
    left = size.num_tokens
    while left > 1:
        length = int(np.clip(size.median * np.exp(0.6 * rng.standard_normal()), 16, size.longest))
        length = min(max(length, 2), left)
        mask = np.zeros(length, dtype=np.int8)
        at = max(1, length // 8)  # the prompt
        while at < length:
            turn, observation = rng.integers(max(2, length // 20), max(4, length // 8), 2)
            mask[at : at + turn] = 1
            at += int(turn + observation)
        mask[-1] = 1  # so that the whole sample is computed
        made.append(
            Sample(
                token_ids=rng.integers(0, vocab, length), mask=mask, logprobs=-np.log(vocab) * mask,
                advantages=rng.normal() * mask, versions=np.where(mask, 0, -1), temperatures=np.ones(length),
                group_id=f"g{len(made) // 8}", rollout_id=f"r{len(made)}", reward=0.0,
            )
        )  # fmt: skip
        left -= length
    return made


def sampled_by(given: Sequence[Sample], logprobs: Sequence[np.ndarray]) -> list[Sample]:
    """The same samples with these log-probs as the sampler's."""
    return [replace(s, logprobs=found * s.mask) for s, found in zip(given, logprobs, strict=True)]


def trained(given: Sequence[Sample], values: Sequence[np.ndarray]) -> np.ndarray:
    """Values at the trained tokens, end to end."""
    return np.concatenate([v[s.mask == 1] for s, v in zip(given, values, strict=True)])


def synchronize(bench: Bench) -> None:
    """Waits for the device."""
    if bench.device == "cuda":
        torch.cuda.synchronize()


def matmul_tflops(bench: Bench) -> float:
    """10^12 operations per second of one large bfloat16 product of random matrices: what the card's peak comes to in practice."""
    size, rounds = (64, 1) if bench.tiny else (8192, 20)
    a, b = (torch.randn(size, size, device=bench.device).to(torch.bfloat16) for _ in range(2))
    a @ b
    synchronize(bench)
    began = time.perf_counter()
    for _ in range(rounds):
        a @ b
    synchronize(bench)
    return round(2 * size**3 * rounds / (time.perf_counter() - began) / 1e12, 5)


def free(bench: Bench) -> None:
    """Gives back what is no longer referred to, and begins a new peak."""
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(bench: Bench) -> float:
    """Most memory that tensors took since `free`; on CPU the most this process ever held."""
    if bench.device == "cuda":
        return round(torch.cuda.max_memory_allocated() / GIB, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)


@contextlib.contextmanager
def alone(bench: Bench) -> Iterator[None]:
    """A process group of this process alone."""
    backend = "nccl" if bench.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gradient_cosine(a: Any, b: Any) -> float:
    """Of the whole gradients of two learners of one model."""
    products = [0.0, 0.0, 0.0]
    for name, p in a.trained.named.items():
        x, y = p.grad.flatten().double(), b.trained.named[name].grad.flatten().double()
        for i, value in enumerate((x @ y, x @ x, y @ y)):
            products[i] += float(value)
    return products[0] / (products[1] * products[2]) ** 0.5
