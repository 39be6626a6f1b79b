"""Which rank trains what: a batch cut into parts of like size. No torch, so that controllers may import it.

Invariants: the parts of all ranks are a partition of the batch, each in the batch's order; the samples of a rollout stay
together, since they are one sequence to the loss; the same batch gives the same parts everywhere. Where the learner computes
shared prefixes once (`learner.layout` shared), samples of one `prefix_id` that are prefix for the most part (the steps of an
episode) stay together too, unless they are more than one rank's share of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from agents.types import Sample


@dataclass
class _Unit:
    """Rollouts that go to one rank."""

    own: dict[str, int] = field(default_factory=dict)
    """Tokens of each rollout behind what it shares"""
    prefix: int = 0
    """Tokens they share, computed once"""

    @property
    def cost(self) -> int:
        return self.prefix + sum(self.own.values())

    def cut(self, pieces: int) -> list[_Unit]:
        """At most so many parts of like size, of neighbours; each computes the prefix anew."""
        parts = [_Unit(prefix=self.prefix) for _ in range(pieces)]
        total, done = max(1, sum(self.own.values())), 0
        for rollout, own in self.own.items():
            parts[min(pieces - 1, (2 * done + own) * pieces // (2 * total))].own[rollout] = own
            done += own
        return [part for part in parts if part.own]


def shard(samples: Sequence[Sample], rank: int, world: int, *, shared: bool = False) -> list[Sample]:
    """The part of a batch that rank `rank` of `world` trains (`shards`)."""
    return shards(samples, world, shared=shared)[rank]


def shards(samples: Sequence[Sample], world: int, *, shared: bool = False) -> list[list[Sample]]:
    """The parts of a batch that the ranks train; token counts of parts differ by at most one unit's.

    `shared`: shared prefixes are computed once, and count so (of an episode, the kept steps count as candidates and as prefix).
    """
    units: dict[tuple[bool, str], _Unit] = {}
    key: dict[str, tuple[bool, str]] = {}
    for s in samples:
        joins = shared and bool(s.prefix_id) and 2 * s.prefix_len >= s.num_tokens
        place = key.setdefault(s.rollout_id, (joins, s.prefix_id if joins else s.rollout_id))
        unit = units.setdefault(place, _Unit())
        given = s.prefix_len if place[0] else 0
        unit.prefix = max(unit.prefix, given)
        unit.own[s.rollout_id] = unit.own.get(s.rollout_id, 0) + s.num_tokens - given
    share = max(1.0, sum(unit.cost for unit in units.values()) / world)
    parts = [part for unit in units.values() for part in unit.cut(math.ceil(unit.cost / share))]
    load = [0] * world
    rank_of: dict[str, int] = {}
    for part in sorted(parts, key=lambda p: (-p.cost, *p.own)):
        lightest = load.index(min(load))
        load[lightest] += part.cost
        rank_of |= dict.fromkeys(part.own, lightest)
    found: list[list[Sample]] = [[] for _ in range(world)]
    for s in samples:
        found[rank_of[s.rollout_id]].append(s)
    return found
