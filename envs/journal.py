"""The log of a session: every call with what came back, as a hash; what was masked; which faults were made.

Invariant: the same seed and the same actions give the same journal, timing fields aside (`same`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from agents.types import ToolEvent
from envs.guard import Mask
from retrieval.errors import RetrievalError


class ReplayMiss(RetrievalError):
    """A replay was asked for what its recording does not hold; the message names the request and the nearest recorded one."""


@dataclass(frozen=True)
class Entry:
    """One call."""

    index: int
    """Place in the session, from 0."""
    name: str
    arguments: Mapping[str, Any]
    result: str
    """Hash of the observation, the evidence and the error code."""
    error: str
    latency_s: float
    cached: bool
    """Answered from what this session had already fetched."""
    fingerprint: str
    """Of the retrieval backend as it answered; empty for a call that it gave no answer to."""
    attempts: int = 1
    """How often the backend was asked; above 1 after failures."""
    charged: bool = False
    """Counted against the budget of its tool; mistakes, calls over budget and trouble of the backend are not."""
    masks: tuple[Mask, ...] = ()
    """What the guard did, in order."""
    faults: tuple[str, ...] = ()
    """Faults made on purpose that took effect, in order."""


class Journal:
    """Grows by one entry per call. `sink` is handed each of them with its event; without `keep` they are counted only."""

    def __init__(self, sink: Callable[[Entry, ToolEvent], None] | None = None, keep: bool = True) -> None:
        self.entries: list[Entry] = []
        self.count = 0
        """Calls so far."""
        self._sink, self._keep = sink, keep

    def add(self, event: ToolEvent, **facts: Any) -> None:
        """Notes a finished call; `facts` are the fields of `Entry` that the event does not tell."""
        index, self.count = self.count, self.count + 1
        if not self._keep and self._sink is None:
            return
        call, given = event.call, event.call.arguments
        arguments = dict(given) if isinstance(given, Mapping) else {"": given}
        entry = Entry(index, call.name, arguments, result_hash(event), event.error, event.latency_s, **facts)
        if self._keep:
            self.entries.append(entry)
        if self._sink is not None:
            self._sink(entry, event)

    def masked(self) -> Counter[tuple[str, str]]:
        """The audit: (rule, document) -> how often the guard hid the document or masked something in it."""
        found: Counter[tuple[str, str]] = Counter()
        for mask in (m for entry in self.entries for m in entry.masks):
            found[mask.rule, mask.doc_id] += mask.times
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Plain values, one mapping per call, ready for JSON lines."""
        return [asdict(entry) for entry in self.entries]


def result_hash(event: ToolEvent) -> str:
    """32 hex digits over everything the agent could learn from the call."""
    return digest([event.text, event.error, [[s.doc_id, s.kind, s.title, s.date, s.text] for s in event.seen]])


def digest(value: Any) -> str:
    """32 hex digits over plain values."""
    encoded = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def same(a: Journal | Sequence[Entry], b: Journal | Sequence[Entry]) -> bool:
    """Whether two journals agree, timing aside: latencies and attempts depend on the machine's mood."""
    return _timeless(a) == _timeless(b)


def _timeless(journal: Journal | Sequence[Entry]) -> list[Entry]:
    entries = journal.entries if isinstance(journal, Journal) else journal
    return [replace(e, latency_s=0.0, attempts=0) for e in entries]
