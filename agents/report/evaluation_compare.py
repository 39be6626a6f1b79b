"""Two runs beside each other: the difference of each metric, and the questions whose outcome turned over.

Means and counts are taken here over the questions both runs scored; intervals and tests are the scoring stage's
(`cluster.evaluation.comparison.compare`), and are left out where nobody gave them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from agents.report import evaluation_panels as panels
from agents.report.evaluation_load import EvaluationData
from agents.report.load import number

DIGEST = "question"
"""Of the facts of a unit: a digest of its question."""
FLIPS = ("gained", "lost", "changed", "same", "alone")
"""Right only now; right only before; not the same outcome, though neither is right in full; the same; not scored in both runs."""
UNSCORED = ("lost", "unscored", "")
"""Outcomes that say nothing of the agent."""


def flip(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """How a question's outcome turned."""
    if before is None or after is None or before["outcome"] in UNSCORED or after["outcome"] in UNSCORED:
        return "alone"
    was, now = before["outcome"], after["outcome"]
    if was == now:
        return "same"
    if now == "right":
        return "gained"
    return "lost" if was == "right" else "changed"


def other_questions(before: EvaluationData, after: EvaluationData) -> set[str]:
    """Ids that both runs have but that name another question in each, as far as texts or their digests are known."""
    return {task for task in after.questions if task in before.questions and _differ(before, after, task)}


def _differ(before: EvaluationData, after: EvaluationData, task: str) -> bool:
    was, now = (
        next((d for s in run.questions[task] if isinstance(d := s.facts.get(DIGEST), str) and d), "")
        for run in (before, after)
    )
    if was and now:
        return was != now
    return task in before.tasks and task in after.tasks and _asked(before, task) != _asked(after, task)


def _asked(run: EvaluationData, task: str) -> tuple[Any, ...]:
    """Question and answers, without what a setting added to the question."""
    known = run.tasks[task]
    return (known.meta.get("asked") or known.question, *sorted(known.answers))


def comparison(
    before: EvaluationData,
    after: EvaluationData,
    compared: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    others: Collection[str] = (),
) -> dict[str, Any]:
    """What the page says of two runs: a row per metric, and how many questions turned which way."""
    main = panels.main_metric(after.summary)
    found = panels.mapping(compared or {}, "metrics") or _means(before, after, others)
    made: list[dict[str, Any]] = []
    for name, row in sorted(found.items(), key=lambda item: item[0] != main):
        was, now, p = number(row, "a"), number(row, "b"), number(row, "p")
        if was is None or now is None:
            continue
        made.append(
            {
                "name": panels.title(name), "main": name == main, "good": None if row.get("direction") == "none" else (now > was) is (row.get("direction") != "lower"),
                "direction": row.get("direction"), "before": was, "after": now, "difference": now - was, "low": number(row, "low"), "high": number(row, "high"),
                "p": p, "test": str(row.get("test", "")), "n": number(row, "n"), "better": number(row, "better"), "worse": number(row, "worse"),
                "sure": p is not None and p < 0.05,
            }
        )  # fmt: skip
    turned = Counter(r["flip"] for r in rows)
    return {
        "rows": made,
        "notes": [n for n in notes if isinstance(n, str)]
        if isinstance(notes := (compared or {}).get("notes"), list)
        else [],
        "different": int(number(compared or {}, "different") or 0),
        "tested": any(r["p"] is not None for r in made),
        "turned": [(k, turned[k]) for k in FLIPS if turned[k]],
    }


def _means(before: EvaluationData, after: EvaluationData, others: Collection[str]) -> dict[str, dict[str, Any]]:
    """Per metric the means over the questions that both runs scored."""
    names = {name for found in after.questions.values() for s in found for name in s.scores}
    made: dict[str, dict[str, Any]] = {}
    for name in sorted(names):
        pairs = [
            (_mean(before, task, name), _mean(after, task, name)) for task in after.questions if task not in others
        ]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        if both:
            a, b = (sum(values) / len(both) for values in zip(*both, strict=True))
            made[name] = {"a": a, "b": b, "n": len(both)}
    return made


def _mean(run: EvaluationData, task: str, metric: str) -> float | None:
    values = [v for s in run.questions.get(task, ()) if (v := s.scores.get(metric)) is not None]
    return sum(values) / len(values) if values else None
