"""Conduct: what rules can say of a rollout without a judge. Parts for combiners: format, length, distinct, efficiency.

Source: SearchLLM's rule criteria (format, length; spec 3.1) and ChatShopBuddy's efficiency = max(0, 1 - calls / max_calls) (spec 3.2).
Confidence: inferred, since neither paper prints its rules.

Invariant: all parts are in [0, 1] and higher is better; a rollout without a final message has only its efficiency left.
"""

from __future__ import annotations

from agents.interfaces import Reward, Services
from agents.text import words
from agents.types import Group, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.outcome import void_cause
from rewards.seeds.config import ConductConfig
from rewards.seeds.regularised import distinct_share


def tool_efficiency(num_calls: int, max_calls: int) -> float:
    """max(0, 1 - calls / max_calls)."""
    return max(0.0, 1 - num_calls / max_calls)


def conduct(config: RewardConfig) -> Reward:
    """The reward `conduct`: format * length * distinct. Parts: these, and efficiency."""

    async def score(group: Group, services: Services) -> list[Verdict]:
        return [_verdict(t, config.conduct) for t in group.trajectories]

    return score


def _verdict(trajectory: Trajectory, config: ConductConfig) -> Verdict:
    if trajectory.stop.infrastructure:
        return Verdict.unavailable("format", str(trajectory.stop))
    formed = not void_cause(trajectory)
    short = formed and len(words(trajectory.message)) <= config.max_words
    distinct = distinct_share(trajectory.message) if formed else 0.0
    parts = {"format": float(formed), "length": float(short), "distinct": distinct}
    efficiency = tool_efficiency(len(trajectory.events), config.max_calls)
    return Verdict(formed * short * distinct, parts | {"efficiency": efficiency})
