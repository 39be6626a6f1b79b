"""Nodes that join later, without Ray: engines wait until such a node has the policy, rollout workers until it has the index."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from agents.types import Version
from cluster import actors, fleet, nodes
from cluster.errors import UserError
from cluster.fleet import Fleet, FleetConfig
from cluster.nodes import Node
from cluster.placement import PlacementConfig
from cluster.vllm.engine import EngineConfig

PLACE = "s3://bucket/shipped/policy-0123456789abcdef#key=policy-0123456789abcdef"


class Seat:
    """One that moves when its node is lost."""

    def __init__(self, *ids: str) -> None:
        self.ids = list(ids)

    def node(self) -> str:
        return self.ids[0]


async def furnished(monkeypatch: pytest.MonkeyPatch, seat: Seat, answers: list[Any], alive: bool = True) -> Any:
    """(node, lines for the log, nodes that were asked) of an engine that starts on the seat."""
    asked: list[str] = []

    async def unpacks(node: str) -> None:
        asked.append(node)
        if answers and (problem := answers.pop(0)):
            if not alive:
                seat.ids.pop(0)
            raise problem

    monkeypatch.setattr(nodes, "on_one", lambda node, work, text: asyncio.ensure_future(unpacks(node)))
    monkeypatch.setattr(nodes, "alive", lambda _: alive)
    monkeypatch.setattr(fleet, "_UNFIT_S", 0.0)
    monkeypatch.setattr(fleet.ray, "cancel", lambda *_, **__: None)
    one = Fleet(FleetConfig(num_engines=2, max_restarts=0), EngineConfig(model=PLACE, version=Version(0, 0).label))
    found = await one._furnished(seat)  # type: ignore[arg-type]
    assert one._restarts.count == 0
    return found, await one.events(), asked


async def test_a_sampler_waits_for_a_node_that_cannot_have_the_policy_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = UserError("no room for policy in /cache")
    found, lines, asked = await furnished(monkeypatch, Seat("a" * 32), [problem, problem])
    assert found == "a" * 32 and len(asked) == 3
    assert lines == ["a sampler waits for node aaaaaaaa, or another: no room for policy in /cache; 0 of 2 engines work"]


async def test_a_node_that_is_lost_while_it_unpacks_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, lines, asked = await furnished(monkeypatch, Seat("a", "b"), [RuntimeError("node died")], alive=False)
    assert (found, lines, asked) == ("b", [], ["a", "b"])


def test_a_rollout_worker_goes_to_a_late_node_once_the_index_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [Node("home", "10.0.0.1", {}, {}), Node("late", "10.0.0.2", {}, {})]
    asked: list[str] = []
    done: list[str] = []
    monkeypatch.setattr(nodes, "living", lambda: there)
    monkeypatch.setattr(nodes, "on_one", lambda node, work, text: asked.append(node) or f"{node} {len(asked)}")
    monkeypatch.setattr(actors.ray, "wait", lambda refs, timeout: ([r for r in refs if r in done], refs))
    monkeypatch.setattr(actors.ray, "get", lambda reference: None)
    run = actors.Actors.__new__(actors.Actors)
    run._config = SimpleNamespace(placement=PlacementConfig(routers="node"))  # type: ignore[assignment]
    run._index, run._furnished, run._furnishing = PLACE, {"home"}, {}
    run._nodes = {"rollout-0": "home"}
    assert [run._next_node(), run._next_node(), asked] == ["home", "home", ["late"]]
    done.append("late 1")
    assert run._next_node() == "late" and asked == ["late"]
    run._config.placement.routers, run._furnished = "driver", set()
    assert run._next_node() == "late", "whoever asks the driver's router needs no index"
