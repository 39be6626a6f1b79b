"""Cuts texts into passages, as character offsets into the text.

Invariants: passages follow each other, cover the whole text without a gap, and are not empty unless the text is; consecutive ones
share exactly `overlap` words (or characters); none is longer than `size`. A cut goes to the end of a paragraph, sentence or
word in the last fifth of a full passage when there is one, in this order of preference.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

UNITS = ("none", "words", "characters")
_WORD = re.compile(r"\S+")
_BREAKS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"""[.!?]["'”’)\]]*\s+|[。！？]["'”’)\]」』]*\s*"""),
    re.compile(r"\s+"),
)


@dataclass
class ChunkConfig:
    """How documents are cut into passages. A passage is indexed with the title of its document."""

    unit: str = "none"
    """What `size` and `overlap` count: `words`, `characters`, or `none`: documents stay whole."""
    size: int = 200
    """Longest passage."""
    overlap: int = 0
    """How much of a passage the next one repeats; at most half of `size`."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"chunk unit is {self.unit!r}; it must be one of {', '.join(UNITS)}")
        if self.size < 1:
            raise ValueError(f"chunk size is {self.size}; it must be at least 1")
        if not 0 <= self.overlap <= self.size // 2:
            raise ValueError(f"chunk overlap is {self.overlap}; it must be 0 to {self.size // 2}, half of the size")


def passages(text: str, config: ChunkConfig) -> list[tuple[int, int]]:
    """(start, end) of each passage, in order; a short or empty text is one passage."""
    if config.unit == "none":
        return [(0, len(text))]
    words = config.unit == "words"
    starts: Sequence[int] = [m.start() for m in _WORD.finditer(text)] if words else range(len(text))
    first, found = 0, []
    while True:
        last = min(first + config.size, len(starts))
        if last < len(starts):
            earliest = first + config.size - config.size // 5
            last = _cut(text, starts, earliest, last)
        found.append((starts[first] if first else 0, starts[last] if last < len(starts) else len(text)))
        if last == len(starts):
            return found
        first = last - config.overlap


def _cut(text: str, starts: Sequence[int], earliest: int, latest: int) -> int:
    """The unit before which a passage ends: after the last of the best kind of break, else as late as allowed."""
    low, high = starts[earliest], starts[latest]
    for kind in _BREAKS:
        for match in reversed(list(kind.finditer(text, max(0, low - 8), high))):
            if low <= match.end():
                return min(bisect_left(starts, match.end()), latest)
    return latest
