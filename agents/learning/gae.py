"""Advantages from rewards per token and a critic's values: generalised advantage estimation (Schulman et al. 2015, 1506.02438).

Over the trained tokens of a sample, k = 1 .. K in order, with V(K+1) = 0:

    delta_k = r_k + gamma V(k+1) - V(k);    A_k = delta_k + gamma lam A(k+1);    return_k = A_k + V_k

Invariants:
- One step is one token of the policy. Tokens outside the loss (prompt, observations, notes) are no steps: they are neither discounted nor
  bootstrapped through, and V(k+1) of a turn's last token is the value after the observation, before the next turn's first token.
- Rewards stand on trained tokens only. With gamma = lam = 1 an advantage is the rewards still to come minus the value.
- Whitening is over the trained tokens of all ranks, so it does not depend on how a batch is split.

Source of the convention: Search-R1 (2503.09516) masks retrieved tokens out of loss and KL. Its released code leaves them in GAE, in the
whitening and in the critic's loss, where their values are guesses nobody acts on; with its gamma = lam = 1 the advantages of
policy tokens before whitening are the same. numpy float64. Axis: K trained tokens of one sample, T all its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from agents.learning.config import LearnerConfig
from agents.learning.shard import sum_over_ranks
from agents.types import Sample

WHITEN_EPS = 1e-8
"""Added to the variance, as in verl."""


def gae(rewards_K: np.ndarray, values_K: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), float64 [K] each."""
    rewards_K, values_K = np.asarray(rewards_K, dtype=np.float64), np.asarray(values_K, dtype=np.float64)
    advantages_K = np.zeros_like(values_K)
    following, next_value = 0.0, 0.0
    for k in reversed(range(len(values_K))):
        following = rewards_K[k] + gamma * next_value - values_K[k] + gamma * lam * following
        advantages_K[k], next_value = following, values_K[k]
    return advantages_K, advantages_K + values_K


@np.errstate(invalid="ignore", over="ignore")  # what is not finite here makes a loss that is not, and no step is taken
def with_advantages(
    samples: Sequence[Sample],
    config: LearnerConfig,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    counts: bool = True,
) -> tuple[list[Sample], dict[str, float]]:
    """Samples with advantages and aux `returns`, and metrics over all ranks, which call this together.

    `counts`: whether this rank's samples are its own; of ranks that hold the same ones, one counts them.

    Reads aux `rewards` and `values`; under loss.kl_in=reward also `ref_logprobs` and, unless loss.old=rollout, `prox_logprobs`.
    Raises ValueError when one is missing, or a token outside the loss has a reward.
    """
    critic = config.critic
    kept = [s.mask == 1 for s in samples]
    charged = [kl_charge(s, config)[in_loss] for s, in_loss in zip(samples, kept, strict=True)]
    values = [_aux(s, "values")[in_loss] for s, in_loss in zip(samples, kept, strict=True)]
    made = [
        gae(_rewards(s, in_loss) - kl, v, critic.gamma, critic.lam)
        for s, in_loss, kl, v in zip(samples, kept, charged, values, strict=True)
    ]

    def flat(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0), *parts])

    def moments(values_N: np.ndarray) -> tuple[float, float]:
        """Mean, and variance with n - 1, over all ranks."""
        counted = values_N if counts else values_N[:0]
        count, total = sum_over_ranks([len(counted), counted.sum()], device, group)
        mean = total / max(count, 1.0)
        return mean, sum_over_ranks([((counted - mean) ** 2).sum()], device, group)[0] / max(count - 1, 1.0)

    advantages, returns = flat([a for a, _ in made]), flat([r for _, r in made])
    (mean, variance), (return_mean, return_variance) = moments(advantages), moments(returns)
    scale = 1.0 / np.sqrt(variance + WHITEN_EPS)
    out = []
    for s, in_loss, (a, r) in zip(samples, kept, made, strict=True):
        a = (a - mean) * scale if critic.whiten else a
        aux = {k: v for k, v in s.aux.items() if k != "rewards"} | {"returns": _spread(r, in_loss)}
        out.append(replace(s, advantages=_spread(a, in_loss), aux=aux))
    metrics = {
        "gae/advantage_mean": mean,
        "gae/advantage_std": float(np.sqrt(variance)),
        "gae/return_mean": return_mean,
        "value/mean": moments(flat(values))[0],
        # Returns minus values are the advantages; a critic that says one number for all explains 0.
        "value/explained_variance": 1.0 - variance / return_variance if return_variance > 0 else 0.0,
    }
    if config.loss.kl_in == "reward":
        metrics["gae/kl_charged"] = moments(flat(charged))[0]
    return out, metrics


def kl_charge(sample: Sample, config: LearnerConfig) -> np.ndarray:
    """What the KL takes from each token's reward: kl_coef * (log pi_old - log pi_ref), float64 [T]; 0 outside the loss."""
    loss = config.loss
    if loss.kl_in != "reward" or loss.kl_coef == 0:
        return np.zeros(sample.num_tokens)
    old = sample.logprobs if loss.old == "rollout" else _aux(sample, "prox_logprobs")
    gap = np.asarray(old, dtype=np.float64) - _aux(sample, "ref_logprobs")
    return np.where(sample.mask == 1, loss.kl_coef * gap, 0.0)


def _rewards(sample: Sample, in_loss: np.ndarray) -> np.ndarray:
    rewards_T = _aux(sample, "rewards")
    if np.any(rewards_T[~in_loss]):
        raise ValueError(
            f"sample {sample.rollout_id}: a token outside the loss has a reward, which nobody would learn from"
        )
    return rewards_T[in_loss]


def _aux(sample: Sample, name: str) -> np.ndarray:
    if name not in sample.aux:
        mend = {"rewards": "set advantage.name=gae", "ref_logprobs": "run the reference scorer"}.get(
            name, "score it first"
        )
        raise ValueError(f"sample {sample.rollout_id} carries no aux {name!r}, which a critic needs: {mend}")
    return np.asarray(sample.aux[name], dtype=np.float64)


def _spread(values_K: np.ndarray, in_loss: np.ndarray) -> np.ndarray:
    whole_T = np.zeros(len(in_loss))
    whole_T[in_loss] = values_K
    return whole_T
