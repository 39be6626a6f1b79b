"""LLM-specific utility: does a given reader answer better with these passages than without?

Source: LLM-specific utility (2510.11358; spec 3.10), u = 1[acc with d > acc without]. Confidence: confirmed (notes with the formal
definition); as a reward the signed difference of mean accuracies, because the label cannot express harm (inferred).

The reader is reached as the judge: prompt `reader`, which is given a question and passages and replies with an answer; the rule for
exact answers decides. Replies are cached by content, so the run without passages is paid once per question.
Invariants: a rollout without a final message scores 0 and asks nobody; the utilities of the steps add up to the utility of everything
shown.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agents.interfaces import Judge, Reward, Services
from agents.text import exact_match, is_refusal
from agents.types import Group, JudgeRequest, Seen, Status, Task, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.outcome import Part, to_verdict, void_verdict
from rewards.seeds.steps import steps_of

READER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"answer": {"type": ["string", "null"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


PARTS = ("utility", "with_passages", "without_passages")


def marginal_utilities(accuracies: Sequence[float]) -> list[float]:
    """What each set adds to the one before; `accuracies[0]` is without passages. In [-1, 1] each, one fewer than given."""
    return [after - before for before, after in itertools.pairwise(accuracies)]


async def reader_accuracy(judge: Judge, task: Task, passages: Sequence[Seen], samples: int = 1) -> Part:
    """Share of the reader's answers that are right, given these passages alone."""
    pages = [{"number": n, "url": p.doc_id, "title": p.title, "text": p.text} for n, p in enumerate(passages, start=1)]
    replies = await asyncio.gather(
        *(
            judge.ask(
                JudgeRequest("reader", {"question": task.question, "passages": pages, "attempt": str(k)}, READER_SCHEMA)
            )
            for k in range(samples)
        )
    )
    for status in (Status.unavailable, Status.unjudgeable):
        failed = next((reply for reply in replies if reply.status is status), None)
        if failed is not None:
            return Part(0.0, status, failed.cause)
    answers = [str((r.value if isinstance(r.value, Mapping) else {}).get("answer") or "") for r in replies]
    right = [exact_match(a, task.answers) if task.answerable else not a or is_refusal(a) for a in answers]
    return Part(sum(right) / len(right), prompts={"reader": replies[0].prompt_hash} if replies[0].prompt_hash else {})


def utility(config: RewardConfig) -> Reward:
    """The reward `utility`: mean accuracy with all that was shown, minus without, in [-1, 1].

    Parts: utility, with_passages, without_passages. step_rewards: what each policy turn added (reward.utility.per_step).
    """

    async def one(task: Task, trajectory: Trajectory, judge: Judge) -> Verdict:
        steps = steps_of(trajectory)
        if any(step.lost for step in steps):
            return Verdict.unavailable("utility", "backend")
        void = void_verdict(trajectory, PARTS)
        if void is not None:
            return void
        sets: list[list[Seen]] = [[]]
        for step in steps:
            sets.append([*sets[-1], *step.seen])
        wanted = {
            len(s): s for s in (sets if config.utility.per_step else (sets[0], sets[-1]))
        }  # equal sets are asked once
        found = await asyncio.gather(
            *(reader_accuracy(judge, task, s, config.utility.samples) for s in wanted.values())
        )
        by_size = dict(zip(wanted, found, strict=True))
        accuracies = [by_size[len(s)].value for s in sets] if config.utility.per_step else []
        first, last = by_size[0], by_size[len(sets[-1])]
        worst = next(
            (p for p in found if p.status is Status.unavailable),
            next((p for p in found if p.status is not Status.ok), None),
        )
        value = 0.0 if worst else last.value - first.value
        evidence = ({"check": "utility", "passages": len(sets[-1]), "with": last.value, "without": first.value},)
        part = Part(value, worst.status if worst else Status.ok, worst.cause if worst else "", evidence, first.prompts)
        verdict = to_verdict(value, {"utility": part}, {"with_passages": last.value, "without_passages": first.value})
        return verdict if worst else replace(verdict, step_rewards=tuple(marginal_utilities(accuracies)))

    async def score(group: Group, services: Services) -> list[Verdict]:
        judge = services.judge
        if judge is None:
            raise ValueError("reward 'utility' needs a reader: set judge.kind to 'chat' or 'vllm'")
        return list(await asyncio.gather(*(one(group.task, t, judge) for t in group.trajectories)))

    return score
