"""Which part of a document's text the agent reads: snippets, pages and matches. Pure functions of text.

Invariants: a snippet never exceeds its limit; the pages of a text, put together, are the text; a match's context is cut
from the text as it stands.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter

from retrieval.analysis import STOPWORDS_ENGLISH, stem, stems, words

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"')\]]*\s+|(?<=[。！？])")
_PAGE_SLACK = 200
_FUZZY_OVERLAP = 0.8


def one_line(text: str) -> str:
    """The text on one line, with single spaces."""
    return " ".join(text.split())


def lead(text: str, limit: int) -> str:
    """The start of a text, at most `limit` characters, cut after a sentence if one ends in its second half, else a word."""
    text = one_line(text)
    if len(text) <= limit:
        return text
    head = text[:limit]
    ends = [m.start() for m in _SENTENCE_END.finditer(text[: limit + 1]) if limit // 2 <= m.start() <= limit]
    if ends:
        return head[: ends[-1]].rstrip()
    if text[limit] != " " and " " in head:
        head = head[: head.rindex(" ")]
    return head.rstrip()


def window(text: str, query: str, limit: int) -> str:
    """The passage with most of the query's words, rare ones weighing more; the start of the text if it has none."""
    text = one_line(text)
    if len(text) <= limit:
        return text
    wanted = {stem(w) for w in words(query) if w not in STOPWORDS_ENGLISH}
    hits = [(start, end, term) for start, end, term in stems(text) if term in wanted]
    if not hits:
        return lead(text, limit)
    frequency = Counter(term for _, _, term in hits)
    sentences = [0] + [m.end() for m in _SENTENCE_END.finditer(text)]
    starts = [start for start, _, _ in hits]
    best, best_score = 0, -1.0
    for start in starts:
        # from the start of its sentence, if that leaves half of the passage for what follows
        begin = sentences[bisect_right(sentences, start) - 1]
        if start - begin > limit // 2:
            begin = start
        inside = hits[bisect_left(starts, begin) : bisect_right(starts, begin + limit)]
        score = sum(1.0 / frequency[t] for t in sorted({t for _, end, t in inside if end <= begin + limit}))
        if score > best_score:
            best, best_score = begin, score
    return lead(text[best:], limit)


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
    for match in re.finditer(f"(?=({re.escape(pattern)}))", text, re.IGNORECASE):
        if len(spans) == limit:
            break
        spans.append(match.span(1))
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
