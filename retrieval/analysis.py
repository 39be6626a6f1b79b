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
from functools import lru_cache, partial
from typing import Any

ANALYSIS = "nfkc-casefold-words-1"
"""Version of the rules of `words`; part of every index fingerprint."""

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+(?:['\u2019][^\W_{_IDEOGRAPH}]+)*")
_POSSESSIVE = ("'s", "\u2019s")
_ASCII_GAPS = {c: " " for c in range(128) if not chr(c).isalnum() and chr(c) != "'"}

_STOPWORDS_ENGLISH = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOPWORDS_ENGLISH = frozenset(_STOPWORDS_ENGLISH.split())
"""The short list that Lucene's English analyzer drops."""


def words(text: str) -> list[str]:
    """Terms of a text, in order, with repetitions: case-folded words without possessive endings, single ideographs."""
    if text.isascii():  # most text; the same words without the cost of Unicode
        folded = text.lower().translate(_ASCII_GAPS)
        if "'" not in folded:
            return folded.split()
    else:
        folded = unicodedata.normalize("NFKC", text).casefold()
    return [w[:-2] if w.endswith(_POSSESSIVE) else w for w in _WORD.findall(folded)]


def stems(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, stem) of each word where it stands in the text."""
    for match in _WORD.finditer(text):
        word = match.group().casefold()
        yield match.start(), match.end(), stem(word[:-2] if word.endswith(_POSSESSIVE) else word)


def term_of(language: str) -> Callable[[str], str]:
    """The rule from a word (of `words`) to its term, "" for a stop word; safe in several threads.

    `none` takes words as they are; `english` stems and drops Lucene's stop words; any other Snowball language stems.
    Raises ValueError that names the known languages.
    """
    if language == "none":
        return str
    if language == "english":
        return lambda word: "" if word in STOPWORDS_ENGLISH else stem(word)
    import Stemmer  # PyStemmer

    if language not in Stemmer.algorithms():
        known = ", ".join(sorted({*Stemmer.algorithms(), "none"}))
        raise ValueError(f"unknown language {language!r}; known: {known}")
    return partial(stem, language=language)


def analyzer(language: str) -> Callable[[str], list[str]]:
    """The term function of a language (see `term_of`): terms of a text, in order, with repetitions."""
    known = _Terms(term_of(language))
    return lambda text: list(filter(None, map(known.__getitem__, words(text))))


class _Terms(dict[str, str]):
    """Word -> term, worked out when a word is first met. Indexing a corpus asks for the same words over and over."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, word: str) -> str:
        if len(self) >= 500_000:
            self.clear()
        term = self[word] = self._rule(word)
        return term


_local = threading.local()


@lru_cache(maxsize=50_000)
def stem(word: str, language: str = "english") -> str:
    """Snowball stem of one case-folded word."""
    stemmer: Any = getattr(_local, language, None)
    if stemmer is None:
        import Stemmer  # PyStemmer

        # a stemmer object must not be shared between threads
        stemmer = Stemmer.Stemmer(language)
        setattr(_local, language, stemmer)
    return str(stemmer.stemWord(word))


def indexed_text(title: str, text: str, title_weight: int) -> str:
    """What an index sees of a document: the title `title_weight` times, then the text."""
    return "\n".join([title] * title_weight + [text])
