"""How text becomes terms, for the sparse index, the hashing encoder and snippets alike.

Invariants: pure and stable across processes and machines; case and Unicode form do not matter (NFKC, case folding); a
Chinese or Japanese ideograph is a term of its own. `ANALYSIS` changes whenever the terms change: it is part of index
fingerprints.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

ANALYSIS = "nfkc-casefold-words-1"
"""Version of the rules of `words`; part of every index fingerprint."""

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+(?:['\u2019][^\W_{_IDEOGRAPH}]+)*")
_POSSESSIVE = re.compile(r"['\u2019]s$")

_STOPWORDS_ENGLISH = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOPWORDS_ENGLISH = frozenset(_STOPWORDS_ENGLISH.split())
"""The short list that Lucene's English analyzer drops."""


def words(text: str) -> list[str]:
    """Terms of a text, in order, with repetitions: case-folded words without possessive endings, single ideographs."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [_POSSESSIVE.sub("", w) for w in _WORD.findall(folded)]


def stems(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, stem) of each word where it stands in the text."""
    for match in _WORD.finditer(text):
        yield match.start(), match.end(), stem(_POSSESSIVE.sub("", match.group().casefold()))


def analyzer(language: str) -> Callable[[str], list[str]]:
    """The term function of a language: `english` stems (Snowball) and drops stop words; `none` is `words`.

    Raises ValueError that names the known languages.
    """
    if language == "none":
        return words
    if language == "english":
        return _english
    raise ValueError(f"unknown language {language!r}; known: english, none")


def _english(text: str) -> list[str]:
    return [stem(w) for w in words(text) if w not in STOPWORDS_ENGLISH]


_local = threading.local()


@lru_cache(maxsize=200_000)
def stem(word: str) -> str:
    """English Snowball stem of one case-folded word."""
    stemmer: Any = getattr(_local, "english", None)
    if stemmer is None:
        import Stemmer  # PyStemmer

        # a stemmer object must not be shared between threads
        stemmer = _local.english = Stemmer.Stemmer("english")
    return str(stemmer.stemWord(word))


def indexed_text(title: str, text: str, title_weight: int) -> str:
    """What an index sees of a document: the title `title_weight` times, then the text."""
    return "\n".join([title] * title_weight + [text])
