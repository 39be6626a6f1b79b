"""Outcome: is the exact answer right? By rule (any alias, after normalisation), by F1 with the best alias, or by a judge.

Invariants:
- Lost to infrastructure: unavailable, hence masked. Malformed, over-long or without a final message: 0, and no judge is
  asked. A judge nobody could reach masks; a judge whose reply cannot be used gives 0.
- A task without answers is unanswerable: a refusal is right, anything else wrong; no judge is needed.

Sources: exact match and F1 as Search-R1 (spec 5); judged outcome as CaRR (spec 3.0), with a structured reply; credit for entities as
E-GRPO (arXiv 2510.24694; inferred from CaRR's account of it as a baseline: how that was implemented is not published).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agents.interfaces import Judge, Reward, Services
from agents.text import cut_references, exact_match, f1, is_refusal, ngrams, words
from agents.types import Group, JudgeReply, JudgeRequest, Status, StopReason, Task, Trajectory, Verdict
from rewards.config import RewardConfig

OUTCOME_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"extracted_answer": {"type": ["string", "null"]}, "correct": {"type": "boolean"}},
    "required": ["extracted_answer", "correct"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Part:
    """One judged part of a verdict, before the verdict is put together."""

    value: float
    status: Status = Status.ok
    cause: str = ""
    evidence: tuple[Mapping[str, Any], ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def void_cause(trajectory: Trajectory) -> str:
    """Why a rollout scores 0 with no judge asked: its ending, or `no_message`; empty when it is to be judged."""
    if not trajectory.stop.finished:
        return str(trajectory.stop)
    return "" if trajectory.message.strip() or trajectory.answer.strip() else "no_message"


async def judge_outcome(task: Task, trajectory: Trajectory, judge: Judge | None, by: str) -> Part:
    """Outcome of a finished rollout: value 0 or 1 (`f1`: in [0, 1]), evidence for the check `outcome`, metric f1."""
    answer, reason, extracted = trajectory.answer, "", trajectory.answer
    metrics = {"f1": f1(answer, task.answers)}
    status, cause, prompts = Status.ok, "", {}
    if not task.answerable:
        correct = trajectory.stop is StopReason.refused or is_refusal(answer)
        metrics["f1"] = float(correct)
        reason = "the question has no answer; a refusal is right"
    elif by in ("rule", "f1"):
        correct = exact_match(answer, task.answers)
    else:
        if judge is None:
            raise ValueError("reward.outcome is 'judge', but there is no judge: set judge.kind, or reward.outcome=rule")
        reply = await judge.ask(outcome_request(task, trajectory))
        correct, extracted = False, ""
        status, cause, reason = reply.status, reply.cause, reply.text
        prompts = {"outcome": reply.prompt_hash} if reply.prompt_hash else {}
        if reply.status is Status.ok:
            correct, extracted, cause = _read(reply)
            status = Status.unjudgeable if cause else Status.ok
    evidence = {
        "check": "outcome",
        "by": "rule" if not task.answerable else by,
        "answer": extracted or answer,
        "gold": list(task.answers),
        "correct": correct,
        "reason": reason or cause,
    }
    value = metrics["f1"] if by == "f1" else float(correct)
    return Part(value, status, cause, (evidence,), prompts, metrics)


def outcome_request(task: Task, trajectory: Trajectory) -> JudgeRequest:
    """The request behind a judged outcome. Citations and reference lists are no part of the answer."""
    fields = {
        "question": task.question,
        "message": cut_references(trajectory.message),
        "answer": trajectory.answer,
        "answers": list(task.answers),
    }
    return JudgeRequest("outcome", fields, OUTCOME_SCHEMA, task.oracle)


def _read(reply: JudgeReply) -> tuple[bool, str, str]:
    """(correct, extracted answer, cause when the reply contradicts itself)."""
    value = reply.value if isinstance(reply.value, Mapping) else {}
    correct, extracted = value.get("correct"), value.get("extracted_answer")
    if not isinstance(correct, bool) or not (extracted is None or isinstance(extracted, str)):
        return False, "", "bad_reply"
    if correct and not (extracted or "").strip():
        return False, "", "bad_reply"  # right, yet there is no answer: whatever this is, it does not pay
    return correct, extracted or "", ""


def void_verdict(trajectory: Trajectory, parts: tuple[str, ...]) -> Verdict | None:
    """The verdict of a rollout that is not judged: masked, or zeros for `parts`; None when it has to be judged."""
    if trajectory.stop.infrastructure:
        return Verdict.unavailable("outcome", str(trajectory.stop))
    cause = void_cause(trajectory)
    if not cause:
        return None
    evidence = {"check": "outcome", "by": "rule", "answer": "", "correct": False, "reason": cause}
    return Verdict(0.0, dict.fromkeys(parts, 0.0), evidence=(evidence,))


def outcome(config: RewardConfig) -> Reward:
    """The reward `outcome`: 1 for a right exact answer, else 0 (by `f1`: the overlap). Parts: outcome, f1."""

    async def score(group: Group, services: Services) -> list[Verdict]:
        async def one(trajectory: Trajectory) -> Verdict:
            void = void_verdict(trajectory, ("outcome", "f1"))
            if void is not None:
                return void
            part = await judge_outcome(group.task, trajectory, services.judge, config.outcome)
            return to_verdict(part.value, {"outcome": part}, part.metrics)

        return credit_entities(group, await asyncio.gather(*(one(t) for t in group.trajectories)), config)

    return score


def gold_entities(task: Task) -> list[str]:
    """The hidden entities of a task, where they are known: `entities` of its oracle or of its meta, by label or as a list."""
    found = (task.oracle or {}).get("entities") or task.meta.get("entities") or ()
    return [str(name) for name in (found.values() if isinstance(found, Mapping) else found)]


def entity_share(task: Task, trajectory: Trajectory) -> float:
    """Share of the gold entities that the policy names, as whole words, in its thoughts or its final message; 0 when none is known."""
    names = {tuple(words(name)) for name in gold_entities(task)} - {()}
    actions = [turn.action for turn in trajectory.turns if turn.action]
    texts = [words(text) for action in actions for text in (action.thought, action.message)]
    found = [name for name in names if any(name in ngrams(text, len(name)) for text in texts)]
    return len(found) / len(names) if names else 0.0


def credit_entities(group: Group, verdicts: Sequence[Verdict], config: RewardConfig) -> list[Verdict]:
    """Under `reward.reward: entity`: 1 for a right answer, else ratio * share / best share of the group; part `entities` is the share.

    Ill-formed and over-long rollouts keep 0; they and masked ones are no part of the maximum. Otherwise the verdicts stay as they are.
    """
    if config.reward != "entity":
        return list(verdicts)
    pairs = zip(group.trajectories, verdicts, strict=True)
    shares = [0.0 if void_cause(t) or v.masked else entity_share(group.task, t) for t, v in pairs]
    best = max(shares, default=0.0)
    return [
        v if v.masked else replace(
            v,
            reward=1.0 if v.parts.get("outcome", 0.0) > 0 else config.rubric_ratio * share / best if best else 0.0,
            parts={**v.parts, "entities": share},
        )
        for v, share in zip(verdicts, shares, strict=True)
    ]  # fmt: skip


def to_verdict(reward: float, parts: Mapping[str, Part], metrics: Mapping[str, float]) -> Verdict:
    """A verdict from its judged parts. A part that is unavailable is left out; one that is unjudgeable keeps the value it came with, which is
    the lowest its reward gives (0 for most)."""
    values = {name: part.value for name, part in parts.items() if part.status is not Status.unavailable}
    masked = any(part.status is Status.unavailable for part in parts.values())
    return Verdict(
        0.0 if masked else reward,
        values | dict(metrics),
        evidence=tuple(e for part in parts.values() for e in part.evidence),
        status={name: part.status for name, part in parts.items() if part.status is not Status.ok},
        causes={name: part.cause for name, part in parts.items() if part.status is not Status.ok},
        prompts={k: v for part in parts.values() for k, v in part.prompts.items()},
    )
