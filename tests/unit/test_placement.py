"""Placement without Ray: what a run asks for, and the one line about what a cluster lacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster import placement
from cluster.actors import Actors
from cluster.config import load_config
from cluster.nodes import Node
from cluster.placement import Demand, PlacementConfig, RolePlacement, Seats, demands, lacking, reserve
from cluster.schema import RunConfig
from cluster.sizes import needs


def node(name: str, labels: dict[str, str] | None = None, **total: float) -> Node:
    return Node(name * 8, name, total, total, labels or {})


def demand(count: int, where: RolePlacement | None = None, fewest: int = -1, **each: float) -> Demand:
    return Demand("sampler", "sampler", "samplers", count, each, where or RolePlacement(), "fleet.num_engines", fewest)


def demo(*overrides: str) -> RunConfig:
    return load_config("demo", overrides, RunConfig)


def test_a_run_asks_for_its_learner_samplers_and_judges_and_for_nothing_that_is_nothing() -> None:
    found = demands(demo())
    assert [(d.name, d.count, d.each) for d in found] == [("learner", 1, {"CPU": 0.5}), ("sampler", 1, {"CPU": 0.5})]
    assert [d.name for d in demands(demo(), training=False)] == ["sampler"]
    many = demo(
        "judge.kind=vllm", "judge.engines=2", "judge.num_gpus=1", "service.topology.encoders=2", "service.topology.encoder_gpus=0.5",
        "service.topology.shard_replicas=2", "service.topology.shard_gpus=1", "placement.sampler.resources={big: 1}", "fleet.num_cpus=0",
    )  # fmt: skip
    found = {d.name: (d.count, dict(d.each)) for d in demands(many, num_shards=3)}
    assert found == {
        "learner": (1, {"CPU": 0.5}), "sampler": (1, {"big": 1.0}), "judge": (2, {"GPU": 1.0}), "encoder": (2, {"GPU": 0.5}),
        "shard": (6, {"GPU": 1.0}),
    }  # fmt: skip


def test_a_run_may_begin_with_fewer_engines_than_it_wants() -> None:
    config = demo("fleet.num_engines=4", "fleet.min_engines=1", "fleet.num_gpus=1")
    (asked,) = [d for d in demands(config) if d.name == "sampler"]
    assert (asked.count, asked.needed) == (4, 1) and needs(config)["GPU"] == 1
    assert not lacking([asked], [node("a", CPU=8, GPU=1)])
    with pytest.raises(ValueError, match=r"between 0 and fleet\.num_engines=4"):
        demo("fleet.num_engines=4", "fleet.min_engines=5").fleet.check()


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (demand(3, GPU=2), "3 samplers with 2 GPU each, and the cluster has room for 2: its 2 nodes have 3 GPU, 2 GPU; lower fleet.num_eng"),
        (demand(1, GPU=4), "1 sampler with 4 GPU each, and the cluster has room for 0"),
        (demand(3, RolePlacement("strict_spread"), CPU=1), "each (strict_spread), and the cluster has room for 2: its 2 nodes have 2 x 4 CPU"),
        (demand(2, RolePlacement("strict_pack"), GPU=2), "each (strict_pack), and the cluster has room for 1"),
        (demand(1, RolePlacement(labels={"zone": "x"}), CPU=1), "no node has the labels zone=x that placement.sampler.labels asks for"),
        (demand(1, RolePlacement(labels={"zone": "b"}), GPU=3), "room for 0"),
        (demand(3, GPU=1), ""),
        (demand(2, RolePlacement("strict_spread"), GPU=2), ""),
        (demand(1, RolePlacement(labels={"zone": "in(a,b)"}), GPU=3), ""),
        (demand(9, fewest=2, GPU=1), ""),
    ],
)  # fmt: skip
def test_what_a_cluster_lacks_is_one_line_that_says_what_it_has(wanted: Demand, line: str) -> None:
    found = lacking([wanted], [node("a", {"zone": "a"}, CPU=4, GPU=3), node("b", {"zone": "b"}, CPU=4, GPU=2)])
    assert line in found if line else not found
    assert "\n" not in found


def test_roles_that_fit_alone_and_not_together_are_told_together() -> None:
    learner = Demand("learner", "learner", "learners", 2, {"GPU": 1.0}, RolePlacement(), "train.num_workers")
    found = lacking([learner, demand(2, GPU=1)], [node("a", GPU=3)])
    assert "asks for 4 GPU (2 learners, 2 samplers), the cluster has 3 on 1 node;" in found
    assert "lower train.num_workers or fleet.num_engines" in found


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("placement.sampler.strategy=near", "placement.sampler.strategy is 'near'"),
        ("placement.learner.resources={GPU: 1}", "placement.learner.resources.GPU cannot be set so"),
        ("placement.judge.resources={big: 0}", "placement.judge.resources.big cannot be set so"),
        ("placement.rollout.resources={big: 1}", "rollout workers ask for nothing"),
        ("placement.routers=all", "must be driver or node"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        demo(override).placement.check()
    PlacementConfig().check()


def test_seats_are_given_back_when_one_role_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[str] = []

    class Group:
        def __init__(self, there: bool) -> None:
            self.there = there

        def wait(self, _: float) -> bool:
            return self.there

    def ask(self: Seats, wanted: Demand) -> list[Group]:
        self._groups[wanted.name] = []
        return [Group(wanted.name == "learner")]

    monkeypatch.setattr(Seats, "ask", ask)
    monkeypatch.setattr(Seats, "release", lambda self, name: given_back.append(name))
    monkeypatch.setattr(placement, "living", lambda: [Node("n", "a", {"GPU": 2}, {"GPU": 0.0})])
    learner = Demand("learner", "learner", "learners", 1, {"CPU": 1.0}, RolePlacement(), "train.num_workers")
    with (
        pytest.raises(placement.UserError, match=r"the cluster has room for 0|no room for"),
        reserve([learner, demand(1, GPU=1)], 1),
    ):
        raise AssertionError("it must not begin")
    assert given_back == ["learner", "sampler"]


class Cluster:
    """Placement groups in the order they were asked for; `room` of them have theirs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.groups, self.number = room, list[str](), 0
        monkeypatch.setattr("ray.util.placement_group", self.ask)
        monkeypatch.setattr("ray.util.remove_placement_group", self.remove)
        monkeypatch.setattr("ray.util.placement_group_table", self.table)
        monkeypatch.setattr(placement, "alive", lambda _: True)

    def ask(self, *_: Any, **__: Any) -> str:
        self.number += 1
        self.groups.append(f"group-{self.number}")
        return self.groups[-1]

    def remove(self, group: str) -> None:
        self.groups.remove(group)

    def table(self, group: str) -> dict[str, Any]:
        if group not in self.groups:
            return {"state": "REMOVED", "bundles_to_node_id": {0: "a"}}
        there = self.groups.index(group) < self.room
        return {"state": "CREATED" if there else "PENDING", "bundles_to_node_id": {0: "a" if there else ""}}


def test_samplers_that_wait_for_room_never_keep_that_of_a_learner_which_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch, room=2)
    seats, told = Seats(), list[list[Any]]()
    seats.ask(demand(4, fewest=1, GPU=1))
    first, learner = "group-1", cluster.ask()
    answers: list[tuple[Any, int]] = [(None, 1), (learner, 1), (learner, 1), (None, 1), (None, 1)]
    fleet = SimpleNamespace(grow=SimpleNamespace(remote=lambda found: told.append([s.group for s in found])))
    run = SimpleNamespace(
        _config=demo("fleet.num_engines=4"), _seats=seats, _seated=SimpleNamespace(take=lambda: answers.pop(0)),
        _learner_room=None, fleet=fleet,
    )  # fmt: skip

    def grow() -> list[str]:
        return Actors._grow(run)  # type: ignore[arg-type]

    assert grow() == [] and cluster.groups == [first, learner], "the first learner may wait for its room"
    assert grow() == [] and grow() == [] and told == []
    assert cluster.groups == [first, learner, "group-3", "group-4", "group-5"], "they wait for room"
    cluster.remove(learner)  # and Ray gives its room to the next at once
    (line,) = grow()
    assert "the learner's room is free: none is asked for 3 samplers that wait" in line
    assert grow() == [] and cluster.groups == [first] and told == []
    again = cluster.ask()
    cluster.room, answers[:] = 3, [(again, 1), (again, 1), (again, 2), (again, 4)]
    assert grow() == [] and grow() == [] and told == [[first, "group-7"]], (
        "where the learner has its room, they get what is left"
    )
    cluster.room = 9
    assert grow() == [] and grow() == [] and told[1:] == [[first, "group-7", "group-8", "group-9"]]
    seats.close()
    assert cluster.groups == [again]
