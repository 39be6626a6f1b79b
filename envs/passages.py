"""Which part of a document's text the agent reads: pages and matches; snippets come from `retrieval.snippets`. Pure functions of text.

Invariants: the pages of a text, put together, are the text; a match's context is cut from the text as it stands.
"""

from __future__ import annotations

from collections import Counter

from retrieval.analysis import words
from retrieval.snippets import lead, one_line, window

__all__ = ["lead", "matches", "one_line", "pages", "window"]
_PAGE_SLACK = 200
_FUZZY_OVERLAP = 0.8


def pages(text: str, page_chars: int) -> list[str]:
    """The text in pages of at most `page_chars`, cut at a space or line end where one is near. At least one page."""
    found = []
    start = 0
    while len(text) - start > page_chars:
        end = start + page_chars
        slack = min(_PAGE_SLACK, page_chars // 4)
        gap = max(text.rfind(" ", end - slack, end), text.rfind("\n", end - slack, end))
        end = gap + 1 if gap >= 0 else end
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]


def matches(text: str, pattern: str, *, limit: int, context_chars: int, fuzzy: bool = False) -> list[str]:
    """Contexts of a pattern in a text, in order: case-insensitive exact matches, overlapping ones too.

    With `fuzzy`, and fewer than `limit` of them, also windows that share 0.8 of the pattern's words
    (CaRR's tool server: window = pattern + 10 characters, step = pattern + 5, none within 200 characters of another).
    """
    spans: list[tuple[int, int]] = []
    low, sought = _cased(text), _cased(pattern)
    at = low.find(sought)
    while at >= 0 and len(spans) < limit:  # a regular expression would be quadratic on a crafted page
        spans.append((at, at + len(sought)))
        at = low.find(sought, at + 1)
    needed = Counter(words(pattern))
    if fuzzy and len(spans) < limit and len(pattern) >= 3 and needed:
        size, step = len(pattern) + 10, len(pattern) + 5
        for start in range(0, len(text), step):
            if len(spans) == limit:
                break
            shared = sum((Counter(words(text[start : start + size])) & needed).values())
            near = any(abs(start - kept) < 200 for kept, _ in spans)
            if shared >= _FUZZY_OVERLAP * sum(needed.values()) and not near:
                spans.append((start, min(len(text), start + size)))
    return [text[max(0, s - context_chars) : e + context_chars] for s, e in sorted(spans)]


def _cased(text: str) -> str:
    """The text in one case, as long as it is."""
    return text.replace("İ", "i").lower().replace("ς", "σ")
