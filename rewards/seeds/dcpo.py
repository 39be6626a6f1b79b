"""DCPO: of K rollouts train on K/2, the best (short before long) and the worst (long before short).

Source: ChatShopBuddy's sampler (2603.06065; spec 3.2). Confidence: the halving is confirmed (notes), the order is inferred.

Invariant: what is kept holds the best and the worst reward of the group; advantages are normalised over what is kept alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agents.types import Group
from rewards.seeds.shaping import ShaperConfig, Stateless, length, live


def dcpo_select(rewards_K: Sequence[float], lengths_K: Sequence[float]) -> list[int]:
    """Indices kept, ascending: the first and the last quarter in the order (reward down, length up)."""
    order = sorted(range(len(rewards_K)), key=lambda i: (-rewards_K[i], lengths_K[i]))
    quarter = max(1, len(order) // 4)
    return sorted({*order[:quarter], *order[-quarter:]})


class Dcpo(Stateless):
    """The shaper `dcpo`. Masked members stay, so that they are counted by their cause."""

    def __init__(self, config: ShaperConfig) -> None:
        """Nothing is configured."""

    def shape(self, groups: Sequence[Group]) -> list[Group]:
        shaped = []
        for group in groups:
            counted = live(group)
            kept = dcpo_select([group.verdicts[i].reward for i in counted], [length(group.members[i]) for i in counted])
            gone = set(counted) - {counted[k] for k in kept}
            shaped.append(replace(group, members=tuple(m for i, m in enumerate(group.members) if i not in gone)))
        return shaped
