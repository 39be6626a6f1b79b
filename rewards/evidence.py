"""What a rollout cites, and what of it the rollout really saw: the evidence of CaRR's second step.

Invariants: text reaches a judge only from pages that are cited in the final message *and* were shown to the policy (a
made-up citation supports nothing); every text piece is given once, under the first page that holds it; at most
`max_pages` cited pages count. Pure functions of the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agents.text import canonical_id, citations
from agents.types import Seen, SeenKind, ToolEvent

_ORDER = (SeenKind.snippet, SeenKind.page, SeenKind.match)
"""Search snippets first, then opened text, then find results (spec 3.2)."""


@dataclass(frozen=True)
class Page:
    """A cited page as the policy saw it."""

    number: int
    """1-based, in order of first citation"""
    doc_id: str
    title: str
    date: str
    text: str
    """Everything seen of it, pieces separated by blank lines; empty when earlier pages hold all of it."""


@dataclass(frozen=True)
class Evidence:
    """Cited pages that were seen, and the citations that led nowhere."""

    pages: tuple[Page, ...]
    unseen: tuple[str, ...] = ()
    """Cited, but never shown to the policy."""
    over_cap: tuple[str, ...] = ()
    """Cited and seen, beyond the cap; not read."""


def gather(message: str, events: Sequence[ToolEvent], max_pages: int = 20, strict: bool = False) -> Evidence:
    """Evidence for a final message, given without its reference list: citations that stand only there do not count."""
    seen: dict[str, list[Seen]] = {}
    for event in events:
        for item in event.seen:
            seen.setdefault(canonical_id(item.doc_id), []).append(item)
    cited: dict[str, str] = {}
    for citation in citations(message, strict):
        cited.setdefault(canonical_id(citation.target), citation.target)
    known = [key for key in cited if key in seen]
    used: set[str] = set()
    pages = tuple(_page(number, seen[key], used) for number, key in enumerate(known[:max_pages], start=1))
    unseen = tuple(target for key, target in cited.items() if key not in seen)
    return Evidence(pages, unseen, tuple(cited[key] for key in known[max_pages:]))


def _page(number: int, items: Sequence[Seen], used: set[str]) -> Page:
    pieces = []
    for item in sorted(items, key=lambda s: _ORDER.index(s.kind)):
        piece = item.text.strip()
        if piece and piece not in used:
            used.add(piece)
            pieces.append(piece)
    title = next((s.title for s in items if s.title), "")
    date = next((s.date for s in items if s.date), "")
    return Page(number, items[0].doc_id, title, date, "\n\n".join(pieces))
