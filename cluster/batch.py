"""What the learner trains on next, made from scored groups when it ships, and what such a batch looks like in the log.

Invariant: no sample of a batch holds a trained token older than `max_staleness` optimiser batches (None: no limit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from agents.advantages import AdvantageConfig, summarise, to_samples
from agents.sharding import shards
from agents.types import Group, Sample, StopReason


@dataclass(frozen=True)
class Batch:
    """What the learner trains on next."""

    step: int
    """Optimiser batches trained before this one."""
    shards: tuple[tuple[Sample, ...], ...]
    """Per learner rank; empty for ranks that it does not go to (`only`)."""
    last: bool
    """True when training ends after this batch."""
    stats: dict[str, float] = field(default_factory=dict)

    def only(self, first: int, count: int) -> Batch:
        """With the parts of `count` ranks from `first` on: what one of them is sent."""
        mine = range(first, first + count)
        return replace(self, shards=tuple(part if rank in mine else () for rank, part in enumerate(self.shards)))


def make_batch(
    step: int,
    groups: Sequence[Group],
    advantage: AdvantageConfig,
    *,
    max_staleness: int | None,
    world_size: int = 1,
    last: bool = False,
    shared: bool = False,
) -> Batch:
    """Samples of `groups` by rank. Members over age are withheld; their rewards stay in their group's baseline.

    `shared`: see `agents.sharding.shards`.
    """
    made = [to_samples(group, advantage) for group in groups]
    samples = [s for found, _ in made for s in found]
    young = samples
    if max_staleness is not None:
        young = [s for s in samples if sample_age(s, step) <= max_staleness]
    ages = [sample_age(s, step) for s in young] or [0]
    row = {**batch_stats(groups), **summarise([stats for _, stats in made])}
    row["masked/stale"] = float(len(samples) - len(young))
    row["staleness/mean"], row["staleness/max"] = float(np.mean(ages)), float(max(ages))
    return Batch(step, tuple(map(tuple, shards(young, world_size, shared=shared))), last, row)


def batch_stats(groups: Sequence[Group]) -> dict[str, float]:
    """What a batch of scored groups looks like, for the log: success, lengths, tool use, endings, where its time went."""
    members = [t for g in groups for t in g.trajectories]
    row: dict[str, float] = {"episodes": float(len(members))}
    outcomes = [v.parts["outcome"] for g in groups for v in g.verdicts if not v.masked and "outcome" in v.parts]
    if outcomes:
        row["success"] = float(np.mean([value == 1.0 for value in outcomes]))
    row["episode/tokens"] = float(np.mean([sum(len(t.token_ids) for t in m.turns) for m in members]))
    row["episode/sampled_tokens"] = sum(map(sampled_tokens, groups)) / len(members)
    row["episode/turns"] = float(np.mean([sum(t.role == "policy" for t in m.turns) for m in members]))
    for tool, name in (("search", "searches"), ("open", "opens"), ("find", "finds")):
        row[f"episode/{name}"] = float(np.mean([sum(e.call.name == tool for e in m.events) for m in members]))
    for stop in StopReason:
        share = float(np.mean([m.stop is stop for m in members]))
        if share:
            row[f"stop/{stop}"] = share
    for phase in ("generate", "tools"):  # summed over a group's episodes, which run side by side
        row[f"rollout/{phase}_s"] = sum(g.seconds.get(phase, 0.0) for g in groups) / max(1, len(members))
    for phase, name in (("judge", "judge"), ("rollout", "wall")):
        row[f"rollout/{name}_s"] = float(np.mean([g.seconds.get(phase, 0.0) for g in groups]))
    return row


def sampled_tokens(group: Group) -> int:
    """Tokens the policy sampled for a lease, candidates that were not kept included."""
    turns = {
        (m.trajectory.identity.uid.attempt, t.id): int(t.mask.sum())
        for g in (group, *group.steps)
        for m in g.members
        for t in m.trajectory.turns
    }
    return sum(turns.values())


def sample_age(sample: Sample, step: int) -> int:
    """Optimiser batches between the oldest trained token of a sample and the weights that train it."""
    trained = sample.versions[sample.mask == 1]
    return step - int(trained.min()) if len(trained) else 0
