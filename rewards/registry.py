"""Rewards by name."""

from __future__ import annotations

from collections.abc import Callable

from agents.interfaces import Reward
from rewards.carr import carr
from rewards.config import RewardConfig
from rewards.outcome import outcome

REWARDS: dict[str, Callable[[RewardConfig], Reward]] = {"outcome": outcome, "carr": carr}


def make_reward(config: RewardConfig) -> Reward:
    """The configured reward. Raises ValueError, one line, for a config that does not fit."""
    config.check()
    return REWARDS[config.name](config)
