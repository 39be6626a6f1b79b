"""An evaluation's numbers over all units. Pure functions of `Scored`; plain JSON out.

Invariants: units that infrastructure failed are in no score but counted and listed; a score that is None for a unit is left out of its mean; every
mean comes with how many units and questions it is over; intervals are drawn from a seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agents.types import StopReason
from cluster.evaluation.records import Judged, Scored, Unit
from cluster.evaluation.sealing import all_canaries
from envs.benchmarks.base import Benchmark
from rewards.metrics.answers import GRADES, simpleqa_summary
from rewards.metrics.base import Metric
from rewards.metrics.budgets import budgets, cost_per_correct, mean_at, score_at
from rewards.metrics.calibration import calibration
from rewards.metrics.factorised import Row, panel
from rewards.metrics.failures import CLASSES
from rewards.metrics.registry import COUNTS, EFFORT, METRICS
from rewards.metrics.samples import maj_at_k, pass_at_k, pass_hat_k
from rewards.metrics.stats import detectable, interval, krippendorff, margin

SCHEMA = 1
MAIN = "accuracy"


def summarise(
    benchmark: Benchmark, scored: Sequence[Scored], *, judged: Iterable[Judged] = (), seed: int = 0, samples: int = 0
) -> dict[str, Any]:
    """The numbers of an evaluation of so many `samples` per question (0: the most that any has). "A mean" is `{mean, low, high, n, questions,
    interval}`: mean and 95 % interval over n units of so many questions; `interval` says how (`rewards.metrics.stats.interval`).

    - `schema`, `benchmark`, `secret`, `hidden` (reports show no text: secret, or with a canary), `notes`, `config`: hashes of the units' settings (more than one: they are mixed)
    - `main`: the score that leads: that of the first of the benchmark's metrics which has values or waits for a judge (then its mean is None
      and a note says so), else `accuracy`; never what a run took
    - `questions` in the set, `samples_per_question` (asked for, else the most of any), `units`: `{scored, unjudged, failed, missing}`; `excluded`: of the
      failed `{task, sample, error}`; `missing`: questions no unit of which is done or failed; `missing_units`: samples of any question that are neither
    - `metrics`: score -> a mean; `slices`: name -> value -> a mean of the main score
    - `samples`: `k`, and over questions with at least k judged samples `avg@k`, `pass@1`, `pass@k`, `maj@k`, `pass^k`: a mean each; None with one sample. k
      is what was asked for, or the most that nine in ten questions have
    - `calibration`: `rewards.metrics.calibration.calibration` over judged runs that finished, refusals too; `simpleqa`: c, i, n, CGA and F; None where undefined
    - `factorised`: `rewards.metrics.factorised.panel` over judged, answerable units with known evidence, `search_opened` beside it, and
      `unanswerable`: `{n, refused, answered}`; None without such units
    - `curves`: `calls` and `tokens`: `[{budget, mean, low, high, n}]`, accuracy when runs over the budget score 0; `evidence`:
      `[{calls, mean, n}]`, evidence recall after so many calls
    - `effort`: mean per unit of `calls`, `calls_TOOL`, `turns`, `tokens_in`, `tokens_out`, `seconds`; `cost`: `{total, per_unit, per_correct,
      n}`, n units of which the cost is known, judged or not (per right answer: of those judged); None where no price is configured
    - `failures`: class -> units, every class of `rewards.metrics.failures.CLASSES` that occurs; `stops`, `leaks`: kind -> units
    - `agreement`: where several judges judged: `{alpha, judges, n, disagreements: [{task, sample, by: {judge: right}}]}`; else None
    - `detectable`: `{margin, two_runs}`: half-width of the interval at a share of one half, and the least difference of two runs found
      with 80 % power
    """
    played = [s for s in scored if s.facts.get("state") != "failed"]
    right = [s for s in played if s.facts["correct"] is not None]
    names = sorted({name for s in played for name in s.scores})
    metrics = {name: interval(by_question(played, score_of(name)), seed, share=name not in COUNTS) for name in names}
    main = _main(benchmark, metrics)
    states = Counter(s.facts["state"] for s in scored)
    seen = {s.unit.task for s in scored}
    missing = sum(task.id not in seen for task in benchmark.tasks)
    num_questions = len(by_question(played, score_of(main)))
    most = max(Counter(s.unit.task for s in scored).values(), default=0)
    asked = samples or most
    missing_units = max(0, len(benchmark.tasks) * asked - sum(s.unit.sample < asked for s in scored))
    several = _samples(right, asked, seed)
    return {
        "schema": SCHEMA,
        "benchmark": benchmark.name,
        "secret": benchmark.secret,
        "hidden": benchmark.secret or bool(all_canaries(benchmark)),
        "notes": [*benchmark.notes, *_notes(played, metrics, main, missing_units, several, asked)],
        "config": sorted({s.unit.config for s in scored}),
        "main": main,
        "questions": len(benchmark.tasks),
        "samples_per_question": asked,
        "units": {name: states[name] for name in ("scored", "unjudged", "failed")} | {"missing": missing},
        "missing_units": missing_units,
        "excluded": [
            {"task": s.unit.task, "sample": s.unit.sample, "error": s.facts["error"]}
            for s in scored
            if s.facts["state"] == "failed"
        ],
        "metrics": metrics,
        "slices": _slices(played, main, seed),
        "samples": several,
        "calibration": _calibration(right),
        "simpleqa": _simpleqa(played),
        "factorised": _factorised(right),
        "curves": _curves(right, played, seed),
        "effort": _effort(played),
        "cost": _cost(played),
        "failures": {name: n for name in CLASSES if (n := sum(s.facts["failure"] == name for s in played))},
        "stops": dict(sorted(Counter(s.facts["stop"] for s in played).items())),
        "leaks": dict(sorted(Counter(kind for s in played for kind in s.facts["leaks"]).items())),
        "agreement": agreement(judged),
        "detectable": {"margin": margin(num_questions), "two_runs": detectable(num_questions)},
    }


def _main(benchmark: Benchmark, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The score that leads."""
    declared = [METRICS[name] for name in benchmark.metrics if name in METRICS]
    leads = [(m.leads or m.name, m) for m in declared if (m.leads or m.name) not in EFFORT]
    for name, metric in leads:
        if metrics.get(name, {}).get("n") or (name in metrics and _waits(benchmark, metric)):
            return name
    others = [name for name in (MAIN, *metrics) if name not in COUNTS and metrics.get(name, {}).get("n")]
    return next(iter(others), leads[0][0] if leads else MAIN)


def _waits(benchmark: Benchmark, metric: Metric) -> bool:
    """Whether a judge could give a metric its values: the set brings what the judge needs."""
    brings = {
        "outcome": True,
        "nuggets": any(task.nuggets for task in benchmark.tasks),
        "rubrics": any(task.rubrics for task in benchmark.tasks),
        "race": any("criteria" in task.meta for task in benchmark.tasks),
    }
    return any(brings.get(need, False) for need in metric.needs)


def _notes(
    played: Sequence[Scored],
    metrics: Mapping[str, Mapping[str, Any]],
    main: str,
    missing_units: int,
    several: Mapping[str, Any] | None,
    asked: int,
) -> list[str]:
    """What a reader of the numbers has to know of them."""
    found = []
    if played and not metrics.get(main, {}).get("n"):
        found.append(f"{main}: not judged, so no number leads")
    if missing_units:
        found.append(
            f"{missing_units} of the samples that were asked for have not been played; means are over the others"
        )
    if asked > 1 and several and several["k"] < asked:
        found.append(
            f"pass@k and its kin are of k={several['k']}: fewer than nine in ten questions have {asked} judged samples"
        )
    estimated = sum(bool(s.facts.get("estimated")) for s in played)
    if estimated:
        found.append(
            f"the endpoint did not count the tokens of {estimated} of {len(played)} units: their tokens and cost are estimated from the texts"
        )
    exact = [value for s in played if (value := s.scores.get("claims_exact")) is not None]
    if any(exact):
        found.append(
            f"claims of {sum(map(bool, exact))} of {len(exact)} units were compared by the exact matcher, not by a judge as in the publication: "
            "their claims_f1 is not comparable with it"
        )
    return found


def score_of(name: str) -> Callable[[Scored], float | None]:
    return lambda s: s.scores.get(name)


def by_question(scored: Iterable[Scored], value: Callable[[Scored], float | None]) -> dict[str, list[float]]:
    """Task id -> the values of its units, without those that are None."""
    found: dict[str, list[float]] = {}
    for s in scored:
        number = value(s)
        if number is not None:
            found.setdefault(s.unit.task, []).append(float(number))
    return found


def _slices(played: Sequence[Scored], main: str, seed: int) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, list[Scored]]] = {}
    for s in played:
        for name, value in s.facts["slices"].items():
            groups.setdefault(name, {}).setdefault(str(value), []).append(s)
    return {
        name: {
            value: interval(by_question(found, score_of(main)), seed, share=main not in COUNTS)
            for value, found in sorted(values.items())
        }
        for name, values in sorted(groups.items())
    }


def _samples(right: Sequence[Scored], asked: int, seed: int) -> dict[str, Any] | None:
    """Over questions with at least k judged samples; shares of one with more are the unbiased ones, its vote is of the first k."""
    found: dict[str, list[Scored]] = {}
    for s in right:
        found.setdefault(s.unit.task, []).append(s)
    sizes = sorted(map(len, found.values()), reverse=True)
    # What nine in ten questions have at least.
    k = min(asked, sizes[math.ceil(0.9 * len(sizes)) - 1]) if sizes else 0
    if k < 2:
        return None
    whole = {task: units for task, units in found.items() if len(units) >= k}
    counts = {task: (len(units), sum(bool(s.facts["correct"]) for s in units)) for task, units in whole.items()}
    values: dict[str, dict[str, list[float]]] = {
        "avg@k": {task: [c / n] for task, (n, c) in counts.items()},
        "pass@1": {task: [pass_at_k(n, c, 1)] for task, (n, c) in counts.items()},
        "pass@k": {task: [pass_at_k(n, c, k)] for task, (n, c) in counts.items()},
        "maj@k": {task: [maj_at_k([s.facts["answer_class"] for s in units[:k]])] for task, units in whole.items()},
        "pass^k": {task: [pass_hat_k(n, c, k)] for task, (n, c) in counts.items()},
    }
    return {"k": k} | {name: interval(by_task, seed) for name, by_task in values.items()}


def _calibration(right: Sequence[Scored]) -> dict[str, Any] | None:
    tried = [s for s in right if StopReason(s.facts["stop"]).finished]
    if not any(s.facts["confidence"] is not None for s in tried):
        return None
    return calibration([s.facts["confidence"] for s in tried], [s.facts["correct"] for s in tried])


def _simpleqa(played: Sequence[Scored]) -> dict[str, Any] | None:
    grades = [grade for s in played for grade in GRADES if s.scores.get(f"simpleqa_{grade}") == 1.0]
    return simpleqa_summary(grades) if grades else None


def _factorised(right: Sequence[Scored]) -> dict[str, Any] | None:
    rows, opened = [], []
    for s in right:
        found = s.facts["sufficient"]
        if s.facts["answerable"] and found["known"] is not None:
            rows.append(
                Row(
                    found["known"], s.facts["correct"], s.facts["refused"], s.facts["attempted"], found["shown"], found["memory"],
                    s.facts["closed_book"], s.facts["oracle"], s.facts["distracted"],
                )
            )  # fmt: skip
            opened.append(found["opened"])
    if not rows:
        return None
    open_ended = [s for s in right if not s.facts["answerable"]]
    no = sum(s.facts["refused"] for s in open_ended)
    return panel(rows) | {
        "search_opened": sum(opened) / len(opened),
        "unanswerable": {"n": len(open_ended), "refused": no, "answered": len(open_ended) - no},
    }


def _under(axis: str, budget: float) -> Callable[[Scored], float]:
    return lambda s: score_at(s.facts[axis], s.facts["correct"], budget)


def _curves(right: Sequence[Scored], played: Sequence[Scored], seed: int) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for axis in ("calls", "tokens"):
        rows = []
        for budget in budgets([float(s.facts[axis]) for s in right]):
            kept = by_question(right, _under(axis, budget))
            found = interval(kept, seed)
            rows.append({"budget": budget} | {name: found[name] for name in ("mean", "low", "high", "n")})
        curves[axis] = rows
    known = [s.facts["evidence_by_call"] for s in played if s.facts["sufficient"]["shown"] is not None]
    longest = max(map(len, known), default=0)
    curves["evidence"] = [
        {"calls": int(call), "mean": mean_at(int(call), known), "n": len(known)}
        for call in budgets([float(i) for i in range(1, longest + 1)])
    ]
    return curves


def _effort(played: Sequence[Scored]) -> dict[str, float]:
    """Means per unit; a tool that a unit did not call counts 0."""
    if not played:
        return {}
    tools = sorted({tool for s in played for tool in s.facts["calls_by_tool"]})
    sums = {
        name: sum(s.facts[name] for s in played) for name in ("calls", "turns", "tokens_in", "tokens_out", "seconds")
    }
    sums |= {f"calls_{tool}": sum(s.facts["calls_by_tool"].get(tool, 0) for s in played) for tool in tools}
    return {name: total / len(played) for name, total in sums.items()}


def _cost(played: Sequence[Scored]) -> dict[str, float | int | None]:
    known = [s for s in played if s.facts["cost"] is not None]
    total = sum(float(s.facts["cost"]) for s in known)
    judged = [s for s in known if s.facts["correct"] is not None]
    return {
        "total": total if known else None,
        "per_unit": total / len(known) if known else None,
        "per_correct": cost_per_correct(
            [float(s.facts["cost"]) for s in judged], [bool(s.facts["correct"]) for s in judged]
        ),
        "n": len(known),
    }


def agreement(judged: Iterable[Judged]) -> dict[str, Any] | None:
    """How far several judges agree on right and wrong: Krippendorff's alpha (nominal), and where they differ. None with one judge."""
    found: dict[Unit, dict[str, bool]] = {}
    for row in judged:
        if not row.probe and not row.verdict.masked and "outcome" in row.verdict.parts:
            found.setdefault(row.unit, {})[row.judge] = row.verdict.parts["outcome"] >= 1.0
    judges = sorted({judge for by in found.values() for judge in by})
    if len(judges) < 2:
        return None
    several = {unit: by for unit, by in found.items() if len(by) > 1}
    return {
        "alpha": krippendorff([[by.get(judge) for judge in judges] for by in several.values()]),
        "judges": judges,
        "n": len(several),
        "disagreements": [
            {"task": unit.task, "sample": unit.sample, "by": by} for unit, by in several.items() if len(set(by.values())) > 1
        ],
    }  # fmt: skip
