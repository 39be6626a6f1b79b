"""vLLM against the learner on a GPU: `python benchmarks/gpu_sampler.py [--out FILE]`. Needs vLLM besides torch and transformers.

A random Qwen3 is written to a folder, the engine that serves runs samples from it, and the learner computes the log-probs of the same tokens
anew: in the precision that training has, and in float32. Random weights give nearly uniform log-probs, so the model's are made larger first.
The speed is that of many requests at once, with and without compiled graphs. `--cpu` rehearses it with a tiny model and vLLM's CPU engine.

Invariants: one engine at a time on the card, and none while the learner is there; every request is one of token ids.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.gpu_check import Bench, Failed, Figures, Function, program  # noqa: E402

SHARPER = 3.0
"""Factor of the random output head."""


def vllm_logprobs(bench: Bench) -> Figures:
    """Parity of log-probs on sampled tokens, and tokens per second, eager and compiled."""
    import numpy as np

    from benchmarks.gpu_work import shape

    config = shape(bench, "0.6b")
    requests, prompt, answer = (8, 24, 24) if bench.tiny else (128, 512, 256)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config["vocab_size"], (requests, prompt)).tolist()
    with tempfile.TemporaryDirectory(prefix="gumshoe-sampler-") as folder:
        _write(bench, config, folder)
        figures: Figures = {"requests": requests, "prompt_tokens": prompt, "sampled_tokens": answer}
        sampled: list[Any] = []
        for eager in (True, False)[: 1 if bench.tiny else 2]:  # a CPU compiles for minutes
            made, seconds = asyncio.run(_generate(folder, prompts, answer, bench, eager=eager))
            sampled = sampled or made
            figures[f"{'eager' if eager else 'compiled'}_tokens_per_s"] = round(requests * answer / seconds, 1)
            bench.note(figures)
        for dtype in ("float32", "bfloat16")[: 1 if bench.tiny else 2]:
            apart = abs(_again(bench, folder, prompts, sampled, dtype) - np.concatenate([g.logprobs for g in sampled]))
            figures |= {f"{dtype}_mean": float(apart.mean()), f"{dtype}_max": float(apart.max())}
            bench.note(figures)
    most = 2e-4 if bench.tiny else 0.03
    worst = max(v for k, v in figures.items() if k.endswith("_mean"))
    if not worst <= most:
        raise Failed(f"log-probs of sampler and learner are {worst:.4f} apart on average, more than {most}", figures)
    return figures


async def _generate(
    folder: str, prompts: list[list[int]], answer: int, bench: Bench, *, eager: bool
) -> tuple[list[Any], float]:
    """What the engine samples, after a warm-up, and the seconds it took."""
    from cluster.vllm.engine import PolicyEngine
    from cluster.vllm.options import EngineConfig

    longest = len(prompts[0]) + answer + 8
    engine = PolicyEngine(
        EngineConfig(
            model=folder, max_model_len=longest, max_num_seqs=len(prompts), enforce_eager=eager,
            kv_cache_gb=0.05 if bench.tiny else None, gpu_memory_utilization=0.6,
        )
    )  # fmt: skip
    await engine.start()
    try:

        async def all_of(label: str) -> list[Any]:
            return await asyncio.gather(
                *(
                    engine.generate(p, request_id=f"{label}{i}", max_tokens=answer, seed=i)
                    for i, p in enumerate(prompts)
                )
            )

        await engine.generate(prompts[0][::-1], request_id="warm", max_tokens=answer)
        began = time.perf_counter()
        made = await all_of("r")
        return made, time.perf_counter() - began
    finally:
        await engine.shutdown()


def _write(bench: Bench, config: dict[str, Any], folder: str) -> None:
    """A checkpoint with random weights, far from uniform."""
    import torch

    from benchmarks.gpu_work import free, random_model

    model = random_model(bench, {**config, "tie_word_embeddings": False})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPER)
    model.to(torch.float32 if bench.tiny else torch.bfloat16).save_pretrained(folder)
    del model
    free(bench)


def _again(bench: Bench, folder: str, prompts: list[list[int]], sampled: list[Any], dtype: str) -> Any:
    """The learner's log-probs of what was sampled, end to end."""
    import numpy as np

    from agents.learning.config import LearnerConfig
    from agents.learning.learner import Learner
    from agents.learning.model import load_model
    from agents.types import Sample
    from benchmarks.gpu_work import free

    settings = LearnerConfig(dtype=dtype, max_tokens_per_microbatch=8192, logit_elements=1 << 28)
    learner = Learner(load_model(folder, settings, bench.device), settings)
    given = []
    for i, (prompt, made) in enumerate(zip(prompts, sampled, strict=True)):
        mask = np.array([0] * len(prompt) + [1] * len(made.token_ids), dtype=np.int8)
        given.append(
            Sample(
                token_ids=np.array([*prompt, *made.token_ids]), mask=mask, logprobs=0.0 * mask, advantages=1.0 * mask,
                versions=np.where(mask, 0, -1), temperatures=np.ones(len(mask)), group_id="g", rollout_id=f"r{i}", reward=0.0,
            )
        )  # fmt: skip
    found = [values[s.mask == 1] for values, s in zip(learner.score(given), given, strict=True)]
    del learner
    free(bench)
    return np.concatenate(found)


FUNCTIONS: dict[str, Function] = {"vllm_logprobs": vllm_logprobs}

if __name__ == "__main__":
    sys.exit(program("gpu_sampler", FUNCTIONS, sys.argv[1:]))
