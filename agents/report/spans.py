"""Spans: who did what from when to when. Reading them, and adding them up.

A row: {"actor": "rollout-0", "phase": "rollout", "began": unix s, "ended": unix s, "step": optimiser step, "seconds": {part: s}}.
`seconds` is optional: what the phase was made of, as sums (parts may overlap, as the episodes of one lease do). Invariants: a
torn or foreign line is skipped, never an error; never more than the last MAX_BYTES of a file are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

MAX_BYTES = 32 * 2**20
FILE = "spans.jsonl"
MAX_COUNT = 10**12
"""A time in seconds or a step beyond this is none (and NaN is not below it)."""
PAUSE_S = 60.0
"""With nobody at work for longer than this, the run itself was not going on."""


@dataclass(frozen=True)
class Span:
    """One phase of one actor."""

    actor: str
    phase: str
    began: float
    ended: float
    step: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def took_s(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True)
class Use:
    """What one phase of one actor came to."""

    actor: str
    phase: str
    total_s: float
    """Sum over the spans; more than `busy_s` where several went on at once."""
    busy_s: float
    """Time in which at least one went on."""
    count: int
    parts: Mapping[str, float]
    """Sums of what the spans say they were made of."""


def read_spans(run_dir: str | Path) -> list[Span]:
    """The spans of a run in order of their beginning; of a very long file only those at its end."""
    path = Path(run_dir) / FILE
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - MAX_BYTES))
        lines = file.read().split(b"\n")
    found = [span for line in lines if (span := parse(line)) is not None]
    return sorted(found, key=lambda s: s.began)


def parse(line: bytes | str) -> Span | None:
    """A line as a span, or None for one that is not."""
    try:
        row = json.loads(line)
        parts = {str(k): float(v) for k, v in (row.get("seconds") or {}).items()}
        span = Span(
            str(row["actor"]), str(row["phase"]), float(row["began"]), float(row["ended"]), int(row["step"]), parts
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    numbers = (span.began, span.ended, span.step, *parts.values())
    return span if all(abs(n) < MAX_COUNT for n in numbers) and span.ended >= span.began else None


def seconds_by(spans: Iterable[Span]) -> dict[tuple[int, str, str], float]:
    """Seconds per (step, actor, phase); the parts of a phase count as `phase/part`."""
    out: dict[tuple[int, str, str], float] = {}
    for span in spans:
        for phase, seconds in ((span.phase, span.took_s), *((f"{span.phase}/{k}", v) for k, v in span.seconds.items())):
            key = (span.step, span.actor, phase)
            out[key] = out.get(key, 0.0) + seconds
    return out


def uses(spans: Sequence[Span]) -> list[Use]:
    """Per actor and phase, actors in a natural order, the longest phase first."""
    found: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        found.setdefault((span.actor, span.phase), []).append(span)
    made = []
    for (actor, phase), these in found.items():
        parts: dict[str, float] = {}
        for span in these:
            for name, seconds in span.seconds.items():
                parts[name] = parts.get(name, 0.0) + seconds
        total = sum(s.took_s for s in these)
        made.append(Use(actor, phase, total, covered_s(these), len(these), parts))
    return sorted(made, key=lambda u: (actor_order(u.actor), -u.total_s))


def covered_s(spans: Iterable[Span], gap_s: float = 0.0) -> float:
    """Time covered by at least one span; pauses of up to `gap_s` between two count as covered."""
    return sum(end - begin for begin, end in stretches(spans, gap_s))


def clipped(spans: Iterable[Span], began: float, ended: float) -> list[Span]:
    """What of the spans lies between two moments."""
    return [
        replace(s, began=max(s.began, began), ended=min(s.ended, ended))
        for s in spans
        if s.ended > began and s.began < ended
    ]


def stretches(spans: Iterable[Span], gap_s: float = 0.0) -> list[tuple[float, float]]:
    """The spans merged into stretches that lie more than `gap_s` apart."""
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.began):
        if merged and span.began <= merged[-1][1] + gap_s:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.ended))
        else:
            merged.append((span.began, span.ended))
    return merged


def actor_order(actor: str) -> tuple[int, str, int]:
    """The learner first, then the fleet, samplers, rollout workers, others; numbers as numbers."""
    kind, _, number = actor.rpartition("-")
    kind, serial = (kind, int(number)) if kind and number.isdecimal() and len(number) < 10 else (actor, 0)
    known = ("learner", "fleet", "sampler", "rollout")
    return (known.index(kind) if kind in known else len(known), kind, serial)
