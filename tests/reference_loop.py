"""The plain way to train on a batch: one sequence at a time, full logits, textbook formulas. Tests compare the learner with it.

It shares no code with `agents/learning` besides the configuration, on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents.learning.config import LearnerConfig
from agents.types import Sample


def reference_logprobs(hf: nn.Module, sample: Sample) -> tuple[Tensor, Tensor]:
    """Log-prob of every token given those before it, and the entropy there, at its temperature: [T - 1] each."""
    ids = torch.tensor(sample.token_ids, dtype=torch.long)[None]
    logits = hf(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logits = logits / torch.tensor(sample.temperatures[1:])[:, None]
    table = torch.log_softmax(logits, dim=-1)
    return table.gather(-1, ids[0, 1:, None])[:, 0], -(table.exp() * table).sum(-1)


def reference_optimizer(hf: nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only."""
    parameters = [p for p in hf.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.adam_eps,
    )


def reference_step(
    hf: Any, samples: Sequence[Sample], config: LearnerConfig, optimizer: torch.optim.Optimizer | None = None
) -> tuple[float, float]:
    """One GRPO step: token-mean clipped loss (one step per batch, so pi_old is pi_theta), clip the norm, AdamW.

    `hf` is a Hugging Face causal model. Returns loss and gradient norm before clipping. Without an optimiser the
    gradients are left in place and no weight moves.
    """
    hf.zero_grad()
    total = sum(int(s.mask.sum()) for s in samples)
    loss = torch.zeros(())
    for s in samples:
        logprobs, entropies = reference_logprobs(hf, s)
        trained = torch.tensor(s.mask[1:]) == 1
        logprobs, entropies = logprobs[trained], entropies[trained]
        advantages = torch.tensor(s.advantages[1:])[trained]
        rollout = torch.tensor(s.logprobs[1:])[trained]
        old = logprobs.detach()
        ratio = torch.exp(old - rollout)
        settings = config.loss
        if settings.mismatch == "tis":
            weight = torch.minimum(ratio, torch.tensor(settings.tis_cap))
        elif settings.mismatch == "icepop":
            weight = ratio * ((ratio >= settings.icepop_low) & (ratio <= settings.icepop_high))
        else:
            weight = torch.ones_like(ratio)
        rho = torch.exp(logprobs - old)
        surrogate = torch.minimum(
            rho * advantages, torch.clamp(rho, 1 - settings.clip_low, 1 + settings.clip_high) * advantages
        )
        per_token = -weight * surrogate - settings.entropy_coef * entropies
        if settings.kl_coef > 0:
            gap = torch.tensor(s.aux["ref_logprobs"][1:])[trained] - logprobs
            per_token = per_token + settings.kl_coef * (torch.exp(gap) - gap - 1)
        part = s.weight * per_token.sum() / total
        part.backward()
        loss = loss + part.detach()
    limit = config.grad_clip if config.grad_clip > 0 else float("inf")
    norm = nn.utils.clip_grad_norm_([p for p in hf.parameters() if p.requires_grad], limit)
    if optimizer is not None:
        optimizer.step()
    return float(loss), float(norm)
