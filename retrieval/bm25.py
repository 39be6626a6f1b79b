"""BM25 by bm25s, with Lucene's formula and English stemming.

Invariants: rows are in order of document id, so equal scores are ordered by id; query terms are summed in sorted order, so
a score depends on the terms alone; documents without any query term are not found.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import bm25s
import numpy as np

from retrieval.analysis import analyzer
from retrieval.errors import IndexMismatch, RetrievalError

# bm25s sets its own logger to DEBUG, which any handler of the program would then print
logging.getLogger("bm25s").setLevel(logging.WARNING)

_FOLDER, _IDS = "bm25", "ids.json"


class Bm25Index:
    """An index over analysed documents."""

    def __init__(self, index: bm25s.BM25 | None, ids: Sequence[str], language: str) -> None:
        stored = int(index.scores["num_docs"]) if index is not None else len(ids)
        if stored != len(ids):
            raise IndexMismatch(f"the index holds {stored} documents but {len(ids)} ids; build it again")
        self._index = index
        """None when no document has a single term: nothing can be found."""
        self.ids = list(ids)
        self._terms = analyzer(language)
        self._language = language

    @classmethod
    def build(
        cls, texts: Iterable[str], ids: Sequence[str], *, k1: float = 1.2, b: float = 0.75, language: str = "english"
    ) -> Bm25Index:
        """Indexes texts, given in the order of `ids`, which must be sorted."""
        if list(ids) != sorted(ids):
            raise ValueError("ids must be sorted")
        terms = analyzer(language)
        vocabulary: dict[str, int] = {}
        rows = [[vocabulary.setdefault(t, len(vocabulary)) for t in terms(text)] for text in texts]
        if not vocabulary:
            return cls(None, ids, language)
        index = bm25s.BM25(method="lucene", k1=k1, b=b)
        index.index((rows, vocabulary), show_progress=False)
        return cls(index, ids, language)

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """(document id, score) of the best k documents with a score above 0, best first."""
        if self._index is None:
            return []
        terms = [t for t in sorted(self._terms(text)) if t in self._index.vocab_dict]
        if not terms:
            return []
        scores_N = np.asarray(self._index.get_scores(terms))
        # only documents with a query term: selecting among thousands of equal zeros takes numpy milliseconds
        rows = np.flatnonzero(scores_N > 0)
        if len(rows) > k:
            found = scores_N[rows]
            # all that reach the k-th score, so that a tie at the edge is broken by id and not by chance
            rows = rows[found >= np.partition(found, len(found) - k)[len(found) - k]]
        best = rows[np.argsort(-scores_N[rows], kind="stable")][:k]
        return [(self.ids[i], float(scores_N[i])) for i in best]

    def save(self, directory: str | Path) -> None:
        """Writes the index and its ids into a folder."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._index is not None:
            self._index.save(str(directory / _FOLDER), show_progress=False)
        (directory / _IDS).write_text(
            json.dumps({"language": self._language, "ids": self.ids}, ensure_ascii=False), encoding="utf-8"
        )

    @classmethod
    def load(cls, directory: str | Path) -> Bm25Index:
        """Opens a saved index, memory-mapped. Raises RetrievalError."""
        directory = Path(directory)
        try:
            stored = json.loads((directory / _IDS).read_text(encoding="utf-8"))
            folder = directory / _FOLDER
            index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False) if folder.exists() else None
            return cls(index, stored["ids"], stored["language"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RetrievalError(f"index {directory} cannot be read ({error}); build it again") from None
