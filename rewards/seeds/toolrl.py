"""ToolRL: how well a rollout's tool calls match reference calls, in [-3, 3], and its form, 0 or 1.

Source: ToolRL, released reward (spec 3.5). Confidence: confirmed (code). Ours: the greedy pairing runs over calls in a canonical
order, so that neither order matters even where two predictions tie; a rollout that is not malformed has the form.

Invariants: exactly the reference calls, in any order, give 3; a malformed rollout gives -3 and no point for form.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from agents.interfaces import Reward, Services
from agents.types import Group, StopReason, Task, ToolCall, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.seeds.steps import steps_of


class Call(NamedTuple):
    """A call for comparing: arguments as JSON text by key, so that 1, 1.0 and true differ as they do on the wire."""

    name: str
    arguments: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any]) -> Call:
        """From a name and its arguments."""
        pairs = ((key, json.dumps(value, sort_keys=True, default=str)) for key, value in arguments.items())
        return cls(name, tuple(sorted(pairs)))


def call_score(reference: Iterable[Call], predicted: Iterable[Call]) -> float:
    """6 * (names + pairs) / best - 3: multiset Jaccard of names, and per reference call the best unused prediction of its name,
    worth the Jaccard of parameter names plus one per equal value. 0 when there is no reference call."""
    golds, left = sorted(reference), sorted(predicted)
    if not golds:
        return 0.0
    wanted, named = Counter(g.name for g in golds), Counter(p.name for p in left)
    score = (wanted & named).total() / (wanted | named).total()
    for gold in golds:
        worth = [(_pair(gold, p), -i) for i, p in enumerate(left) if p.name == gold.name]
        if worth:
            value, index = max(worth)
            score += value
            del left[-index]
    return 6 * score / (1 + sum(1 + len(g.arguments) for g in golds)) - 3


def _pair(gold: Call, predicted: Call) -> float:
    a, b = dict(gold.arguments), dict(predicted.arguments)
    keys = len(a.keys() & b.keys()) / len(a.keys() | b.keys()) if a or b else 1.0
    return keys + len(a.items() & b.items())


def toolrl(config: RewardConfig) -> Reward:
    """The reward `toolrl`: format + calls, in [-3, 4]. Parts: format, calls, num_calls, num_reference."""

    async def score(group: Group, services: Services) -> list[Verdict]:
        reference = reference_calls(group.task)
        return [_verdict(t, reference, config.toolrl.coarse) for t in group.trajectories]

    return score


def reference_calls(task: Task) -> list[Call]:
    """The task's reference calls. Raises ValueError, one line, for one without a name or with arguments that are no mapping."""
    found = []
    for call in task.meta.get("calls", ()):
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments", {}), Mapping):  # fmt: skip
            raise ValueError(f"task {task.id!r}: meta.calls must hold {{name, arguments}} mappings, not {call!r}")
        found.append(Call.of(call["name"], call.get("arguments", {})))
    return found


def _verdict(trajectory: Trajectory, reference: Sequence[Call], coarse: bool) -> Verdict:
    if trajectory.stop.infrastructure:
        return Verdict.unavailable("calls", str(trajectory.stop))
    made: list[ToolCall] = [call for step in steps_of(trajectory) if step.action for call in step.action.calls]
    predicted = [Call.of(call.name, call.arguments) for call in made]
    formed = trajectory.stop is not StopReason.malformed
    value = call_score(reference, predicted) if formed else -3.0
    if coarse and formed and reference:
        value = 3.0 if sorted(reference) == sorted(predicted) else -3.0
    parts = {"format": float(formed), "calls": value}
    parts |= {"num_calls": float(len(predicted)), "num_reference": float(len(reference))}
    return Verdict(
        value + formed, parts, evidence=({"check": "calls", "made": [[c.name, dict(c.arguments)] for c in made]},)
    )
