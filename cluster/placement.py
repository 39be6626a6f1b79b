"""Placement: the seats of a run's actors, reserved together before any of them is started.

Samplers, judges and the parts of retrieval that ask for something sit in placement groups of their own role; the learner's seats are
held until it begins, since Ray Train makes its own group (with the same strategy, labels and resources). Invariants:
- A run that begins has room for all it needs; one that does not says in one line what the cluster lacks, and holds nothing.
- A seat outlives who sat on it: when its node is lost Ray finds it another, or it waits for a node to join.
- What the driver's end would end anyway (fleet, buffer, reward, the first router) runs on the driver's node.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.nodes import Node, alive, living

if TYPE_CHECKING:
    from cluster.schema import RunConfig

STRATEGIES = ("pack", "spread", "strict_pack", "strict_spread")
_LOOK_S = 1.0
_EPSILON = 1e-6


@dataclass
class RolePlacement:
    """Where the actors of one role may sit."""

    strategy: str = "pack"
    """`pack` (few nodes), `spread` (many), `strict_pack` (one node, or the run does not start), `strict_spread` (a node each)."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have, such as `{ray.io/accelerator-type: H100}`; Ray's operators work: `in(a,b)`, `!a`."""
    resources: dict[str, float] = field(default_factory=dict)
    """What each asks for beside CPUs and GPUs: custom resources of nodes, or `memory` in bytes."""


@dataclass
class PlacementConfig:
    """Who sits on which nodes of a cluster. On one machine there is nothing to say."""

    sampler: RolePlacement = field(default_factory=RolePlacement)
    """Sampler engines."""
    learner: RolePlacement = field(default_factory=RolePlacement)
    """Ray Train's workers."""
    judge: RolePlacement = field(default_factory=lambda: RolePlacement("spread"))
    """Judge engines."""
    retrieval: RolePlacement = field(default_factory=lambda: RolePlacement("spread"))
    """Encoders, shards and document stores that are actors of their own."""
    rollout: RolePlacement = field(default_factory=lambda: RolePlacement("spread"))
    """Rollout workers, which ask for nothing: only `labels` counts, and they are always spread."""
    routers: str = "driver"
    """Retrieval's routers: `driver` (one, beside the driver) or `node` (one on every node with rollout workers)."""
    copy_index: bool = True
    """Over several nodes: each that serves an index unpacks a copy of it to `GUMSHOE_CACHE`, once; false: all read it in storage."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name in ("sampler", "learner", "judge", "retrieval"):
            role: RolePlacement = getattr(self, name)
            if role.strategy not in STRATEGIES:
                raise ValueError(
                    f"placement.{name}.strategy is {role.strategy!r}; it must be one of {', '.join(STRATEGIES)}"
                )
            wrong = sorted(k for k in role.resources if k in ("CPU", "GPU") or not role.resources[k] > 0)
            if wrong:
                raise ValueError(
                    f"placement.{name}.resources.{wrong[0]} cannot be set so: amounts must be positive, and CPUs and GPUs are asked for by "
                    "fleet, train, judge and service.topology"
                )
        if self.rollout.resources:
            raise ValueError("placement.rollout.resources cannot be set: rollout workers ask for nothing; give labels")
        if self.routers not in ("driver", "node"):
            raise ValueError(f"placement.routers is {self.routers!r}; it must be driver or node")


@dataclass(frozen=True)
class Demand:
    """Actors that ask for the same."""

    name: str
    """Of the seats, in `Seats.of`."""
    role: str
    """As it is named in `placement`."""
    what: str
    """In the plural, for messages."""
    count: int
    each: Mapping[str, float]
    """Resources of one; empty: it can sit anywhere."""
    where: RolePlacement
    mend: str
    """The key to lower."""
    fewest: int = -1
    """How many must be there when the run begins; -1: all."""

    @property
    def needed(self) -> int:
        return self.count if self.fewest < 0 else min(self.fewest, self.count)


@dataclass(frozen=True)
class Seat:
    """Room for one actor. It crosses processes."""

    group: Any
    """Ray's handle of the placement group."""
    bundle: int
    each: Mapping[str, float]

    @property
    def options(self) -> dict[str, Any]:
        """Those of an actor that sits here; what it asks for is said by itself."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.bundle)}

    def node(self) -> str:
        """Id of the node it is on; empty while it is on none, such as after the loss of its node."""
        import ray

        table = ray.util.placement_group_table(self.group)
        found = str((table.get("bundles_to_node_id") or {}).get(self.bundle, ""))
        return found if found and alive(found) else ""

    def __str__(self) -> str:
        return amounts(self.each)


def demands(config: RunConfig, *, training: bool = True, num_shards: int = 0) -> list[Demand]:
    """What a run asks the cluster for, learner first: its seats are the hardest to find.

    `training`: with a learner; `num_shards`: of the index, over all its legs.
    """
    fleet, train, judge, place = config.fleet, config.train, config.judge, config.placement
    found = []
    if training:
        each = asked(train.worker_cpus, train.worker_gpus, place.learner)
        found.append(
            Demand("learner", "learner", "learners", train.num_workers, each, place.learner, "train.num_workers")
        )
    each = asked(fleet.num_cpus, fleet.num_gpus, place.sampler)
    fewest = fleet.min_engines or -1
    found.append(
        Demand("sampler", "sampler", "samplers", fleet.num_engines, each, place.sampler, "fleet.num_engines", fewest)
    )
    if judge.kind == "vllm" and not judge.replay:
        each = asked(0.0, judge.num_gpus, place.judge)
        found.append(Demand("judge", "judge", "judge engines", judge.engines, each, place.judge, "judge.engines"))
    t = config.service.topology
    for name, count, gpus, key in (
        ("encoder", t.encoders, t.encoder_gpus, "encoders"), ("store", t.stores, 0.0, "stores"),
        ("shard", t.shard_replicas * num_shards, t.shard_gpus, "shard_replicas"),
    ):  # fmt: skip
        each, mend = asked(0.0, gpus, place.retrieval), f"service.topology.{key}"
        found.append(Demand(name, "retrieval", f"{name}s of retrieval", count, each, place.retrieval, mend))
    return [d for d in found if d.each and d.count]


def asked(cpus: float, gpus: float, role: RolePlacement) -> dict[str, float]:
    """What one actor asks for, without what is nothing."""
    return {k: v for k, v in {"CPU": cpus, "GPU": gpus, **role.resources}.items() if v}


class Seats:
    """The seats of a run. Made by `reserve`, given back by `close`."""

    def __init__(self) -> None:
        self._seats: dict[str, list[Seat]] = {}
        self._groups: dict[str, list[Any]] = {}
        self._later: dict[str, Demand] = {}
        """Demands of which more may come than must be there when the run begins."""
        self._queue: dict[str, list[Seat]] = {}
        """Seats that were asked for on condition, and are not counted yet."""

    def of(self, name: str) -> list[Seat]:
        """Those of one demand; empty where it asks for nothing."""
        return self._seats.get(name, [])

    def release(self, name: str) -> None:
        """Gives them back, for whoever asks next."""
        self._seats.pop(name, None)
        for group in [*self._groups.pop(name, []), *(seat.group for seat in self._queue.pop(name, []))]:
            _remove(group)

    def close(self) -> None:
        for name in dict.fromkeys([*self._groups, *self._queue]):
            self.release(name)

    def ask(self, demand: Demand) -> list[Any]:
        """Asks Ray for those of a role's seats that must be there before the run begins: one group, by the role's strategy, or none."""
        if demand.count > demand.needed:
            self._later[demand.name] = demand
        return [self._ask(demand, demand.needed, demand.where.strategy)] if demand.needed else []

    def more(self, name: str) -> bool:
        """Whether there are seats that were not asked for yet."""
        return name in self._later

    def all(self, name: str) -> list[Seat]:
        """Asks for the others too, each a group of its own, which comes when there is room: a queue of them takes whatever is free."""
        demand = self._later.pop(name, None)
        if demand is not None:
            for _ in range(demand.count - demand.needed):
                self._ask(demand, 1, "PACK")
        return self.of(name)

    def come(self, name: str, beside: Any) -> tuple[list[Seat], int]:
        """The seats there are, in the order they came, while others are asked for one by one, where the group `beside` has its room; and how
        many of those were given back because it has it no more. What is free then may be the room it has just left."""
        demand, queue = self._later[name], self._queue.setdefault(name, [])
        come = [seat for seat in queue if seat.node()]
        if not placed(beside):  # looked at last: who took its room came after it had left
            for seat in queue:
                _remove(seat.group)
            given_back = len(queue)
            queue.clear()
            return self.of(name), given_back
        for seat in come:
            queue.remove(seat)
            self._groups.setdefault(name, []).append(seat.group)
            self._seats.setdefault(name, []).append(seat)
        for _ in range(demand.count - len(self.of(name)) - len(queue)):
            queue.append(Seat(_request(demand, 1, "PACK"), 0, dict(demand.each)))
        return self.of(name), 0

    def _ask(self, demand: Demand, count: int, strategy: str) -> Any:
        made = _request(demand, count, strategy)
        self._groups.setdefault(demand.name, []).append(made)
        self._seats.setdefault(demand.name, []).extend(Seat(made, i, dict(demand.each)) for i in range(count))
        return made


def _request(demand: Demand, count: int, strategy: str) -> Any:
    from ray.util import placement_group

    labels = [dict(demand.where.labels)] * count if demand.where.labels else None
    return placement_group([dict(demand.each)] * count, strategy.upper(), bundle_label_selector=labels)


def _remove(group: Any) -> None:
    from ray.util import remove_placement_group

    with contextlib.suppress(Exception):
        remove_placement_group(group)


def placed(group: Any) -> bool:
    """Whether a placement group has all its room."""
    import ray

    return str(ray.util.placement_group_table(group).get("state", "")) == "CREATED"


@contextlib.contextmanager
def reserve(wanted: Sequence[Demand], wait_s: float) -> Iterator[Seats]:
    """The seats of a run, all there when the block begins; given back with it. Raises UserError with what the cluster lacks."""
    seats = Seats()
    try:
        waiting = [(demand, seats.ask(demand)) for demand in wanted]
        deadline = time.monotonic() + wait_s
        for demand, groups in waiting:
            for group in groups:
                if not group.wait(max(_LOOK_S, deadline - time.monotonic())):
                    here = living()
                    raise UserError(lacking(wanted, here) or _unplaced(demand, here, wait_s))
        yield seats
    finally:
        seats.close()


def lacking(wanted: Sequence[Demand], nodes: Sequence[Node]) -> str:
    """One line on what even an idle cluster of these nodes lacks; empty where its nodes have enough in sum, and each actor fits into one."""
    for demand in wanted:
        fits = [n for n in nodes if labelled(n, demand.where.labels)]
        if line := unlabelled(demand.role, demand.where.labels, nodes):
            return line
        room = [
            min((math.floor(n.total.get(k, 0) / v + _EPSILON) for k, v in demand.each.items()), default=0) for n in fits
        ]
        places = sum(min(1, r) for r in room) if demand.where.strategy == "strict_spread" else sum(room)
        if demand.where.strategy == "strict_pack":
            places = max(room, default=0)
        if places < demand.needed:
            strict = f" ({demand.where.strategy})" if demand.where.strategy.startswith("strict") else ""
            return (
                f"this run asks for {counted(demand.needed, demand.what)} with {amounts(demand.each)} each{strict}, and the cluster has room for "
                f"{places}: {_nodes(nodes, demand.each, 'total')}; lower {demand.mend}, or add nodes"
            )
    sums: dict[str, float] = {}
    for demand in wanted:
        for kind, amount in demand.each.items():
            sums[kind] = sums.get(kind, 0.0) + amount * demand.needed
    for kind, amount in sums.items():
        there = sum(n.total.get(kind, 0) for n in nodes)
        if amount > there + _EPSILON:
            parts = ", ".join(counted(d.needed, d.what) for d in wanted if kind in d.each)
            return (
                f"this run asks for {amount:g} {kind} ({parts}), the cluster has {there:g} on {counted(len(nodes), 'nodes')}; lower "
                f"{' or '.join(d.mend for d in wanted if kind in d.each)}, or add nodes"
            )
    return ""


def unlabelled(role: str, labels: Mapping[str, str], nodes: Sequence[Node]) -> str:
    """One line where no node has the labels that a role asks for, else empty."""
    if any(labelled(n, labels) for n in nodes):
        return ""
    return (
        f"no node has the labels {_pairs(labels)} that placement.{role}.labels asks for; what there is: "
        f"{'; '.join(_pairs(_own(n.labels)) or 'none' for n in nodes)}; correct it, or start nodes with `ray start --labels`"
    )


def _unplaced(first: Demand, nodes: Sequence[Node], wait_s: float) -> str:
    """Where the cluster would be large enough, but what is free, or how it is cut, is not."""
    return (
        f"no room for {counted(first.needed, first.what)} with {amounts(first.each)} each within ray.wait_s={wait_s:g}: "
        f"{_nodes(nodes, first.each, 'free')}; end what uses the rest, lower {first.mend}, or change placement.{first.role}"
    )


def _nodes(nodes: Sequence[Node], kinds: Mapping[str, float], side: str) -> str:
    """What each node has of some kinds, the same ones counted."""
    texts = [
        "/".join(f"{getattr(n, side).get(kind, 0):g} {kind}" for kind in kinds) + (" free" if side == "free" else "")
        for n in nodes
    ]
    each = [f"{texts.count(t)} x {t}" if texts.count(t) > 1 else t for t in dict.fromkeys(texts)]
    return f"its {len(nodes)} node{'s have' if len(nodes) != 1 else ' has'} {', '.join(each)}"


def counted(number: int, what: str) -> str:
    """`2 judge engines`, `1 judge engine`, `1 shard of retrieval`."""
    noun, of, rest = what.partition(" of ")
    return f"{number} {noun.removesuffix('s') if number == 1 else noun}{of}{rest}"


def labelled(node: Node, labels: Mapping[str, str]) -> bool:
    """Whether a node has them. Those with an operator are taken as met: Ray knows them better."""
    plain = {k: v for k, v in labels.items() if not v.startswith(("!", "in(", "!in("))}
    return all(node.labels.get(k) == v for k, v in plain.items())


def _own(labels: Mapping[str, str]) -> dict[str, str]:
    """Without those that Ray gives to every node."""
    return {k: v for k, v in labels.items() if k != "ray.io/node-id"}


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{k}={v}" for k, v in labels.items())


def amounts(each: Mapping[str, float]) -> str:
    """Resources in words: `1 GPU, 0.5 CPU`."""
    return ", ".join(f"{amount:g} {kind}" for kind, amount in each.items()) or "nothing"
