"""R3-RAG: relevance of what each step retrieved, scaled by how the rollout ended, and a reward for its last step.

Source: R3-RAG, released process and outcome reward (spec 3.3). Confidence: confirmed (code), with two changes of ours: a step whose
reply cannot be used earns 0 (released: 0.6 where documents came back, so breaking the judge pays), and what one number of a
rollout is, for algorithms without credit per step, is the mean over its steps (inferred).

Invariants: step_rewards has one entry per policy turn; a step that was shown nothing earns 0 and asks nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from agents.interfaces import Judge, Reward, Services
from agents.types import ActionKind, Group, Status, StopReason, Task, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.guards.master_keys import is_master_key
from rewards.outcome import Part, judge_outcome, to_verdict, void_cause
from rewards.seeds.config import R3RagConfig
from rewards.seeds.steps import Step, ask_relevance, mean_part, steps_of


def r3_rewards(relevances: Sequence[float], ending: str, config: R3RagConfig) -> list[float]:
    """Rewards of the retrieval steps and of the step that ends the rollout.

    `ending`: `right` or `wrong` (one more entry: the answer), `malformed` (one more: the broken step), `unanswered` (none more).
    """
    scale = {"right": config.right, "wrong": config.wrong, "unanswered": config.unanswered}.get(ending, 1.0)
    last = {"right": [config.answer], "wrong": [0.0], "malformed": [config.malformed]}.get(ending, [])
    return [scale * value for value in relevances] + last


def r3_rag(config: RewardConfig) -> Reward:
    """The reward `r3_rag`. Parts: outcome, f1, relevance (mean over retrieval steps), steps."""

    async def one(task: Task, trajectory: Trajectory, services: Services) -> Verdict:
        if trajectory.stop.infrastructure:
            return Verdict.unavailable("outcome", str(trajectory.stop))
        outcome = Part(0.0)
        if not void_cause(trajectory):
            outcome = await judge_outcome(task, trajectory, services.judge, config.outcome)
        steps = steps_of(trajectory)
        judged = await asyncio.gather(
            *(_relevance(task, steps, i, services.judge, config.r3_rag) for i in range(len(steps)))
        )
        ending = "malformed" if trajectory.stop is StopReason.malformed else "unanswered"
        if trajectory.stop.finished:  # also with an empty message: to say nothing must not pay more than to be wrong
            ending = "right" if outcome.value == 1.0 else "wrong"
        scores = [_step_reward(step, i == len(steps) - 1, part, ending, config.r3_rag) for i, (step, part) in enumerate(zip(steps, judged, strict=True))]  # fmt: skip
        parts = {"outcome": outcome, "relevance": mean_part([part for part in judged if part is not None])}
        reward = sum(scores) / len(scores) if scores else 0.0
        metrics = {"f1": outcome.metrics.get("f1", 0.0), "steps": float(len(steps))}
        verdict = to_verdict(reward, parts, metrics)
        return verdict if verdict.masked else replace(verdict, step_rewards=tuple(scores))

    async def score(group: Group, services: Services) -> list[Verdict]:
        return list(await asyncio.gather(*(one(group.task, t, services) for t in group.trajectories)))

    return score


def _step_reward(step: Step, last: bool, relevance: Part | None, ending: str, config: R3RagConfig) -> float:
    if relevance is not None:
        return r3_rewards([relevance.value], ending, config)[0]
    if step.action is not None and step.action.kind is ActionKind.malformed:
        cut_off = last and ending == "unanswered"  # out of room in mid-sentence: no error of form
        return 0.0 if cut_off else config.malformed
    return (r3_rewards([], ending, config) or [0.0])[0] if last else 0.0


async def _relevance(
    task: Task, steps: Sequence[Step], index: int, judge: Judge | None, config: R3RagConfig
) -> Part | None:
    """Relevance of what a step retrieved; None for a step that calls nothing."""
    step = steps[index]
    if step.action is None or step.action.kind is not ActionKind.call:
        return None
    if step.lost:
        return Part(0.0, Status.unavailable, "backend")
    if not step.seen or is_master_key(step.query):
        return Part(0.0)
    fields = {
        "question": task.question,
        "history": [f"{before.action.thought}\n{before.query}" for before in steps[:index] if before.action],
        "analysis": step.action.thought,
        "query": step.query,
        "documents": [
            {"number": n, "url": item.doc_id, "title": item.title, "text": item.text[: config.max_doc_chars]}
            for n, item in enumerate(step.seen, start=1)
        ],
    }
    return await ask_relevance(judge, "r3_relevance", fields, task.oracle)
