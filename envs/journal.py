"""The log of a session: every call with what came back, as a hash.

Invariant: the same seed and the same actions give the same journal, timing fields aside (`same`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from agents.types import ToolEvent


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
    """Of the retrieval backend."""
    attempts: int = 1
    """How often the backend was asked; above 1 after failures."""


class Journal:
    """Grows by one entry per call."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, event: ToolEvent, *, cached: bool, fingerprint: str, attempts: int) -> None:
        """Notes a finished call."""
        call = event.call
        arguments, result = dict(call.arguments), result_hash(event)
        self.entries.append(
            Entry(
                len(self.entries),
                call.name,
                arguments,
                result,
                event.error,
                event.latency_s,
                cached,
                fingerprint,
                attempts,
            )
        )

    def rows(self) -> list[dict[str, Any]]:
        """Plain values, one mapping per call, ready for JSON lines."""
        return [asdict(entry) for entry in self.entries]


def result_hash(event: ToolEvent) -> str:
    """32 hex digits over everything the agent could learn from the call."""
    content = [event.text, event.error, [[s.doc_id, s.kind, s.title, s.date, s.text] for s in event.seen]]
    encoded = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def same(a: Journal | Sequence[Entry], b: Journal | Sequence[Entry]) -> bool:
    """Whether two journals agree, timing aside: latencies and attempts depend on the machine's mood."""
    return _timeless(a) == _timeless(b)


def _timeless(journal: Journal | Sequence[Entry]) -> list[Entry]:
    entries = journal.entries if isinstance(journal, Journal) else journal
    return [replace(e, latency_s=0.0, attempts=0) for e in entries]
