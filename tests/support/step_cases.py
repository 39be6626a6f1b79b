"""Trajectories of several policy turns, written by hand: each turn with its action and what its calls showed."""

from __future__ import annotations

from collections.abc import Sequence

from agents.text import exact_answer
from agents.types import (
    Action,
    ActionKind,
    Generation,
    Identity,
    Member,
    Role,
    Seen,
    SeenKind,
    Span,
    StopReason,
    ToolCall,
    ToolEvent,
    Trajectory,
    Turn,
    Uid,
    Version,
)

Move = Action | tuple[str, Sequence[str]]
"""A final or malformed action, or a search: its query and the texts it showed."""


def answer(text: str) -> Action:
    """A final message with this exact answer."""
    message = f"## Exact Answer\n{text}"
    return Action(ActionKind.answer, message=message, answer=exact_answer(message))


MALFORMED = Action(ActionKind.malformed, error="?")


def walk(*moves: Move, stop: StopReason = StopReason.answered, tokens: int = 2, error: str = "") -> Trajectory:
    """A trajectory; every policy turn samples `tokens` tokens. `error`: of every tool event."""
    turns = [Turn.given(0, -1, Role.prompt, [1])]
    events: list[ToolEvent] = []
    for move in moves:
        action = (
            move if isinstance(move, Action) else Action(ActionKind.call, (ToolCall("search", {"query": move[0]}),))
        )
        sampled = Generation(
            (5,) * tokens, (-0.1,) * tokens, (Span(0, tokens, Version(0, 0)),) if tokens else (), "stop"
        )
        turns.append(Turn.sampled(len(turns), len(turns) - 1, sampled, action))
        if not isinstance(move, Action):
            seen = tuple(Seen(f"d{len(text)}", text, SeenKind.snippet) for text in move[1])
            events.append(ToolEvent(action.calls[0], "\n".join(move[1]), seen, error, turn_id=turns[-1].id))
            turns.append(Turn.given(len(turns), len(turns) - 1, Role.observation, [2]))
    return Trajectory(Identity("run", Uid("t", "g", 0), "tools", "tok", "tpl"), tuple(turns), stop, tuple(events))


def calls(*made: ToolCall, stop: StopReason = StopReason.answered) -> Trajectory:
    """A trajectory that makes these calls in one turn and answers."""
    return walk(Action(ActionKind.call, made), answer("x"), stop=stop)


def members(*trajectories: Trajectory) -> tuple[Member, ...]:
    return tuple(Member(t) for t in trajectories)
