"""The report of an evaluation: one HTML file with the numbers, every question, and every step of every attempt; or of two runs.

The page holds its numbers and plots as markup, and everything else packed (`evaluation_store`): the question table, which its script draws,
and the details, which are unpacked when somebody opens a question.

Invariants: the page loads nothing from anywhere (its own policy forbids it); texts of an evaluation enter it as text, never as markup; it is
written whole or not at all; of a secret set nothing but numbers is in it unless `reveal`, which a scan of all that would be written checks.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.report import evaluation_panels as panels
from agents.report.charts import Chart
from agents.report.evaluation_compare import comparison, flip, other_questions
from agents.report.evaluation_load import EvaluationData, Sample, Unseal, load_evaluation
from agents.report.evaluation_secret import Secrets, without_keys
from agents.report.evaluation_store import Chunks, Texts, as_json, pack, strings
from agents.report.evaluation_units import unit_view
from agents.report.load import number
from agents.report.page import page_path, read, render_page, write_page
from agents.report.timeline import STOPS, cut
from agents.types import RecordError

OUTCOMES = ("right", "mixed", "wrong", "refused", "unfinished", "unscored", "lost")
"""Of a question: `mixed` when only some of its samples are right, `lost` when infrastructure failed."""
MAX_LABEL = 24
"""Characters of a run's name as the head of a column."""
MAX_SLICES = 4
MAX_VALUES = 40
"""A slice with more values is no filter."""


def build_evaluation_report(
    folder: str | Path,
    out: str | Path | None = None,
    reveal: bool = False,
    against: str | Path | None = None,
    *,
    unseal: Unseal | None = None,
    compared: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html into the folder (with `against`: compare.html; or to `out`) and return its path.

    `against`: folder of another evaluation, which is shown beside this one as the earlier; `compared`: what
    `cluster.evaluation.comparison.compare` says of the two. `unseal` opens sealed lines; without `reveal` their texts are used only to see
    that none is in the page. Raises RecordError when a folder holds no evaluation, or when the page would give away what is hidden.
    """
    runs = [load_evaluation(f, unseal) for f in ([folder] if against is None else [against, folder])]
    path = page_path(folder, out, "report.html" if against is None else "compare.html")
    return write_page(path, render(runs, reveal, compared))


def render(runs: Sequence[EvaluationData], reveal: bool = False, compared: Mapping[str, Any] | None = None) -> str:
    """The page as text: of one evaluation, or of two with the earlier one first. Raises RecordError when it would tell what is hidden."""
    run = runs[-1]
    hidden = any(r.secret for r in runs) and not reveal
    secrets = Secrets.of((t for r in runs for t in r.tasks.values()), hidden)
    texts, details = Texts(secrets.forms()), Chunks(secrets.forms())
    names = _names(runs)
    others = other_questions(runs[0], run) if len(runs) > 1 else set[str]()
    if others and not any(t in runs[0].questions and t not in others for t in run.questions):
        raise RecordError(
            f"{run.folder} and {runs[0].folder} have ids in common but no question; --against takes a run on the same questions"
        )
    # Heads of narrow columns; the names themselves stand in the headings.
    labels = names if max(map(len, names)) <= MAX_LABEL else ["before", "after"][-len(names) :]
    rows, told = _questions(runs, texts, details, hidden, others)
    texts.chunks.close()
    details.close()
    both = comparison(runs[0], run, compared, rows, others) if len(runs) > 1 else None
    index = {
        "main": panels.title(panels.main_metric(run.summary)),
        "runs": names,
        "labels": labels,
        "hidden": hidden,
        "rows": rows,
        "outcomes": OUTCOMES,
        "slices": _slices(runs, rows),
        "budgets": budgets(run.config),
        "details": details.starts,
        "texts": texts.chunks.starts,
    }
    scripts, styles = read("page.js", "evaluation.js"), read("page.css", "evaluation.css")
    summary = _censored(_without_words(run.summary), secrets) if hidden else run.summary
    shown = _Shown(
        title=" against ".join(reversed(names)),
        notes=[
            secrets.censored(n) if hidden else n
            for n in (*(both["notes"] if both else ()), *_notes(runs, () if both and both["different"] else others))
        ],
        config=secrets.censored(cut(without_keys(run.config), 40_000))
        if hidden
        else cut(without_keys(run.config), 40_000),
    )
    if hidden:
        leak = secrets.found(
            [*strings(index), *told, *texts, *strings(summary), shown.title, *shown.notes, shown.config],
            "".join((*scripts, *styles, *OUTCOMES, *STOPS, *STOPS.values())),
        )
        if leak:
            raise RecordError(
                f"{run.folder}: no page was written, for {' and '.join(leak)} of the set would stand in it; rename what carries it, or use --reveal"
            )
    page = render_page(
        "evaluation.html",
        title=shown.title,
        styles=styles,
        scripts=scripts,
        shown=shown,
        runs=names,
        labels=labels,
        hidden=next((r.why_secret for r in reversed(runs) if r.secret), "") if hidden else "",
        revealed=reveal and any(r.secret for r in runs),
        about=[(k, secrets.censored(v) if hidden else v) for k, v in _about(run)],
        headline=panels.headline(summary),
        facts=panels.facts(summary),
        metrics=panels.metric_rows(summary),
        charts=_charts(summary),
        factorised=panels.factorised(summary),
        both=both,
        count=len(rows),
        index=pack(index, secrets.forms()),
        details=details.packed,
        texts=texts.chunks.packed,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )
    for form, instead in secrets.forms():
        page = page.replace(form, instead)
    return page


@dataclass(frozen=True)
class _Shown:
    """Texts of the page that come from the evaluation's files as they are."""

    title: str
    notes: list[str]
    config: str


def _questions(
    runs: Sequence[EvaluationData], texts: Texts, details: Chunks, hidden: bool, others: Collection[str]
) -> tuple[list[dict[str, Any]], set[str]]:
    """Rows of the table; details are added to `details` in the same order. Besides, all strings of the details when `hidden`.

    `others`: ids that name another question in the earlier run, of which nothing is shown.
    """
    rows: list[dict[str, Any]] = []
    told: set[str] = set()
    order = dict.fromkeys(task for run in reversed(runs) for task in run.questions)
    for task in order:
        known = next((r.tasks[task] for r in reversed(runs) if task in r.tasks), None)
        facts, views = [], []
        for run in runs:
            gone = task in others and run is not runs[-1]
            found = [] if gone else [_sample(run, s, texts, hidden) for s in run.questions.get(task, ())]
            facts.append(_row([row for row, _ in found]) if found else None)
            views.append([view for _, views_ in found for view in views_])
        detail: dict[str, Any] = {"runs": views}
        if known is not None and not hidden:
            detail |= {"q": known.question, "gold": list(known.answers), "docs": list(known.gold_docs)}
        size = len(text := as_json(detail))
        if hidden:
            told.update(strings(detail))
        details.add(detail, size)
        del text
        made = {
            # Ids may say what a question is about; a number does not.
            "id": f"question {len(rows) + 1}" if hidden else task,
            "q": known.question if known is not None and not hidden else "",
            **(facts[-1] or _row([])),
            "slices": _values(runs, task, known.meta if known is not None and not hidden else {}, hidden),
        }
        if len(runs) > 1:
            made["before"] = facts[0]
            made["flip"] = flip(facts[0], facts[-1])
        rows.append(made)
    return rows, told


def _sample(
    run: EvaluationData, sample: Sample, texts: Texts, hidden: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the table needs of a unit, its view and those of its probes)"""
    played = run.played(sample.played)
    verdict, judge = run.verdict(sample.judged)
    view = unit_view(played, verdict, sample.scores, texts, hidden)
    view |= {"label": f"sample {sample.index + 1}", "judge": "" if hidden else judge}
    views = [view]
    for probe, line in sorted(sample.probes.items()):
        made = unit_view(run.played(line), None, {}, texts, hidden)
        kind, _, doc = probe.partition(":")
        label = kind.replace("_", " ") if kind in ("closed_book", "oracle") else "probe"
        views.append({**made, "label": f"{label} {doc}" if doc and not hidden else label})
    used, facts, score = view["used"], sample.facts, sample.scores.get(panels.main_metric(run.summary))
    stop = str(view.get("stop") or facts.get("stop") or "")
    row = {
        "outcome": _outcome(played.state, facts, score, stop),
        "score": score,
        "stop": stop if stop in STOPS else "",
        "answer": "" if hidden else str(view.get("answer") or facts.get("answer") or ""),
        "calls": _first(used.get("calls"), number(facts, "calls")),
        "tokens": _first(used["tokens_in"] + used["tokens_out"] if used else None, number(facts, "tokens")),
        "cost": _first(used.get("cost") or None, number(facts, "cost")),
        "seconds": _first(sum(played.seconds.values()) or None, used.get("seconds"), number(facts, "seconds")),
    }
    return row, views


def _row(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A question over its samples: means, the most common ending, the outcome of all. Shares are of those that were scored."""
    if not samples:
        return {
            "outcome": "",
            "stop": "",
            "answer": "",
            **dict.fromkeys(("score", "calls", "tokens", "cost", "seconds")),
        }
    outcomes = Counter(s["outcome"] for s in samples)
    common = outcomes.most_common(1)[0][0]
    right = outcomes["right"]
    counted = sum(outcomes[o] for o in OUTCOMES if o not in ("unscored", "lost"))
    made: dict[str, Any] = {
        "outcome": "right" if right and right == counted else "mixed" if right else common,
        "stop": Counter(s["stop"] for s in samples).most_common(1)[0][0],
        "answer": cut(Counter(s["answer"] for s in samples).most_common(1)[0][0], 200),
    }
    if len(samples) > 1 and counted:
        made["share"] = [right, counted]
    for key in ("score", "calls", "tokens", "cost", "seconds"):
        values = [s[key] for s in samples if s[key] is not None]
        made[key] = round(sum(values) / len(values), 6) if values else None
    return made


def _outcome(state: str, facts: Mapping[str, Any], score: float | None, stop: str) -> str:
    right = facts.get("correct")
    if "failed" in (state, facts.get("state")):
        return "lost"
    if not isinstance(right, bool):
        if score is None or facts.get("state") == "unjudged":
            return "unscored"
        right = score >= 0.5
    if right:
        return "right"
    if stop == "refused" or facts.get("refused") is True:
        return "refused"
    return "wrong" if stop in ("answered", "") else "unfinished"


def _values(runs: Sequence[EvaluationData], task: str, meta: Mapping[str, Any], hidden: bool) -> dict[str, str]:
    """The question's value of each slice; of a `hidden` one only numbers."""
    made: dict[str, str] = {}
    for run in runs:
        facts = next((s.facts for s in run.questions.get(task, ()) if s.facts), {})
        own = facts.get("slices") if isinstance(facts.get("slices"), Mapping) else {}
        for name in panels.mapping(run.summary, "slices"):
            value = next(
                (source[name] for source in (own, facts, meta) if isinstance(source, Mapping) and name in source), None
            )
            if isinstance(value, (str, int, float)) and not (hidden and not _is_number(value)):
                made[str(name)] = cut(str(value), 80)
    return made


def _slices(runs: Sequence[EvaluationData], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for run in reversed(runs) for name in panels.mapping(run.summary, "slices"))
    values = {name: {r["slices"].get(name) for r in rows} for name in names}
    return [name for name in names if 1 < len(values[name]) <= MAX_VALUES][:MAX_SLICES]


def _charts(summary: Mapping[str, Any]) -> list[tuple[str, list[Chart]]]:
    """Groups of charts; those of a `short` one have as many rows as they need."""
    curves = [*panels.curve_charts(summary), panels.calibration_chart(summary)]
    rows = [*panels.slice_charts(summary), panels.failure_chart(summary)]
    groups = [("short", [c for c in rows if c is not None]), ("", [c for c in curves if c is not None])]
    return [(kind, some) for kind, some in groups if some]


def _about(run: EvaluationData) -> list[tuple[str, str]]:
    """Who was asked what, and who judged."""
    found = {k: run.summary.get(k) for k in ("benchmark", "policy", "agent", "retrieval", "judge")}
    if not found["policy"]:  # a folder that was not scored yet
        kind = setting(run.config, "policy", "kind")
        where = {"chat": ("policy", "chat", "model"), "checkpoint": ("model", "path")}.get(kind, ("policy", "kind"))
        found |= {"policy": setting(run.config, *where), "agent": setting(run.config, "agent", "name")}
    said = list(found.items())
    return [(k, cut(v, 200)) for k, v in said if isinstance(v, str) and v]


def setting(config: str, *path: str) -> str:
    """A scalar of a saved configuration (YAML as Gumshoe writes it: two spaces a level); empty when it is not there."""
    lines, depth = iter(config.splitlines()), 0
    for line in lines:
        indent = len(line) - len(line.lstrip(" "))
        if indent < 2 * depth:
            return ""
        if indent == 2 * depth and line.strip().startswith(f"{path[depth]}:"):
            depth += 1
            if depth == len(path):
                return line.partition(":")[2].strip().strip("'\"")
    return ""


def budgets(config: str) -> dict[str, float]:
    """The limits one question had."""
    found = {name: setting(config, "budget", name) for name in ("tokens", "calls", "seconds", "money")}
    return {name: float(text) for name, text in found.items() if re.fullmatch(r"\d+(\.\d*)?", text) and float(text) > 0}


def _notes(runs: Sequence[EvaluationData], others: Collection[str] = ()) -> list[str]:
    made: list[str] = []
    if others:
        one = len(others) == 1
        made.append(
            f"{len(others)} question{' has' if one else 's have'} the same id in both runs but not the same text; {'it is' if one else 'they are'} not compared"
        )
    for run, name in zip(runs, _names(runs), strict=True):
        noted = run.summary.get("notes")
        own = [*run.notes, *(n for n in (noted if isinstance(noted, list) else ()) if isinstance(n, str))]
        made += [f"{name}: {n}" if len(runs) > 1 else n for n in own]
    return [cut(n, 600) for n in made]


def _names(runs: Sequence[EvaluationData]) -> list[str]:
    names = [run.name for run in runs]
    return (
        names if len(set(names)) == len(names) else [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    )


def _without_words(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with only those slices whose values are numbers: words may say what a question is about."""
    kept = {
        k: v for k, v in panels.mapping(summary, "slices").items() if isinstance(v, Mapping) and all(map(_is_number, v))
    }
    return {**summary, "slices": kept}


def _is_number(value: Any) -> bool:
    return re.fullmatch(r"-?\d{1,9}(?:\.\d{1,9})?|true|false", str(value), re.IGNORECASE) is not None


def _censored(value: Any, secrets: Secrets) -> Any:
    """A summary with every text that tells something taken out."""
    if isinstance(value, str):
        return secrets.censored(value)
    if isinstance(value, Mapping):
        return {secrets.censored(str(k)): _censored(v, secrets) for k, v in value.items()}
    return [_censored(v, secrets) for v in value] if isinstance(value, list) else value


def _first(*values: float | None) -> float | None:
    return next((v for v in values if v is not None), None)
