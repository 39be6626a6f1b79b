"""Which passage of a document a search shows: what the index found, or what of the text answers the query best.

Invariants: a snippet is a piece of its text put on one line, never over its limits of characters and tokens; the snippet of a snippet is
that snippet; pure functions. What an agent cites is the document's id: a search shows a document once, so the id is the same
whichever passage of it is shown.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable

from retrieval.analysis import STOPWORDS_ENGLISH, stem, stems, words

MODES = ("lead", "window")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"')\]]*\s+|(?<=[。！？])")


def snippet(
    text: str,
    query: str,
    max_chars: int,
    *,
    span: tuple[int, int] | None = None,
    mode: str = "window",
    max_tokens: int = 0,
    count_tokens: Callable[[str], int] | None = None,
) -> str:
    """What to show of a text: of the passage at `span` (character offsets) if it is given and holds text, else of all of it.

    `mode`: `window`, where the query's words are, or `lead`, the start. At most `max_chars` characters, and, if `max_tokens` is
    not 0, at most so many tokens as `count_tokens` counts; empty when not even one character fits.
    """
    passage = text[max(0, span[0]) : max(0, span[1])] if span else ""
    text = passage if passage.strip() else text
    limit = max_chars
    while limit > 0:
        found = window(text, query, limit) if mode == "window" else lead(text, limit)
        tokens = count_tokens(found) if max_tokens and count_tokens else 0
        if tokens <= max_tokens:
            return found
        limit = min(len(found) - 1, len(found) * max_tokens // tokens)
    return ""


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
    best, best_score, score = 0, -1.0, 0.0
    inside: Counter[str] = Counter()
    first = after = 0  # hits[first:after] are inside the passage; both only move on, since each passage begins later
    for start, _, _ in hits:
        # from the start of its sentence, if that leaves half of the passage for what follows
        begin = sentences[bisect_right(sentences, start) - 1]
        if start - begin > limit // 2:
            begin = start
        known = len(inside)
        while after < len(hits) and (hits[after][1] <= begin + limit or hits[after][0] < begin):
            inside[hits[after][2]] += 1
            after += 1
        changed = len(inside) > known
        while first < after and hits[first][0] < begin:
            term = hits[first][2]
            inside[term] -= 1
            if not inside[term]:
                del inside[term]
                changed = True
            first += 1
        if changed:
            score = sum(1.0 / frequency[t] for t in sorted(inside))
        if score > best_score:
            best, best_score = begin, score
    return lead(text[best:], limit)
