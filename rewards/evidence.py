"""What a rollout cites, and what of it the rollout really saw: the evidence of CaRR's second step.

Invariants: text reaches a judge only from pages that are cited in the final message *and* were shown to the policy (a
made-up citation supports nothing); every text piece is given once, under the first page that holds it; at most
`max_pages` cited pages count. Evidence that one call cannot hold is dealt out in chunks: nothing is left out. Pure functions of the
records.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agents.text import canonical_id, citations, words
from agents.types import Seen, SeenKind, ToolEvent

_ORDER = (SeenKind.snippet, SeenKind.page, SeenKind.match)
"""Search snippets first, then opened text, then find results (spec 3.2)."""
_BYTES_PER_TOKEN = 3
_LEAST = 32
"""Tokens of a chunk, at least: a budget below that would cut words apart."""


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


# ------------------------------------------------------------------------------------------------------ chunks


def num_tokens(text: str) -> int:
    """Tokens a judge may need for a text, rather too many than too few: three bytes of UTF-8 each. No tokenizer is asked."""
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def chunks(pages: Sequence[Page], budget: int) -> list[tuple[Page, ...]]:
    """The pages in order, dealt out to chunks of at most `budget` tokens (`num_tokens`, headers included).

    A page stays whole where it fits a chunk. A longer one is cut between its pieces; a longer piece between words, each part beginning
    with the end of the one before, so that no sentence is lost at a cut. Pages without text are left out.
    """
    dealt: list[list[Page]] = []
    room = 0
    for page in pages:
        for part in _parts(page, budget):
            size = _size(part)
            if not dealt or size > room:
                dealt.append([])
                room = budget
            dealt[-1].append(part)
            room -= size
    return [tuple(chunk) for chunk in dealt]


def bearing(statement: str, pages: Sequence[Page], budget: int) -> tuple[Page, ...]:
    """The parts of pages that share most words with a statement, rare words weighing more, up to `budget` tokens, in page order."""
    parts = [part for page in pages for part in _parts(page, budget // 8)]
    said = [set(words(f"{part.title} {part.text}")) for part in parts]
    told = set(words(statement))
    occurs = Counter(word for found in said for word in found & told)
    weights = [sum(math.log(len(parts) / occurs[word]) for word in found & told) for found in said]
    chosen: list[int] = []
    for index in sorted(range(len(parts)), key=lambda i: -weights[i]):
        size = _size(parts[index])
        if weights[index] > 0 and size <= budget:
            chosen.append(index)
            budget -= size
    return tuple(parts[i] for i in sorted(chosen))


def _size(page: Page) -> int:
    return num_tokens(f"[Page {page.number}] {page.doc_id}\nTitle: {page.title}\nDate: {page.date}\n{page.text}\n\n")


def _parts(page: Page, budget: int) -> Iterator[Page]:
    if not page.text or _size(page) <= budget:
        yield from [page] if page.text else []
        return
    limit = _BYTES_PER_TOKEN * max(_LEAST, budget - _size(replace(page, text="")))
    held = ""
    for piece in (window for whole in page.text.split("\n\n") for window in _windows(whole, limit)):
        joined = f"{held}\n\n{piece}" if held else piece
        if held and len(joined.encode("utf-8", "replace")) > limit:
            yield replace(page, text=held)
            joined = piece
        held = joined
    yield replace(page, text=held)


def _windows(piece: str, limit: int) -> Iterator[str]:
    """A piece of text in parts of at most `limit` bytes, cut between words, overlapping a little."""
    start = 0
    while True:
        fits = piece[start : start + limit].encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
        end = start + len(fits)
        if end >= len(piece):
            break
        space = piece.rfind(" ", start + len(fits) // 2, end)
        end = space if space > 0 else end
        yield piece[start:end]
        start = max(end - limit // 16, start + 1)
    yield piece[start:]
