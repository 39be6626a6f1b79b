"""Which rank trains what: a batch cut into parts of like size. No torch, so that controllers may import it.

Invariants: the parts of all ranks are a partition of the batch, each in the batch's order; the samples of a rollout stay
together, since they are one sequence to the loss; the same batch gives the same parts everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from agents.types import Sample


def shard(samples: Sequence[Sample], rank: int, world: int) -> list[Sample]:
    """The part of a batch that rank `rank` of `world` trains; token counts differ by at most one rollout's."""
    rollouts: dict[str, list[Sample]] = {}
    for s in samples:
        rollouts.setdefault(s.rollout_id, []).append(s)
    cost = {r: sum(s.num_tokens for s in members) for r, members in rollouts.items()}
    load = [0] * world
    mine: set[str] = set()
    for rollout in sorted(rollouts, key=lambda r: (-cost[r], r)):
        lightest = load.index(min(load))
        load[lightest] += cost[rollout]
        if lightest == rank:
            mine.add(rollout)
    return [s for s in samples if s.rollout_id in mine]
