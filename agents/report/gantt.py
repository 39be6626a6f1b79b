"""The timeline of a run as a picture: a lane per actor, a bar per span, marks where something died, came back or went back.

Leases of one rollout worker overlap, so its lane is as many rows high as leases went on at once. One drawing per window of a
few optimiser steps; the page shows the last one and leafs to earlier ones. Every text is escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from agents.report.charts import short, svg, ticks
from agents.report.load import RunData, clock, number
from agents.report.spans import Span, actor_order
from agents.report.timeuse import colour

STEPS = 8
"""Optimiser steps in a window."""
MAX_WINDOWS = 12
MAX_LANES = 14
MAX_BARS = 900
"""Bars in a window; the shortest are left out, and the page says so."""
WIDTH, LEFT, RIGHT, TOP = 1072.0, 84.0, 6.0, 26.0
_TELLING = re.compile(
    r"\b(fenced|died|dead|killed|stuck|damaged|went back|not answered|answers again|came back|took its place|begins at step|restart\w*|resum\w+)\b",
    re.I,
)
_BAD = re.compile(r"\b(fenced|died|dead|killed|stuck|damaged|went back|not answered)\b", re.I)
_ACTOR = re.compile(r"^(?:the )?([a-z]+(?:-\d+)?)\b")


@dataclass(frozen=True)
class Mark:
    """Something that happened at one moment."""

    time: float
    text: str
    good: bool
    actor: str


@dataclass(frozen=True)
class Window:
    """One drawing."""

    title: str
    svg: str
    marks: list[tuple[int, str, str, bool]]
    """(number on the picture, clock, text, whether it is good news)"""
    note: str


def windows(run: RunData) -> list[Window]:
    """The last windows of the run, oldest first; earlier ones only where something happened."""
    if not run.spans:
        return []
    marks = telling(run)
    first, last = min(s.began for s in run.spans), max(s.ended for s in run.spans)
    settled = sorted((at, step) for at, step in run.settled if first - 1 <= at <= last + 60)
    bounds: list[tuple[float, float, str]] = []
    for end in range(len(settled), 0, -STEPS):
        chunk = settled[max(0, end - STEPS) : end]
        began = settled[end - STEPS - 1][0] if end > STEPS else first
        low, high = min(step for _, step in chunk), max(step for _, step in chunk)
        title = f"step {low}" if low == high else f"steps {low} to {high}"
        bounds.insert(0, (began, chunk[-1][0], title))
    if not bounds:
        bounds = [(max(first, last - 120), last, "before the first step")]
    elif last > bounds[-1][1]:
        bounds[-1] = (bounds[-1][0], min(last, bounds[-1][1] + (bounds[-1][1] - bounds[-1][0]) / STEPS), bounds[-1][2])
    early = [b for b in bounds[:-MAX_WINDOWS] if any(b[0] <= m.time <= b[1] for m in marks)]
    return [_window(run.spans, settled, marks, first, *b) for b in [*early[-MAX_WINDOWS:], *bounds[-MAX_WINDOWS:]]]


def telling(run: RunData) -> list[Mark]:
    """Deaths, restarts and rewinds, in order of time."""
    found = [
        Mark(at, text, not _BAD.search(text), actor[1] if (actor := _ACTOR.match(text)) else "")
        for e in run.events
        if (at := number(e, "time")) is not None
        and _TELLING.search(text := " ".join(str(e.get("message", "")).split()))
    ]
    found += [Mark(r.time, r.text, False, "learner") for r in run.rewinds]
    return sorted(found, key=lambda m: m.time)


def rows_of(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in rows without overlap. A span goes behind the one that ended last before it, so a judgement follows its lease."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.began, s.ended)):
        free = [row for row in rows if row[-1].ended <= span.began + 1e-3]
        if free:
            max(free, key=lambda row: row[-1].ended).append(span)
        else:
            rows.append([span])
    return rows


def _window(
    spans: Sequence[Span], settled: Sequence[tuple[float, int]], marks: Sequence[Mark], origin: float,
    began: float, ended: float, title: str,
) -> Window:  # fmt: skip
    ended = max(ended, began + 1e-3)
    inside = [s for s in spans if s.ended > began and s.began < ended]
    shown = sorted(inside, key=lambda s: -s.took_s)[:MAX_BARS]
    actors = sorted({s.actor for s in shown}, key=actor_order)[:MAX_LANES]
    scale = (WIDTH - LEFT - RIGHT) / (ended - began)

    def x(at: float) -> float:
        return LEFT + (min(ended, max(began, at)) - began) * scale

    body, middle, y = [], {}, TOP
    for actor in actors:
        lane, top = [], y
        rows = rows_of([s for s in shown if s.actor == actor])
        size = 18.0 if len(rows) == 1 else max(3.0, min(9.0, 64.0 / len(rows)))
        for row in rows:
            lane += [_bar(s, x(s.began), x(s.ended), y, size) for s in row]
            y += size + 1.0
        middle[actor] = (top + y) / 2
        body.append(
            f'<rect class="lane" x="{LEFT:g}" y="{top - 3:.1f}" width="{WIDTH - LEFT - RIGHT:g}" height="{y - top + 5:.1f}" rx="3"/>'
        )
        body.append(
            f'<text class="name" x="{LEFT - 10:g}" y="{middle[actor] + 4:.1f}" text-anchor="end">{escape(actor[:12])}</text>'
        )
        body.append(f'<g class="bars" data-a="{escape(actor, quote=True)}">{"".join(lane)}</g>')
        y += 10.0
    bottom = y - 2
    lines = [_step(x(at), step, bottom) for at, step in settled if began < at <= ended]
    here = [m for m in marks if began <= m.time <= ended]
    flags = [_flag(x(m.time), middle.get(m.actor), bottom, n, m) for n, m in enumerate(here, start=1)]
    listed = [(n, clock(m.time), m.text, m.good) for n, m in enumerate(here, start=1)]
    words = f"{len(shown)} spans of {len(actors)} actors, {ended - began:.0f} seconds"
    picture = svg(
        f"Timeline of {title}",
        [*lines, *body, *flags, *_axis(began, ended, origin, x, bottom)],
        words,
        WIDTH,
        bottom + 20,
    )
    left_out = len(inside) - len(shown)
    hidden = len({s.actor for s in shown}) - len(actors)
    notes = [f"the {left_out} shortest spans are not drawn"] * bool(left_out) + [
        f"{hidden} more actors are not drawn"
    ] * bool(hidden)
    return Window(title, picture, listed, "; ".join(notes))


def _bar(span: Span, left: float, right: float, y: float, size: float) -> str:
    parts = ", ".join(f"{k} {short(v)} s" for k, v in span.seconds.items())
    text = f"{span.phase} {short(span.took_s)} s · step {span.step}" + (f" · {parts}" if parts else "")
    return (
        f'<rect class="{colour(span.phase)}" x="{left:.1f}" y="{y:.1f}" width="{max(0.8, right - left - 0.6):.1f}" '
        f'height="{size:.1f}" data-t="{escape(text, quote=True)}"/>'
    )


def _step(x: float, step: int, bottom: float) -> str:
    return (
        f'<line class="tickline" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8:g}" y2="{bottom:.1f}"/>'
        f'<text class="tick" x="{x - 4:.1f}" y="{TOP - 12:g}" text-anchor="end">{step}</text>'
    )


def _flag(x: float, y: float | None, bottom: float, number: int, mark: Mark) -> str:
    cls, height = "flag good" if mark.good else "flag", TOP + 6 if y is None else y
    return (
        f'<g class="{cls}" data-t="{escape(mark.text, quote=True)}"><line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8:g}" y2="{bottom:.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{height:.1f}" r="8"/>'
        f'<text x="{x:.1f}" y="{height + 4:.1f}" text-anchor="middle">{number}</text></g>'
    )


def _axis(began: float, ended: float, origin: float, x: object, bottom: float) -> list[str]:
    """Time since the run's first span."""
    assert callable(x)
    marks = [t for t in ticks(began - origin, ended - origin, 8) if began <= origin + t <= ended]
    return [
        f'<text class="tick" x="{x(origin + t):.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{_elapsed(t)}</text>'
        for t in marks
    ]


def _elapsed(seconds: float) -> str:
    whole = int(seconds)
    if seconds < 60:
        return f"{seconds:g} s"
    if whole < 3600:
        return (
            f"{whole // 60}:{seconds - 60 * (whole // 60):04.1f}"
            if seconds != whole
            else f"{whole // 60}:{whole % 60:02d}"
        )
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
