"""Batch shapers: rewards of scored groups changed once, when a batch ships, by what only a batch or a history can tell.

A shaper starts from the part `outcome` (1: right), as C-GRPO does, and writes `Verdict.reward`; its share stands in the part `shaping`.
Invariants: a masked member is neither changed nor counted; lengths are tokens the policy sampled; a right rollout always earns more
than a wrong one; `shape` changes no state, so a batch may be made twice, and `update` learns from a batch once it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agents.types import Group, Member, RecordError


@dataclass
class ShaperConfig:
    """What happens to the rewards of a batch before advantages. Only for advantages that read `Verdict.reward`."""

    name: str = ""
    """Empty, or one of `grpo_lambda`, `hapo`, `dcpo`."""
    share: float = 0.2
    """grpo_lambda: share of the batch's groups, those with the best accuracy, in which length counts."""
    alpha: float = 0.6
    """grpo_lambda: weight of the length penalty, above 0 and below 1."""
    min_accuracy: float = 0.0
    """grpo_lambda: groups below this accuracy are never penalised for length."""
    form: str = "cosine"
    """hapo: `cosine` or `linear`."""
    history: str = "min"
    """hapo: per task the shortest correct length so far (`min`) or the running mean of correct lengths (`mean`)."""
    weight: float = 1.0
    """hapo: weight of the length reward; below 1/0.7, so that right always beats wrong."""
    tolerance: float = 0.1
    """hapo, linear: how far above the history a length costs nothing."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.name not in ("", "grpo_lambda", "hapo", "dcpo"):
            raise ValueError(f"shaper.name {self.name!r} is unknown; one of grpo_lambda, hapo, dcpo, or empty")
        for key, allowed in (("form", ("cosine", "linear")), ("history", ("min", "mean"))):
            if getattr(self, key) not in allowed:
                raise ValueError(f"shaper.{key} {getattr(self, key)!r} is unknown; one of {', '.join(allowed)}")
        ranges = {
            "share": 0 < self.share <= 1, "alpha": 0 < self.alpha < 1, "min_accuracy": 0 <= self.min_accuracy <= 1,
            "weight": 0 <= self.weight < 1 / 0.7, "tolerance": self.tolerance >= 0,
        }  # fmt: skip
        for key, fits in ranges.items():
            if not fits:
                raise ValueError(f"shaper.{key} {getattr(self, key)} is out of range; see ShaperConfig")


class Shaper(Protocol):
    """Changes the rewards of a batch of scored groups."""

    def shape(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their new rewards, in order."""
        ...

    def update(self, groups: Sequence[Group]) -> None:
        """A batch (as it was before `shape`) has been trained."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """A shaper that remembers nothing."""

    def update(self, groups: Sequence[Group]) -> None:
        """Nothing is kept."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""


def live(group: Group) -> list[int]:
    """Indices of members that count: scored and not masked."""
    return [i for i, (m, v) in enumerate(zip(group.members, group.verdicts, strict=True)) if not (v.masked or m.trajectory.stop.infrastructure)]  # fmt: skip


def right(member: Member) -> bool:
    """Whether the outcome is 1. Raises RecordError, one line, for a verdict without that part."""
    parts = member.trajectory.verdict.parts if member.trajectory.verdict else {}
    if "outcome" not in parts:
        raise RecordError(
            f"a shaper needs the verdict part outcome, which {member.trajectory.identity.uid} lacks: use a reward that judges it"
        )
    return parts["outcome"] == 1.0


def length(member: Member) -> int:
    """Tokens the policy sampled."""
    return int(member.trajectory.mask.sum())


def with_rewards(group: Group, rewards: Mapping[int, float]) -> Group:
    """The group with these members' rewards replaced."""
    verdicts = list(group.verdicts)
    for i, reward in rewards.items():
        shaping = reward - float(right(group.members[i]))
        verdicts[i] = replace(verdicts[i], reward=reward, parts={**verdicts[i].parts, "shaping": shaping})
    return group.with_verdicts(verdicts)
