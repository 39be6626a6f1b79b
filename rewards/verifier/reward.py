"""The reward `verifier`: a verifier's reply against gold labels, in an environment of one turn.

    reward = 0.35 F1 + 0.35 exact + 0.20 reasoning + 0.10 form, and 0 when F1 is 0 or the labels cannot be read; then
             + min(-(L - (max_response - buffer)) / buffer * factor, 0) for a reply of L tokens

F1 is the mean over the three labels of each one's F1 within the reply. Source: arXiv 2510.14660, published code (confirmed), with another
reader: `rewards.verifier.reply`. A task's gold labels and the form it asks for stand in its oracle, which no prompt shows.

Invariants: no judge is asked; between overlong_factor * -1 and the sum of the weights; a reply that was cut off earns its penalty alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agents.interfaces import Reward, Services
from agents.types import Group, Task, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.verifier.config import FORMS, VerifierConfig
from rewards.verifier.reply import LABELS, read_any, read_labels, split_reply

PARTS = ("outcome", "f1", "reasoning", "form", "overlong")
"""`outcome`: all labels right (the term `exact`)."""


def verifier(config: RewardConfig) -> Reward:
    """The reward `verifier`. A task without gold labels is masked: it is a mistake of whoever made the tasks."""

    async def score(group: Group, services: Services) -> list[Verdict]:
        return [_verdict(group.task, t, config.verifier) for t in group.trajectories]

    return score


def _verdict(task: Task, trajectory: Trajectory, config: VerifierConfig) -> Verdict:
    if trajectory.stop.infrastructure:
        return Verdict.unavailable("outcome", str(trajectory.stop))
    gold, form = _gold(task)
    if not gold:
        return Verdict.unavailable("outcome", "no_gold_labels")
    parts = score_reply(trajectory.message if trajectory.stop.finished else "", gold, form, config)
    parts["overlong"] = overlong(int(trajectory.mask.sum()), config)
    reward = parts.pop("reward") + parts["overlong"]
    _, text = split_reply(trajectory.message)
    note = {"check": "labels", "gold": gold, "form": form, "labels": read_any(text), "stop": str(trajectory.stop)}
    return Verdict(reward, parts, evidence=(note,))


def _gold(task: Task) -> tuple[list[str], str]:
    oracle: Mapping[str, Any] = task.oracle or {}
    labels, form = oracle.get("labels"), oracle.get("form")
    fits = isinstance(labels, list | tuple) and labels and all(label in LABELS for label in labels) and form in FORMS
    return (list(labels), str(form)) if fits and labels is not None else ([], "")


def score_reply(text: str, gold: Sequence[str], form: str, config: VerifierConfig) -> dict[str, float]:
    """`reward` of one reply without the penalty for its length, and the terms it consists of."""
    reasoning, labels_text = split_reply(text)
    found = read_any(labels_text)
    zero = dict.fromkeys(("reward", "outcome", "f1", "reasoning", "form"), 0.0)
    if found is None or len(found) != len(gold):
        return zero
    f1 = batch_f1(gold, found, config.absent)
    if f1 == 0:
        return zero
    exact, fits = float(found == list(gold)), float(read_labels(labels_text, form) is not None)
    reward = (
        config.f1_weight * f1
        + config.exact_weight * exact
        + config.reasoning_weight * reasoning
        + config.form_weight * fits
    )
    return {"reward": reward, "outcome": exact, "f1": f1, "reasoning": reasoning, "form": fits}


def batch_f1(gold: Sequence[str], found: Sequence[str], absent: str = "one") -> float:
    """Mean over the labels of each one's F1 in one reply; a label that occurs nowhere has 1, or with `skip` does not count."""
    scores = []
    for label in LABELS:
        total = list(gold).count(label) + list(found).count(label)
        both = sum(g == f == label for g, f in zip(gold, found, strict=True))
        if total or absent == "one":
            scores.append(2 * both / total if total else 1.0)
    return sum(scores) / len(scores)


def overlong(num_tokens: int, config: VerifierConfig) -> float:
    """The penalty for length, at most 0."""
    if not config.overlong_buffer:
        return 0.0
    excess = num_tokens - (config.max_response - config.overlong_buffer)
    return min(-excess / config.overlong_buffer * config.overlong_factor, 0.0)
