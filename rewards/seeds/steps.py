"""A trajectory as steps: one per policy turn, with what the turn asked for and what it was shown; and scores of a judge.

Invariant: there are as many steps as policy turns, in order, so `Verdict.step_rewards` lines up with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agents.interfaces import Judge
from agents.types import Action, JudgeRequest, Role, Seen, Status, Trajectory
from rewards.outcome import Part

SCORE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"relevance": {"type": "number", "minimum": 0, "maximum": 1}},
    "required": ["relevance"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Step:
    """One policy turn."""

    action: Action | None
    seen: tuple[Seen, ...] = ()
    """What its calls showed."""
    lost: bool = False
    """A call of it failed through no fault of the agent."""

    @property
    def query(self) -> str:
        """What its calls ask for, in one line."""
        calls = self.action.calls if self.action else ()
        return "; ".join(" ".join(str(value) for value in call.arguments.values()) for call in calls)


def steps_of(trajectory: Trajectory) -> list[Step]:
    """One step per policy turn."""
    found = []
    for turn in trajectory.turns:
        if turn.role is Role.policy:
            events = [event for event in trajectory.events if event.turn_id == turn.id]
            seen = tuple(item for event in events for item in event.seen)
            found.append(Step(turn.action, seen, any(event.infrastructure for event in events)))
    return found


async def ask_relevance(
    judge: Judge | None, prompt: str, fields: Mapping[str, Any], oracle: Mapping[str, Any] | None
) -> Part:
    """A judge's relevance in [0, 1]; 0 when its reply cannot be used. Raises ValueError without a judge."""
    if judge is None:
        raise ValueError(f"prompt {prompt!r} needs a judge: set judge.kind to 'chat' or 'vllm'")
    reply = await judge.ask(JudgeRequest(prompt, fields, SCORE_SCHEMA, oracle))
    prompts = {prompt: reply.prompt_hash} if reply.prompt_hash else {}
    note = ({"check": prompt, "text": reply.text or reply.cause},)
    if reply.status is not Status.ok:
        return Part(0.0, reply.status, reply.cause, note, prompts)
    value = reply.value.get("relevance") if isinstance(reply.value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        return Part(0.0, Status.unjudgeable, "bad_reply", note, prompts)
    return Part(float(value), evidence=note, prompts=prompts)


def mean_part(parts: list[Part]) -> Part:
    """The mean of judged steps as one part: unavailable when one is, unjudgeable (with 0 for those) when one is."""
    for status in (Status.unavailable, Status.unjudgeable):
        worst = next((part for part in parts if part.status is status), None)
        if worst is not None:
            break
    return Part(
        sum(part.value for part in parts) / len(parts) if parts else 0.0,
        worst.status if worst else Status.ok,
        worst.cause if worst else "",
        tuple({**dict(e), "step": i} for i, part in enumerate(parts) for e in part.evidence),
        {k: v for part in parts for k, v in part.prompts.items()},
    )
