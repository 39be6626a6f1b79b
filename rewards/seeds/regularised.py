"""R^3, regularised relevance: relevance of a message, discounted where it is short or repeats itself.

Source: R^3 (spec 3.6). Confidence: inferred, from the abstract and from memory: open-ended rel * min(1, words / target) * distinct;
closed-ended rel(reference answer) * distinct, with distinct = different 3-grams / 3-grams. Ours: `words` counts *different* words,
because with all words a short answer gains by being said twice (length doubles, and the seam adds new 3-grams).

Invariant: saying the same again never raises the reward; it is in [0, 1] and never above the relevance.
"""

from __future__ import annotations

import asyncio

from agents.interfaces import Reward, Services
from agents.text import cut_references, ngrams, strip_citations, words
from agents.types import Group, Task, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.outcome import Part, to_verdict, void_verdict
from rewards.seeds.steps import ask_relevance

PARTS = ("relevance", "distinct", "length")


def distinct_share(text: str, n: int = 3) -> float:
    """Different n-grams of words / n-grams; 1 for a text with fewer than n words."""
    found = words(text)
    return len(ngrams(found, n)) / (len(found) - n + 1) if len(found) >= n else 1.0


def length_share(text: str, target_words: int) -> float:
    """min(1, different words / target)."""
    return min(1.0, len(set(words(text))) / target_words)


def regularised(config: RewardConfig) -> Reward:
    """The reward `regularised`. Parts: relevance (by a judge), distinct, length (1 where closed)."""
    settings = config.regularised

    async def one(task: Task, trajectory: Trajectory, services: Services) -> Verdict:
        void = void_verdict(trajectory, PARTS)
        if void is not None:
            return void
        text = strip_citations(cut_references(trajectory.message or trajectory.answer))
        closed = settings.kind == "closed" or (settings.kind == "auto" and task.answerable)
        to = {"reference": list(task.answers)} if closed else {"question": task.question}
        fields = {"to": to, "text": text}
        relevance = await ask_relevance(services.judge, "relevance", fields, task.oracle)
        distinct, length = distinct_share(text), 1.0 if closed else length_share(text, settings.target_words)
        parts: dict[str, Part] = {"relevance": relevance}
        return to_verdict(relevance.value * distinct * length, parts, {"distinct": distinct, "length": length})

    async def score(group: Group, services: Services) -> list[Verdict]:
        return list(await asyncio.gather(*(one(group.task, t, services) for t in group.trajectories)))

    return score
