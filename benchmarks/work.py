"""What the benchmarks of speed work on: token ids with the demo's lengths, the same every time.

The source is what the tiny policy was taught in warm-up, in worlds like the demo's: expert work mixed with its bad habits. So prompts,
turns and lengths are those that training begins with, and no engine is needed to make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

POLICY = str(Path(__file__).resolve().parent.parent / "envs" / "world" / "policy")


@dataclass(frozen=True)
class Request:
    """One policy turn: what the policy sees, and how many tokens it then says."""

    prompt_ids: tuple[int, ...]
    num_tokens: int


def traces(count: int) -> list[Any]:
    """What the policy was taught to do in the demo's kind of world: `agents.learning.warmup.Trace` each."""
    from agents.learning.warmup import encode_trace
    from agents.protocols.tools import Tools, ToolsConfig
    from cluster.speech import load_tokenizer
    from envs.world.traces import MixConfig, ScriptConfig, scripts
    from envs.world.world import WorldConfig

    tokenizer = load_tokenizer(POLICY)
    speech = Tools(tokenizer, ToolsConfig(format_request="", show_tools=False))
    # The mix that warm-up ended with: the habits, and so the lengths, that the policy brings into training.
    habits = MixConfig(early=0.25, see_also=0.1, seen=0.08, wrong_fact=0.08, uncited=0.1, malformed=0.03)
    world = WorldConfig(num_entities=60, num_tasks=64, hops={2: 1.0, 3: 1.0})
    source = scripts(ScriptConfig(world=world, mix=habits), seed=7)

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    return [encode_trace(speech, encode, s.task, s.steps, s.kind) for s in islice(source, count)]


def turns(token_ids: Sequence[int], mask: Sequence[int]) -> list[Request]:
    """The policy turns of a sequence: every run of 1s in `mask` is one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, dtype=int), [0]])))
    ids = [int(i) for i in token_ids]
    return [Request(tuple(ids[:start]), int(end - start)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def episodes(count: int, attempts: int = 8) -> list[list[Request]]:
    """Turn by turn work: `attempts` episodes of the same trace after each other, as the members of a group are."""
    made = traces(-(-count // attempts))
    return [turns(t.token_ids, t.mask) for t in made for _ in range(attempts)][:count]


def turn_by_turn(work: Sequence[Sequence[Request]], window: int) -> list[Request]:
    """All turns in the order in which `window` episodes at a time would ask them, so that prefixes are cached alike."""
    found: list[Request] = []
    for start in range(0, len(work), window):
        part = work[start : start + window]
        found += [e[n] for n in range(max(map(len, part))) for e in part if n < len(e)]
    return found


def long_turns(count: int, num_tokens: int) -> list[list[Request]]:
    """One long turn per episode, the shape of a policy that thinks: the same prompts, `num_tokens` tokens each."""
    return [[Request(e[0].prompt_ids, num_tokens)] for e in episodes(count)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest, rounded for people."""
    return {"median": round(float(np.median(values)), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


def learner_samples(count: int = 64) -> list[Any]:
    """Samples with the demo's lengths; every one has an advantage, so none can be skipped.

    The behaviour policy's log-probs are the checkpoint's own, so that ratios are what they are in training.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from agents.types import Sample

    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    samples = []
    for i, trace in enumerate(traces(count)):
        ids = torch.tensor(trace.token_ids, dtype=torch.long)
        with torch.no_grad():
            table = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
        logprobs = np.concatenate([[0.0], table.gather(1, ids[1:, None])[:, 0].numpy()])
        mask = trace.mask.astype(np.int8)
        samples.append(
            Sample(
                trace.token_ids, mask, logprobs * mask, mask * rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 1.5),
                np.where(mask, 0, -1), np.ones(len(ids)), f"g{i // 8}", f"r{i}", 0.0,
            )
        )  # fmt: skip
    return samples
