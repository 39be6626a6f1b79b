"""Nuggets as rubrics: R(q, y) = sum_i w_i V(q, y, r_i) / sum_j w_j over the nuggets r_i of a task (arXiv 2510.14660).

A judge labels every nugget against the final message: support, partial_support, not_support, or contradiction, which is told apart from
absence. A message longer than a block is cut at paragraphs and each nugget keeps its most supportive label. A task without nuggets
has its answer as its only rubric (short form), and what is judged is the marked answer, or the whole message where none is marked.

Confidence: the formula and the three labels are confirmed (secondary sources of the paper); label values, weights, and "exact match or
verifier" in the short form are inferred from TREC RAG and the paper's tables. The four TREC scores are those of castorini/nuggetizer.

Invariants:
- With the default values R is in [0, 1]; it never falls when a label becomes more supportive, and depends neither on the order of blocks nor
  on the scale of weights. No nuggets, or weights that are all 0: R is 0.
- A judge that cannot be reached masks the rollout. One reply that cannot be used, whatever other calls said, and a rollout with nothing to
  judge earn what the worst labels would, and 0 at most (`lowest`): to break the judge never pays. Replies are keyed, never counted off.
- The short form is judged in one call: of several answers in one message, a block with the right one alone cannot be the one that counts.
- Where orders of the nuggets disagree about a label, the least supportive counts: a lucky order never pays.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agents.interfaces import Judge, Reward, Services
from agents.text import cut_references, exact_match
from agents.types import Group, JudgeReply, JudgeRequest, Nugget, Status, Task, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.judges.sanitise import hollow
from rewards.nuggets.config import NuggetConfig
from rewards.outcome import Part, judge_outcome, to_verdict, void_verdict
from rewards.schemas import keyed_schema

SUPPORT, PARTIAL, NOT, CONTRADICTION = "support", "partial_support", "not_support", "contradiction"
LABELS = (SUPPORT, PARTIAL, NOT, CONTRADICTION)
SHORT_LABELS = (SUPPORT, NOT)
MERGE_ORDER = (NOT, CONTRADICTION, PARTIAL, SUPPORT)
"""What a later entry says of one block outweighs what an earlier one says of another. Silence elsewhere does not hide a contradiction."""
WORST_FIRST = (CONTRADICTION, NOT, PARTIAL, SUPPORT)
MAX_PER_CALL = 10
TREC = ("strict_all", "all", "strict_vital", "vital")
PARTS = ("nugget", "outcome", "f1", *TREC, "supported", "partial", "contradicted", "num_nuggets")
"""Parts of a verdict: the score R (or the one that is configured), the outcome, TREC's four scores, and counts. With
`shuffles`, also `consistency`: the share of nuggets with one label under all orders."""


def nugget(config: RewardConfig) -> Reward:
    """The reward `nugget`. The outcome beside it is for the log: of the exact answer, or in long form 1 with all vital nuggets (where none
    is vital: with all)."""

    async def score(group: Group, services: Services) -> list[Verdict]:
        judge = services.judge
        if judge is None:
            raise ValueError("reward 'nugget' needs a judge: set judge.kind to 'rule', 'chat' or 'vllm'")

        async def one(trajectory: Trajectory) -> Verdict:
            void = void_verdict(trajectory, PARTS)
            task = group.task
            if void is not None:
                floor = lowest(task, config.nugget)
                return void if void.masked else replace(void, reward=floor, parts={**void.parts, "nugget": floor})
            if not task.answers and not task.nuggets:  # unanswerable: a refusal is all there is to say
                part = await judge_outcome(task, trajectory, judge, config.outcome)
                return to_verdict(part.value, {"outcome": part}, {**part.metrics, "nugget": part.value})
            asked = [judge_nuggets(task, trajectory.message, trajectory.answer, judge, config.nugget)]
            asked += [judge_outcome(task, trajectory, judge, config.outcome)] if task.answers else []
            found = await asyncio.gather(*asked)
            part = found[0]
            needed = "strict_vital" if any(n.importance == "vital" for n in task.nuggets) else "strict_all"
            outcome = found[1] if task.answers else Part(float(part.metrics[needed] == 1.0), part.status, part.cause)
            return to_verdict(part.value, {"nugget": part, "outcome": outcome}, {**outcome.metrics, **part.metrics})

        return list(await asyncio.gather(*(one(t) for t in group.trajectories)))

    return score


async def judge_nuggets(task: Task, message: str, answer: str, judge: Judge, config: NuggetConfig) -> Part:
    """The score of one message, with evidence: a row per nugget. Metrics are TREC's scores and counts."""
    nuggets, short = rubric_set(task, config)
    texts = [n.text for n in nuggets]
    if short and config.exact and nuggets and exact_match(answer, task.answers):
        return _part(nuggets, [[SUPPORT]], {}, "the exact answer matches", config)
    extra = {"answer": answer, "answers": list(task.answers)} if short else {}
    told = cut_references(message)
    blocks = [answer.strip() or told] if short else cut_blocks(told, config.block_chars)
    orders, rng = [list(range(len(texts)))], random.Random(f"{task.id} {message}")
    while len(orders) < min(1 + config.shuffles, math.factorial(len(texts))):
        order = rng.sample(orders[0], len(texts))
        orders += [order] if order not in orders else []
    chunks = [
        (number, block, order[i : i + config.per_call])
        for number, order in enumerate(orders)
        for block in blocks
        for i in range(0, len(order), config.per_call)
    ]
    requests = [
        assign_request(task, block, [texts[i] for i in chunk], short, extra, config.prompt)
        for _, block, chunk in chunks
    ]
    replies = await asyncio.gather(*(judge.ask(request) for request in requests))
    labels = [[NOT] * len(texts) for _ in orders]
    prompts = {r.prompt: a.prompt_hash for r, a in zip(requests, replies, strict=True) if a.prompt_hash}
    failures = []
    for (number, _, chunk), request, reply in zip(chunks, requests, replies, strict=True):
        found = read_labels(reply, request)
        if found is None:
            failures.append(JudgeReply(Status.unjudgeable, cause="bad_reply") if reply.status is Status.ok else reply)
            continue
        for index, label in zip(chunk, found, strict=True):
            labels[number][index] = merge_labels([labels[number][index], label])
    reasons = "\n".join(dict.fromkeys(r.text for r in replies if r.text))
    if failures:
        worst = next((f for f in failures if f.status is Status.unjudgeable), failures[0])
        note = ({"check": "nuggets", "text": worst.text or worst.cause},)
        value = lowest(task, config) if worst.status is Status.unjudgeable else 0.0
        return Part(value, worst.status, worst.cause, note, prompts, dict.fromkeys(TREC, 0.0))
    return _part(nuggets, labels, prompts, reasons, config)


def _part(
    nuggets: Sequence[Nugget],
    orders: Sequence[Sequence[str]],
    prompts: Mapping[str, str],
    reasons: str,
    config: NuggetConfig,
) -> Part:
    labels = [min(seen, key=WORST_FIRST.index) for seen in zip(*orders, strict=True)]
    weights = [weight_of(n, config) for n in nuggets]
    values = label_values(config)
    rows: list[dict[str, Any]] = [
        {
            "nugget": n.text, "importance": n.importance, "weight": w, "label": label, "supported": label == SUPPORT, "docs": list(n.doc_ids),
        }
        for n, w, label in zip(nuggets, weights, labels, strict=True)
    ]  # fmt: skip
    trec = trec_scores(labels, [n.importance == "vital" for n in nuggets])
    counts = {"supported": SUPPORT, "partial": PARTIAL, "contradicted": CONTRADICTION}
    metrics = (
        trec
        | {name: float(labels.count(label)) for name, label in counts.items()}
        | {"num_nuggets": float(len(labels))}
    )
    if len(orders) > 1:
        steady = [len(set(seen)) == 1 for seen in zip(*orders, strict=True)]
        metrics["consistency"] = sum(steady) / len(steady)
        for row, seen in zip(rows, zip(*orders, strict=True), strict=True):
            row["orders"] = list(seen)
    if not nuggets:
        reasons = "the task has no nuggets"
    note = [{"check": "nuggets", "text": reasons}] if reasons else []
    value = nugget_reward(labels, weights, values) if config.score == "weighted" else trec[config.score]
    return Part(value, evidence=(*rows, *note), prompts=prompts, metrics=metrics)


# ---------------------------------------------------------------------------------------------------- the core


def nugget_reward(labels: Sequence[str], weights: Sequence[float], values: Mapping[str, float]) -> float:
    """R = sum_i w_i V_i / sum_j w_j; 0 when there are no nuggets or all weights are 0."""
    total = sum(weights)
    return sum(w * values[label] for w, label in zip(weights, labels, strict=True)) / total if total > 0 else 0.0


def lowest(task: Task, config: NuggetConfig) -> float:
    """What the worst label for each nugget of a task would earn, and 0 at most."""
    nuggets, short = rubric_set(task, config)
    if config.score != "weighted":
        return 0.0
    worst = min(label_values(config)[label] for label in (SHORT_LABELS if short else LABELS))
    return min(0.0, worst) if any(weight_of(n, config) for n in nuggets) else 0.0


def trec_scores(labels: Sequence[str], vital: Sequence[bool]) -> dict[str, float]:
    """TREC RAG's scores: strict counts support only, the others count partial support half; 0 for an empty set."""
    chosen = [label for label, is_vital in zip(labels, vital, strict=True) if is_vital]

    def share(of: Sequence[str], half: float) -> float:
        return (of.count(SUPPORT) + half * of.count(PARTIAL)) / len(of) if of else 0.0

    return dict(zip(TREC, (share(labels, 0), share(labels, 0.5), share(chosen, 0), share(chosen, 0.5)), strict=True))


def merge_labels(labels: Sequence[str]) -> str:
    """One nugget's label over several blocks: the most supportive."""
    return max(labels, key=MERGE_ORDER.index, default=NOT)


def label_values(config: NuggetConfig) -> dict[str, float]:
    """V by label."""
    return dict(zip(LABELS, (config.support, config.partial, config.not_support, config.contradiction), strict=True))


def weight_of(item: Nugget, config: NuggetConfig) -> float:
    """Whatever is not vital counts as okay, as in TREC."""
    return config.vital if item.importance == "vital" else config.okay


def rubric_set(task: Task, config: NuggetConfig) -> tuple[tuple[Nugget, ...], bool]:
    """(rubrics of a task, whether that is the short form: the answer as the only one)."""
    if config.short_form == "always" or (config.short_form == "auto" and not task.nuggets):
        if not task.answers:
            return task.nuggets, False
        first, *others = task.answers
        aliases = f" (also written: {'; '.join(others)})" if others else ""
        return (Nugget(f"The answer is: {first}{aliases}"),), True
    return task.nuggets, False


def cut_blocks(message: str, most: int) -> list[str]:
    """The message in blocks of at most `most` characters, cut between paragraphs where that is possible, else between lines or words.

    Blocks without content are left out when others have some; together the blocks hold every word.
    """
    blocks, rest = [], message.strip()
    while len(rest) > most:
        ends = (rest.rfind(mark, 1, most + 1) for mark in ("\n\n", "\n", " "))
        end = next((e for e in ends if e > 0), most)
        blocks.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    blocks.append(rest)
    return [b for b in blocks if not hollow(b)] or blocks[:1]


# ---------------------------------------------------------------------------------------------------- requests


def assign_request(
    task: Task,
    passage: str,
    texts: Sequence[str],
    short: bool = False,
    extra: Mapping[str, Any] | None = None,
    prompt: str = "nugget_assign",
) -> JudgeRequest:
    """Which of up to ten nuggets does a passage hold? Reply: N1..Nn -> label. `extra` fields are for rule judges."""
    keyed = {f"N{i}": text for i, text in enumerate(texts, start=1)}
    fields = {"question": task.question, "passage": passage, "nuggets": keyed, **(extra or {})}
    schema = keyed_schema(keyed, {"type": "string", "enum": list(SHORT_LABELS if short else LABELS)})
    return JudgeRequest("nugget_short" if short else prompt, fields, schema, task.oracle)


def read_labels(reply: JudgeReply, request: JudgeRequest) -> list[str] | None:
    """The labels of a reply in the order of the request's nuggets, or None when it failed or does not fit."""
    keys, value = request.schema["required"], reply.value
    if reply.status is not Status.ok or not isinstance(value, Mapping) or set(value) != set(keys):
        return None
    allowed = request.schema["properties"][keys[0]]["enum"] if keys else ()
    return [value[key] for key in keys] if all(value[key] in allowed for key in keys) else None
