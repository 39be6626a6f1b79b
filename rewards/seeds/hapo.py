"""HAPO: a right answer is paid for being shorter than the right answers its task has seen before.

Source: HAPO, released code (spec 3.8). Confidence: confirmed (code). Ours: the linear form for a wrong rollout shorter than the
history is 0, as the cosine form says.

Invariants: without a history the reward is the outcome; the worst right rollout earns more than the best wrong one; the history is
read when a batch is shaped and written when it has been trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agents.types import Group
from rewards.seeds.shaping import ShaperConfig, length, live, right, with_rewards

FLOOR = -0.7
"""The length reward of a right answer never falls below."""


def length_reward(
    num_tokens: float, history: float | None, correct: bool, form: str = "cosine", tolerance: float = 0.1
) -> float:
    """In [-0.7, 1] for a right rollout, [-1, 0] for a wrong one; 0 without a history."""
    if history is None:
        return 0.0
    if form == "cosine":
        value = math.cos(math.pi / 2 * min(num_tokens / history, 2.0))
    elif num_tokens < history:
        value = 1 - num_tokens / history
    else:
        value = min(0.0, -(num_tokens - (1 + tolerance) * history) / history)
    return max(value, FLOOR) if correct else max(min(value, 0.0), -1.0)


class Hapo:
    """The shaper `hapo`. Its history is per task: shortest correct length, sum and number of correct lengths."""

    def __init__(self, config: ShaperConfig) -> None:
        self._config = config
        self._seen: dict[str, tuple[float, float, int]] = {}

    def history(self, task: str) -> float | None:
        """Tokens that right answers to this task took; None before the first."""
        if task not in self._seen:
            return None
        shortest, total, count = self._seen[task]
        return shortest if self._config.history == "min" else total / count

    def shape(self, groups: Sequence[Group]) -> list[Group]:
        c = self._config
        shaped = []
        for group in groups:
            before = self.history(group.task.id)
            rewards = {}
            for i in live(group):
                correct = right(group.members[i])
                extra = length_reward(length(group.members[i]), before, correct, c.form, c.tolerance)
                rewards[i] = float(correct) + c.weight * extra
            shaped.append(with_rewards(group, rewards))
        return shaped

    def update(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for i in live(group):
                n = length(group.members[i])
                if right(group.members[i]) and n > 0:
                    shortest, total, count = self._seen.get(group.task.id, (math.inf, 0.0, 0))
                    self._seen[group.task.id] = (min(shortest, n), total + n, count + 1)

    def state(self) -> dict[str, Any]:
        return {"hapo": {task: list(seen) for task, seen in self._seen.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        saved = state.get("hapo", {})
        self._seen = {str(task): (float(a), float(b), int(n)) for task, (a, b, n) in saved.items()}
