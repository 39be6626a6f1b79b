"""GRPO-lambda: length is penalised only in the groups of a batch that the policy solves best.

Source: "stable RL for efficient reasoning" (2505.18086; spec 3.7). Confidence: confirmed (notes that quote both equations); alpha 0.6 is
a third party's, `min_accuracy` ours (inferred), and so is that unscored groups are not ranked.

Invariants: a wrong rollout gets exactly 0, a right one more than 1 - alpha; a group outside the top share keeps 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from agents.types import Group
from rewards.seeds.shaping import ShaperConfig, Stateless, length, live, right, with_rewards


def lambda_rewards(correct_G: Sequence[bool], lengths_G: Sequence[float], alpha: float) -> list[float]:
    """c * (1 - alpha * sigmoid((len - mean) / std)), mean and population std over the correct ones; z = 0 when they are equal."""
    kept = [n for n, c in zip(lengths_G, correct_G, strict=True) if c]
    if not kept:
        return [0.0] * len(lengths_G)
    mean, std = float(np.mean(kept)), float(np.std(kept))
    spread = max(kept) > min(kept)
    z = [(n - mean) / std if spread else 0.0 for n in lengths_G]
    return [1 - alpha / (1 + math.exp(-x)) if c else 0.0 for x, c in zip(z, correct_G, strict=True)]


def efficient_groups(accuracies: Mapping[str, float], share: float, min_accuracy: float = 0.0) -> set[str]:
    """Ids of the ceil(share * groups) most accurate groups; ties go to the smaller id."""
    ranked = sorted(accuracies, key=lambda uid: (-accuracies[uid], uid))
    # Shares such as 0.2 of 5 are a hair above 1 in floats.
    count = max(1, math.ceil(share * len(ranked) - 1e-9))
    return {uid for uid in ranked[:count] if accuracies[uid] >= min_accuracy}


class GrpoLambda(Stateless):
    """The shaper `grpo_lambda`."""

    def __init__(self, config: ShaperConfig) -> None:
        self._config = config

    def shape(self, groups: Sequence[Group]) -> list[Group]:
        correct = [{i: right(g.members[i]) for i in live(g)} for g in groups]
        # The position tells two groups of one id apart.
        keys = [f"{g.id}\n{n:09d}" for n, g in enumerate(groups)]
        accuracies = {key: sum(c.values()) / len(c) for key, c in zip(keys, correct, strict=True) if c}
        chosen = efficient_groups(accuracies, self._config.share, self._config.min_accuracy)
        shaped = []
        for group, key, c in zip(groups, keys, correct, strict=True):
            rewards = [float(x) for x in c.values()]
            if key in chosen:
                lengths = [length(group.members[i]) for i in c]
                rewards = lambda_rewards(list(c.values()), lengths, self._config.alpha)
            shaped.append(with_rewards(group, dict(zip(c, rewards, strict=True))))
        return shaped
