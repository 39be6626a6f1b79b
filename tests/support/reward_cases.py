"""Rollouts and groups for reward tests, written by hand instead of sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agents.text import exact_answer, is_refusal
from agents.types import (
    Action,
    ActionKind,
    Generation,
    Group,
    Identity,
    JudgeReply,
    JudgeRequest,
    Member,
    Role,
    Seen,
    SeenKind,
    Span,
    Status,
    StopReason,
    Task,
    ToolCall,
    ToolEvent,
    Trajectory,
    Turn,
    Uid,
    Version,
)


def page(doc_id: str, text: str, kind: SeenKind = SeenKind.page) -> ToolEvent:
    """The policy was shown this text of that document."""
    return ToolEvent(ToolCall("open", {"doc_id": doc_id}), text, (Seen(doc_id, text, kind, doc_id),), turn_id=1)


def rollout(message: str, events: Sequence[ToolEvent] = (), stop: StopReason | None = None) -> Trajectory:
    """A rollout that ends with this message; the exact answer is read from it."""
    answer = exact_answer(message)
    refused = is_refusal(answer)
    action = Action(ActionKind.answer, message=message, answer=answer, refused=refused)
    sampled = Generation((5, 6), (-0.1, -0.2), (Span(0, 2, Version(0, 0)),), "stop")
    turns = (Turn.given(0, -1, Role.prompt, [1, 2]), Turn.sampled(1, 0, sampled, action))
    stop = stop or (StopReason.refused if refused else StopReason.answered)
    return Trajectory(Identity("run", Uid("t", "g", 0), "tools", "tok", "tpl"), turns, stop, tuple(events))


def group(task: Task, *rollouts: Trajectory) -> Group:
    return Group("g", task, tuple(Member(t) for t in rollouts))


class ScriptedJudge:
    """Answers by prompt id: with a value, with a status (a failure), or with what a function of the request says."""

    def __init__(self, **replies: Any) -> None:
        self.replies: Mapping[str, Any] = replies
        self.asked: list[JudgeRequest] = []

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        self.asked.append(request)
        reply = self.replies[request.prompt]
        if callable(reply) and not isinstance(reply, Status):
            reply = reply(request)
        if isinstance(reply, Status):
            return JudgeReply(reply, cause=f"test_{reply}")
        return JudgeReply(Status.ok, reply, text="because", prompt_hash="1-abc")

    def prompts(self) -> list[str]:
        return [request.prompt for request in self.asked]


class Gullible:
    """A judge that says the best its schema allows, whatever it reads. As a reader it is right once it is shown anything."""

    def __init__(self) -> None:
        self.asked: list[JudgeRequest] = []

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        self.asked.append(request)
        if request.prompt == "reader" and not request.fields["passages"]:
            return JudgeReply(Status.ok, {"answer": None})
        return JudgeReply(Status.ok, self.best(request.schema), text="correct", prompt_hash="1-abc")

    @classmethod
    def best(cls, schema: Mapping[str, Any]) -> Any:
        kinds = schema.get("type", "string")
        kind = kinds if isinstance(kinds, str) else kinds[0]
        if "enum" in schema:
            return next((v for v in schema["enum"] if v in ("support", "yes", True)), schema["enum"][0])
        if kind == "object" and "properties" not in schema:
            return {"text": cls.best(schema["additionalProperties"])}
        if kind == "object":
            return {name: cls.best(inner) for name, inner in schema["properties"].items()}
        if kind == "array":
            return [cls.best(schema["items"])]
        return {"boolean": True, "number": schema.get("maximum", 1), "integer": schema.get("maximum", 1)}.get(
            kind, "Paris"
        )
