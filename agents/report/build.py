"""The report of a run: one HTML file that holds everything it shows.

Invariants: the page loads nothing from anywhere (its own policy forbids it); every text of the run is escaped; it is
written whole or not at all; it can be made while the run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from agents.report import charts as draw
from agents.report.charts import Chart, Mark, Series, interval_chart, share_bar, short
from agents.report.findings import LIMIT, findings
from agents.report.gantt import windows
from agents.report.load import RunData, clock, load_run, number
from agents.report.page import page_path, read, render_page, write_page
from agents.report.timeline import group_view
from agents.report.timeuse import actor_table, colour, duration, time_charts

TIMELINE = ("wait", "train", "publish", "checkpoint", "rollout", "judge", "start")
"""Phases with a colour of their own on the timeline."""
_LEDGER = ("running", "ready", "in_batch", "trained", "dropped")


def build_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html into the run's folder (or to `out`) and return its path.

    Raises RecordError when the folder holds no run. Missing or torn files are named on the page.
    """
    run = load_run(run_dir)
    return write_page(page_path(run_dir, out, "report.html"), render(run))


def render(run: RunData) -> str:
    """The page as text."""
    groups = [group_view(shown, serial) for serial, shown in enumerate(reversed(run.groups))]
    return render_page(
        "page.html",
        title=run.name,
        styles=read("page.css"),
        scripts=read("page.js"),
        run=run,
        headline=headline(run),
        facts=facts(run),
        charts=charts(run),
        limits=[f for f in findings(run.rows, run.spans, finished=True) if f.rank == LIMIT][:2],
        time_charts=time_charts(run, breaks(run)),
        windows=windows(run),
        phase_keys=[(colour(p), p) for p in TIMELINE if any(s.phase == p for s in run.spans)],
        actors=actor_table(run),
        ledger=ledger(run),
        phases=phases(run),
        groups=groups,
        events=[{**e, "clock": clock(number(e, "time"))} for e in events(run)[-200:]],
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def headline(run: RunData) -> dict[str, Any] | None:
    """Held-out success before and after, from the summary or else from the first and last evaluation."""
    found = [_success(run.summary.get(f"success_{when}")) for when in ("before", "after")]
    names = ["before", "after"]
    if not all(found):
        held_out = [e for e in run.evals if number(e, "success/mean") is not None]
        if not held_out:
            return None
        ends = [held_out[0], held_out[-1]] if len(held_out) > 1 else [held_out[0]]
        found = [_success({k: e.get(f"success/{k}") for k in ("mean", "low", "high", "n")}) for e in ends]
        names = [f"step {e['step']}" for e in ends]
    rows = [(name, *f) for name, f in zip(names, found, strict=True) if f]
    return {
        "rows": rows,
        "gain": rows[-1][1] - rows[0][1] if len(rows) > 1 else None,
        "svg": interval_chart([(name, mean, low, high) for name, mean, low, high, _ in rows]),
    }


def facts(run: RunData) -> list[tuple[str, str]]:
    """The few numbers worth a look at the top."""
    last = run.train[-1] if run.train else {}
    made: list[tuple[str, str]] = []
    steps = number(run.summary, "steps") or number(last, "step")
    if steps is not None:
        made.append(("optimiser steps", f"{int(steps):,}"))
    tokens = number(run.summary, "sampled_tokens") or number(run.summary, "tokens")
    if tokens is not None:
        made.append(("tokens", short(tokens)))
    seconds = run.summary.get("seconds")
    total = None
    if isinstance(seconds, dict):
        total = number(seconds, "total") or sum(number(seconds, k) or 0.0 for k in seconds)
    elif len(run.train) > 1:
        total = (number(run.train[-1], "time") or 0) - (number(run.train[0], "time") or 0)
    if total:
        made.append(("duration", duration(total)))
    rate = [v for r in run.train if (v := number(r, "tokens_per_s")) is not None]
    if rate:
        made.append(("tokens per second", short(sum(rate) / len(rate))))
    if (stale := number(last, "staleness/mean")) is not None:
        made.append(("staleness, last step", f"{stale:.2f}"))
    kl = [v for r in run.train if (v := number(r, "mismatch/kl_k3")) is not None]
    if kl:
        made.append(("sampler–learner KL, largest", short(max(kl))))
    return [*made, *judge_costs(next((r for r in reversed(run.train) if number(r, "judge/asked")), {}))]


def judge_costs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the judge was asked about one attempt at a question, on average since the start: about its steps, and about the whole
    (evaluations included). Nothing for a run that does not say. Tokens are those of an average call, cached ones for free."""

    def per(what: str, of: str) -> float:
        return (number(row, f"judge/{what}") or 0.0) / (number(row, f"judge/{of}") or 1.0)

    steps, whole = per("asked_steps", "questions_steps"), per("asked_whole", "questions_whole")
    if not steps + whole:
        return []
    made = [("judge calls per question", f"{steps + whole:.1f}" + (f", {steps:.1f} on steps" if steps else ""))]
    if tokens := per("tokens_in", "asked") + per("tokens_out", "asked"):
        made.append(("judge tokens per question", short((steps + whole) * tokens)))
        made.append(("judge calls answered by the cache", f"{per('cached', 'asked') + per('joined', 'asked'):.0%}"))
    if cost := per("cost", "asked"):
        made.append(("judge cost per question", short((steps + whole) * cost)))
    return made


def charts(run: RunData) -> list[Chart]:
    """The learning curves, the telling ones first; what a run did not log is left out."""
    rows = run.train
    line_chart, area_chart = partial(draw.line_chart, breaks=breaks(run)), partial(draw.area_chart, breaks=breaks(run))

    def series(*keys: str, names: dict[str, str] | None = None, smooth: bool = True) -> list[Series]:
        return [
            Series((names or {}).get(k, k.rsplit("/", 1)[-1].replace("_", " ")), _points(rows, k), smooth) for k in keys
        ]

    rewards = [k for k in _keys(rows, "reward/") if k != "reward/mean"]
    marks = [
        Mark(e["step"], m, lo if lo is not None else m, hi if hi is not None else m, str(e.get("label", "")))
        for e in run.evals
        if (m := number(e, "success/mean")) is not None
        for lo, hi in [(number(e, "success/low"), number(e, "success/high"))]
    ]
    hops = _keys(run.evals, "success/hops_")
    by_hops = [Series(k.rsplit("_", 1)[-1] + " hops", _points(run.evals, k), smooth=False) for k in hops]
    made = [
        line_chart(
            "Success", series("success", names={"success": "training tasks"}), marks=marks, bounds=(0.0, 1.0),
            note="Share of exact answers. Points are held-out tasks with their 95 % interval.",
        ),
        line_chart("Reward", series("reward/mean", *rewards), note="Mean over a batch, and its parts."),
        line_chart("Held-out success by difficulty", by_hops, bounds=(0.0, 1.0), note="The same frozen tasks, by hops.") if len(hops) > 1 else None,
        line_chart("Throughput", series("tokens_per_s", names={"tokens_per_s": "tokens"}), unit="tokens/s"),
        line_chart("Engines", series("engine/running", names={"engine/running": "requests running"}), note="Mean over all engines since the last step."),
        line_chart("Staleness", series("staleness/mean", "staleness/max"), note="Optimiser steps between sampling and training."),
        line_chart(
            "Mismatch of sampler and learner", series("mismatch/kl_k3", names={"mismatch/kl_k3": "KL (k3)"}),
            note="Near zero means both compute the same probabilities.",
        ),
        line_chart("Importance ratio", series("ratio/mean", "ratio/p99", "ratio/max")),
        line_chart(
            "Prefix cache", series("engine/prefix_hits", "engine/prefix_of_possible", names={"engine/prefix_hits": "of all prompt tokens", "engine/prefix_of_possible": "of the possible"}),
            bounds=(0.0, 1.0), note="Prompt tokens that the engines held already.",
        ),
        line_chart(
            "Work per episode", series("episode/searches", "episode/opens", "episode/turns", "episode/cited"),
            note="Means over a batch.",
        ),
        line_chart("Tokens per episode", series("episode/tokens", names={"episode/tokens": "tokens"})),
        area_chart("How episodes end", series(*_keys(rows, "stop/")), note="Share of the episodes of a batch, by reason."),
        line_chart("Entropy", series("entropy"), unit="nats"),
        line_chart("Loss", series("loss")),
        line_chart("Gradient norm", series("grad_norm", names={"grad_norm": "norm"})),
        line_chart("Groups without signal", series("groups/zero_spread", names={"groups/zero_spread": "zero spread"}), note="All attempts got the same reward."),
        line_chart("Left out of the loss", series(*_keys(rows, "masked/")), note="By cause."),
    ]  # fmt: skip
    return [c for c in made if c is not None]


def events(run: RunData) -> list[dict[str, Any]]:
    """What was written for people, and the rewinds, in order of time."""
    back = [{"step": r.kept, "time": r.time, "message": r.text, "rewind": True} for r in run.rewinds]
    return sorted([*run.events, *back], key=lambda e: number(e, "time") or 0.0)


def breaks(run: RunData) -> list[tuple[float, str]]:
    """Where curves go on from an earlier state."""
    return [(float(r.kept), r.text) for r in run.rewinds]


def ledger(run: RunData) -> dict[str, Any] | None:
    """Where the admitted episodes are, at the last step that says so."""
    last = next((r for r in reversed(run.train) if number(r, "ledger/admitted") is not None), None)
    if last is None:
        return None
    parts = [(name.replace("_", " "), number(last, f"ledger/{name}") or 0.0) for name in _LEDGER]
    admitted = number(last, "ledger/admitted") or 0.0
    reasons = [(k.removeprefix(p), number(last, k)) for p in ("ledger/dropped/", "dropped/") for k in _keys([last], p)]
    return {
        "step": last["step"],
        "admitted": admitted,
        "parts": parts,
        "reasons": reasons,
        "balanced": abs(admitted - sum(v for _, v in parts)) < 0.5,
        "svg": share_bar(parts),
    }


def phases(run: RunData) -> list[tuple[str, str, float]]:
    """(name, duration, share of the longest) of each phase of the run."""
    seconds = run.summary.get("seconds")
    if not isinstance(seconds, dict):
        return []
    found = [(k.replace("_", " "), v) for k in seconds if (v := number(seconds, k)) is not None and k != "total"]
    longest = max((v for _, v in found), default=0.0) or 1.0
    return [(name, duration(v), 100 * v / longest) for name, v in found]


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), v) for r in rows if (v := number(r, key)) is not None]


def _keys(rows: list[dict[str, Any]], prefix: str) -> list[str]:
    """Keys with this prefix, in order of first appearance, at most six (the rest would not be readable)."""
    found = dict.fromkeys(k for r in rows for k in r if k.startswith(prefix) and number(r, k) is not None)
    nonzero = [k for k in found if any(number(r, k) for r in rows)]
    return (nonzero or list(found))[:6]


def _success(found: Any) -> tuple[float, float, float, int] | None:
    if not isinstance(found, dict) or number(found, "mean") is None:
        return None
    mean = number(found, "mean") or 0.0
    low, high = number(found, "low"), number(found, "high")
    return mean, mean if low is None else low, mean if high is None else high, int(number(found, "n") or 0)
