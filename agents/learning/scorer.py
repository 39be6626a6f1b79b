"""Forward-only passes that give samples named per-token arrays: reference log-probs for the KL, proximal log-probs, values.

Invariant: a scorer changes no weight and no random state; the arrays are 0 outside the loss mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from agents.learning import packing
from agents.learning.context import Context
from agents.learning.model import PolicyModel
from agents.learning.shard import is_sharded, max_over_ranks, settle
from agents.types import Sample


def score_logprobs(
    model: PolicyModel,
    samples: Sequence[Sample],
    max_tokens: int = 2048,
    *,
    layout: str = "auto",
    group: dist.ProcessGroup | None = None,
    context: Context | None = None,
) -> list[np.ndarray]:
    """log p of every trained token at its sampling temperature: per sample float32 [T], 0 elsewhere.

    When the model is sharded all ranks call it together, each with its own samples; ranks of one `context` with the same.
    """
    return _score(model, samples, max_tokens, layout, group, context, logprobs=True)


def score_values(
    model: PolicyModel,
    samples: Sequence[Sample],
    max_tokens: int = 2048,
    *,
    layout: str = "auto",
    group: dist.ProcessGroup | None = None,
    context: Context | None = None,
) -> list[np.ndarray]:
    """The value of the state before every trained token, by a model with a value head; otherwise as `score_logprobs`."""
    return _score(model, samples, max_tokens, layout, group, context, logprobs=False)


def _score(
    model: PolicyModel,
    samples: Sequence[Sample],
    max_tokens: int,
    layout: str,
    group: dist.ProcessGroup | None,
    context: Context | None,
    *,
    logprobs: bool,
) -> list[np.ndarray]:
    out = [np.zeros(s.num_tokens, dtype=np.float32) for s in samples]
    batches = packing.pack(samples, max_tokens, layout=model.layout(layout), attention_cost=model.attention_cost)
    if is_sharded(model):
        most = int(max_over_ranks([len(batches)], model.device, group)[0])
        batches += [packing.dummy()] * (most - len(batches))
    scored: list[tuple[packing.MicroBatch, torch.Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            batch = batch if context is None else context.part(batch)
            found = model(batch.to(model.device), logprobs=logprobs, values=not logprobs, context=context)
            scored.append((batch, found[0]))
    for batch, values in scored:  # only now: reading a value waits for the device
        place = (batch.position_ids.flatten()[batch.source] + 1).numpy()  # the token stands behind what predicts it
        index, values_N = batch.sample_index.numpy(), values.cpu().numpy()
        for i in batch.samples:
            out[i][place[index == i]] = values_N[index == i]
    if batches:
        settle(model)
    return out if context is None else context.join(out, model.device)


def with_aux(sample: Sample, **arrays: np.ndarray) -> Sample:
    """The sample with more named per-token arrays."""
    return replace(sample, aux={**sample.aux, **arrays})


class ReferenceScorer:
    """Gives samples aux `ref_logprobs` under a frozen policy, for the KL to it."""

    def __init__(self, model: PolicyModel, max_tokens: int = 2048, context: Context | None = None) -> None:
        self.model = model.requires_grad_(False)
        self.max_tokens = max_tokens
        self.context = context

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with `ref_logprobs`; those that have it already are kept as they are. All ranks of a sharded model call it."""
        todo = [s for s in samples if "ref_logprobs" not in s.aux]
        found = score_logprobs(self.model, todo, self.max_tokens, context=self.context)
        scored = dict(zip(map(id, todo), found, strict=True))
        return [with_aux(s, ref_logprobs=scored[id(s)]) if id(s) in scored else s for s in samples]
