"""Scores of an evaluation per unit: metrics, and the facts that summaries are made of. Pure functions of records.

Invariants:
- A unit that infrastructure failed has no scores and says why; `cluster.evaluation.summary` leaves it out and counts it. What the agent failed
  scores 0. A unit that nobody could judge keeps the scores that need no judge.
- A score that is None is undefined for its unit.
- `Scored` holds all that summaries need, so that they are made again without trajectories. Of a set that must stay hidden it holds no text of
  the agent.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agents.text import normalize_answer, stated_confidence
from agents.types import Role, Task, Trajectory, Verdict
from cluster.evaluation.comparison import ablation, compare
from cluster.evaluation.records import Judged, Played, Scored, State, Unit
from cluster.evaluation.summary import summarise
from envs.benchmarks.base import Benchmark
from rewards.metrics.base import Context, Metric, answerable, attempted, correct, cost, docs_seen, refused, tokens
from rewards.metrics.evidence import evidence_by_call, judged_docs
from rewards.metrics.factorised import sufficiency
from rewards.metrics.failures import failure_class, leaks
from rewards.metrics.samples import RIGHT

__all__ = ["ablation", "compare", "score_units", "slice_names", "summarise"]

CLOSED_BOOK, ORACLE = "closed_book", "oracle"
"""Probes. `closed_book:DOC` asks for one hop, the document DOC, alone."""
MOST_SLICE_VALUES = 24


def score_units(
    benchmark: Benchmark,
    played: Iterable[Played],
    judged: Iterable[Judged],
    metrics: Iterable[Metric],
    *,
    judge: str = "",
    slices: Sequence[str] | None = None,
) -> list[Scored]:
    """One Scored per played unit of the benchmark's tasks, in order of task and sample; of a unit's lines the last counts.

    `judge`: hash of the judge whose verdicts count; empty: a unit's last verdict. `slices`: names in `task.meta`; None: `slice_names`; what a set
    hides is never one. Facts of every unit (`state` `failed` has only the first three): `state` (scored, unjudged, failed), `error`, `tries`,
    `question` (`question_digest`), `judge` (hash; empty: none), `stop`, `correct` (None: nobody judged),
    `refused`, `attempted`, `answerable`, `answer` (empty for a secret set), `answer_class` (for votes), `confidence` (0 to 1 or None), `calls`,
    `calls_by_tool`, `turns`, `tokens_in`, `tokens_out`, `tokens`, `estimated` (whether some of these are), `cost` (None: not counted), `seconds`, `slices`, `failure`, `leaks`, `sufficient`
    (shown, opened, memory, known; None: evidence unknown), `evidence_by_call`, `distracted`, `closed_book`, `oracle` (None: not probed).
    """
    tasks = {task.id: task for task in benchmark.tasks}
    runs = {(p.unit, p.probe): p for p in played if p.unit.task in tasks}
    by_judge = {(j.unit, j.probe): j for j in judged if not judge or j.judge == judge}
    verdicts = {key: row.verdict for key, row in by_judge.items()}
    probes = _probes(runs, verdicts)
    names = slice_names(benchmark.tasks) if slices is None else slices
    names = [name for name in names if name not in benchmark.hidden]
    place = {task_id: i for i, task_id in enumerate(tasks)}
    chosen = list(metrics)
    mains = sorted((key for key in runs if not key[1]), key=lambda key: (place[key[0].task], key[0].sample))
    scored = []
    for unit, _ in mains:
        run = runs[unit, ""]
        trajectory = run.trajectory
        if run.state is State.failed or trajectory is None or trajectory.stop.infrastructure:
            error = run.error or (str(trajectory.stop) if trajectory else "no trajectory")
            scored.append(Scored(unit, {}, {"state": "failed", "error": error, "tries": run.tries}))
            continue
        task = tasks[unit.task]
        verdict = verdicts.get((unit, "")) or trajectory.verdict
        context = _context(benchmark, task, probes[unit.task, unit.config])
        scores: dict[str, float | None] = {}
        for metric in chosen:
            scores |= metric.score(task, trajectory, verdict, context)
        facts = _facts(task, run, trajectory, verdict, context, names, benchmark.secret)
        facts["judge"] = by_judge[unit, ""].judge if (unit, "") in by_judge else ""
        scored.append(Scored(unit, {name: _finite(value) for name, value in scores.items()}, facts))
    return scored


def slice_names(tasks: Sequence[Task]) -> list[str]:
    """Scalars of `task.meta` that sort a benchmark's tasks: 2 to 24 values, of which some is shared by several tasks."""
    found: dict[str, Counter[Any]] = defaultdict(Counter)
    for task in tasks:
        for name, value in task.meta.items():
            if isinstance(value, (str, int, bool)) and (not isinstance(value, str) or 0 < len(value) <= 64):
                found[name][value] += 1
    return [
        name
        for name, values in found.items()
        if 2 <= len(values) <= MOST_SLICE_VALUES and max(values.values()) > 1 and "canar" not in name.lower()
    ]


def _probes(
    runs: Mapping[tuple[Unit, str], Played], verdicts: Mapping[tuple[Unit, str], Verdict]
) -> dict[tuple[str, str], dict[str, list[bool]]]:
    """(task, config) -> probe -> whether each of its samples was right, where somebody judged."""
    found: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for (unit, probe), run in runs.items():
        if probe and run.trajectory is not None and run.state is State.done:
            right = correct(run.trajectory, verdicts.get((unit, probe)) or run.trajectory.verdict)
            if right is not None:
                found[unit.task, unit.config][probe].append(right)
    return found


def _context(benchmark: Benchmark, task: Task, probes: Mapping[str, Sequence[bool]]) -> Context:
    def majority(probe: str) -> bool | None:
        found = probes.get(probe, ())
        return 2 * sum(found) > len(found) if found else None

    hops = {probe.partition(":")[2]: majority(probe) for probe in probes if probe.startswith(f"{CLOSED_BOOK}:")}
    return Context(
        {name: grades[task.id] for name, grades in benchmark.qrels.items() if task.id in grades},
        frozenset(doc for doc, right in hops.items() if right) if hops else None,
        majority(CLOSED_BOOK),
        majority(ORACLE),
    )


def _facts(
    task: Task,
    run: Played,
    trajectory: Trajectory,
    verdict: Verdict | None,
    context: Context,
    slices: Sequence[str],
    secret: bool,
) -> dict[str, Any]:
    right = correct(trajectory, verdict)
    read, written = tokens(trajectory)
    percent = stated_confidence(trajectory.message)
    said = normalize_answer(trajectory.answer or trajectory.message)
    wanted = set(judged_docs(task, context))
    return {
        "question": question_digest(task),
        "state": "unjudged" if right is None and (verdict is None or verdict.masked) else "scored",
        "error": run.error,
        "tries": run.tries,
        "stop": str(trajectory.stop),
        "correct": right,
        "refused": refused(trajectory),
        "attempted": attempted(trajectory),
        "answerable": answerable(task),
        "answer": "" if secret else trajectory.answer,
        "answer_class": RIGHT if right else _digest(said) if attempted(trajectory) else None,
        "confidence": None if percent is None else percent / 100,
        "calls": len(trajectory.events),
        "calls_by_tool": dict(sorted(Counter(event.call.name for event in trajectory.events).items())),
        "turns": sum(turn.role is Role.policy for turn in trajectory.turns),
        "tokens_in": read,
        "tokens_out": written,
        "tokens": read + written,
        "estimated": any(turn.usage is not None and turn.usage.estimated for turn in trajectory.turns),
        "cost": cost(trajectory),
        "seconds": float(run.seconds.get("total", sum(run.seconds.values()))),
        "slices": {name: task.meta[name] for name in slices if name in task.meta},
        "failure": failure_class(task, trajectory, verdict, context),
        "leaks": list(leaks(task, trajectory)),
        "sufficient": sufficiency(task, trajectory, context),
        "evidence_by_call": evidence_by_call(task, trajectory, context),
        "distracted": bool(docs_seen(trajectory) - wanted) if wanted else False,
        "closed_book": context.closed_book,
        "oracle": context.oracle,
    }


def question_digest(task: Task) -> str:
    """Tells whether two runs asked and judged the same: question and answers, without what a setting adds to the question."""
    asked = str(task.meta.get("asked") or task.question)
    return _digest("\x00".join((asked, *sorted(task.answers))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
