"""The nodes of the cluster: which live, what each has, and work done once on each of them.

Invariants: a node is known by Ray's id, so one that came back is another node; one whose raylet takes no connection does not live,
whatever Ray has noticed by now; work on a node never runs on a different one, and
what a node does not answer in time is a line beside its id, not a wait.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import one_line

_CONNECT_S = 2.0
PATIENCE_S = 60.0
"""For a small piece of work on a node, the start of a process included."""


@dataclass(frozen=True)
class Node:
    """A node that lives."""

    id: str
    """Ray's, as hexadecimal."""
    name: str
    """Its address, for people."""
    total: Mapping[str, float]
    """What it has, by resource."""
    free: Mapping[str, float]
    """What nobody has been given."""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one node said."""

    node: Node
    value: Any = None
    problem: str = ""
    """Why there is no value, in one line."""


def living() -> list[Node]:
    """The nodes that live now, that of this process first."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    found = [
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"], free.get(n["NodeID"], {}), n.get("Labels") or {})
        for n in ray.nodes()
        if _lives(n)
    ]
    mine = here()
    return sorted(found, key=lambda n: (n.id != mine, n.name, n.id))


def here() -> str:
    """Id of the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def alive(node_id: str) -> bool:
    """Whether that node lives."""
    import ray

    return any(_lives(n) for n in ray.nodes() if n["NodeID"] == node_id)


def given_up(node_id: str) -> bool:
    """Whether Ray has declared that node dead, which it never takes back."""
    import ray

    return any(n["NodeID"] == node_id and not n["Alive"] for n in ray.nodes())


def _lives(entry: Mapping[str, Any]) -> bool:
    """Ray takes some seconds to notice the death of a node; that nobody listens there is seen at once."""
    if not entry["Alive"]:
        return False
    try:
        with socket.create_connection((entry["NodeManagerAddress"], entry["NodeManagerPort"]), _CONNECT_S):
            return True
    except OSError:
        return False


def bound_to(node_id: str, *, soft: bool = False) -> dict[str, Any]:
    """Options of an actor or task that runs on that node. `soft`: on another one where it is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=soft)}


def on_one(node_id: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """A reference to what `work(*arguments)` returns on that node. It is not tried again when the node is lost."""
    import ray

    return ray.remote(work).options(num_cpus=0, max_retries=0, **bound_to(node_id)).remote(*arguments)


def on_each(
    nodes: Sequence[Node], work: Callable[..., Any], *arguments: Any, timeout_s: float = PATIENCE_S
) -> list[Answer]:
    """What `work(*arguments)` returns on each of the nodes; they work side by side."""
    import ray

    if not nodes:
        return []
    asked = {on_one(node.id, work, *arguments): node for node in nodes}
    ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    answers = []
    for reference, node in asked.items():
        try:
            answers.append(Answer(node, ray.get(reference, timeout=0)))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            answers.append(Answer(node, problem=f"no answer within {timeout_s:g} s"))
        except ray.exceptions.RayError as error:
            answers.append(Answer(node, problem=one_line(error)[:300]))
    return answers
