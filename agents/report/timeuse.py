"""Where the time of a run went: a step of the learner and an episode in parts, and a table per actor.

The learner's parts lie one after the other and add up to the step. Those of rollouts run side by side, so they are shown per
episode, and in the table with how many went on at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.report.charts import Chart, Series, area_chart
from agents.report.load import RunData, number
from agents.report.spans import PAUSE_S, Use, covered_s, uses

LEARNER = ("wait", "pack", "forward", "backward", "optimiser", "publish", "checkpoint")
EPISODE = ("generate", "tools", "judge")
WORDS = {
    "wait": "waiting",
    "train": "training",
    "pack": "packing",
    "publish": "publishing",
    "checkpoint": "checkpoints",
}
_NO_PARTS = frozenset({"step", "train", "elapsed", "pack", "forward", "backward", "optimiser"})
MAX_ACTORS = 24


def colour(phase: str) -> str:
    """Class of a phase's colour; what the style sheet does not know is grey."""
    return f"ph p-{phase}" if phase.isalpha() and phase.isascii() else "ph"


def time_charts(run: RunData, breaks: Sequence[tuple[float, str]] = ()) -> list[Chart]:
    """A step of the learner and a group of episodes, as stacked seconds over the steps."""
    rows = run.train
    has = {k for r in rows for k in r if number(r, k) is not None}
    known = list(LEARNER) if "time/forward_s" in has else ["wait", "train", "publish", "checkpoint"]
    others = [k.removeprefix("time/").removesuffix("_s") for k in sorted(has) if k.startswith("time/")]
    parts = [p for p in [*known, *(o for o in others if o not in known and o not in _NO_PARTS)] if f"time/{p}_s" in has]
    step = _stack(rows, {p: f"time/{p}_s" for p in parts}, "time/step_s")
    episode = _stack(rows, {p: f"rollout/{p}_s" for p in EPISODE if f"rollout/{p}_s" in has}, "")
    rest = [
        (float(r["step"]), max(0.0, (number(r, "rollout/wall_s") or 0.0) - sum(number(r, f"rollout/{p}_s") or 0.0 for p in ("generate", "tools"))))
        for r in rows
    ]  # fmt: skip
    if episode and "rollout/wall_s" in has:
        episode.append(Series("for the slowest of its group", rest, cls=colour("wait")))
    made = [
        area_chart(
            "A step of the learner", step, unit="s", breaks=breaks,
            note="From one settled batch to the next; its parts lie one after the other.", cut=_cut(step),
        ),
        area_chart(
            "An episode", episode, unit="s", breaks=breaks,
            note="Mean of a batch. Many are played at once, beside the learner.", cut=_cut(episode),
        ),
    ]  # fmt: skip
    return [c for c in made if c is not None]


def actor_table(run: RunData) -> dict[str, Any] | None:
    """Per actor and phase: seconds, and the share of the run's time in which it went on."""
    wall = covered_s(run.spans, PAUSE_S)
    if wall <= 0:
        return None
    by: dict[str, list[Use]] = {}
    for use in uses(run.spans):
        by.setdefault(use.actor, []).append(use)
    actors = [
        {
            "name": actor,
            "share": (busy := covered_s(s for s in run.spans if s.actor == actor and s.phase != "wait") / wall),
            "busy": percent(busy),
            "phases": [row for use in found for row in _rows(use, wall)],
        }
        for actor, found in list(by.items())[:MAX_ACTORS]
    ]
    learner = {u.phase: u.busy_s / wall for u in by.get("learner", ())}
    lead = ", ".join(f"{_word(p)} {percent(v)}" for p, v in sorted(learner.items(), key=lambda i: -i[1]))
    return {"wall": duration(wall), "lead": lead, "actors": actors, "hidden": max(0, len(by) - MAX_ACTORS)}


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 10 min."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{seconds:.1f} s"


def percent(share: float) -> str:
    return (
        f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
        if share >= 0.005 or share == 0
        else "<\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%"
    )


def _rows(use: Use, wall: float) -> list[dict[str, Any]]:
    """A phase, and the parts of one that goes on once at a time; of others the parts stand in its note."""

    def row(name: str, seconds: float, share: float, note: str, sub: bool = False) -> dict[str, Any]:
        return {
            "name": name, "cls": colour(name), "sub": sub, "seconds": duration(seconds), "share": share,
            "percent": percent(share), "note": note,
        }  # fmt: skip

    at_once = use.total_s / use.busy_s if use.busy_s else 0.0
    note = (f"{use.count:,} times" if use.count > 1 else "once") + (
        f", {at_once:.1f} at once" if at_once > 1.05 else ""
    )
    inside = sum(use.parts.values())
    if use.total_s > 0 and inside <= 1.05 * use.total_s and at_once <= 1.05:
        subs = [
            row(name, seconds, seconds / wall, f"{percent(seconds / use.total_s)} of {use.phase}", True)
            for name, seconds in use.parts.items()
        ]
        return [row(use.phase, use.total_s, use.busy_s / wall, note), *subs]
    note += (
        "; " + ", ".join(f"{name} {percent(seconds / inside)}" for name, seconds in use.parts.items()) if inside else ""
    )
    return [row(use.phase, use.total_s, use.busy_s / wall, note)]


def _stack(rows: Sequence[dict[str, Any]], keys: dict[str, str], whole: str) -> list[Series]:
    """One series per part, and what is left of `whole`."""
    made = [
        Series(_word(part), [(float(r["step"]), number(r, key) or 0.0) for r in rows], cls=colour(part))
        for part, key in keys.items()
    ]
    if made and whole:
        left = [
            (float(r["step"]), round(max(0.0, total - sum(number(r, k) or 0.0 for k in keys.values())), 3))
            for r in rows
            if (total := number(r, whole)) is not None
        ]
        made.append(Series("other", left, cls=colour("other")))
    return made


def _cut(stack: Sequence[Series]) -> float | None:
    """Where to cut the picture, if a few steps (a restart, the first one) would flatten all others."""
    totals = sorted(map(sum, zip(*([y for _, y in s.points] for s in stack), strict=False)))
    usual = totals[int(0.95 * (len(totals) - 1))] if totals else 0.0
    return 1.2 * usual if usual and totals[-1] > 2 * usual else None


def _word(phase: str) -> str:
    return WORDS.get(phase, phase.replace("_", " "))
