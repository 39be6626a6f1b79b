"""BM25 by tantivy, over terms of our own analysis: the index lies in files that are mapped into memory, not read.

tantivy scores as Lucene and Elasticsearch do, with k1 = 1.2 and b = 0.75: idf(t) * (k1 + 1) * tf / (tf + k1 * (1 - b + b * length /
mean length)), where idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5)) and a length above 40 terms is rounded down to 3 or 4 significant bits.
How it compares with other libraries is measured by `benchmarks/sparse.py`.

Invariants: rows with at least one term of the query are found, by (-score, row), however the index lies in segments; statistics
are those of all rows, so an index is never cut into shards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.analysis import ANALYSIS, analyzer
from retrieval.engine import Found, Queries
from retrieval.errors import IndexMismatch, RetrievalError

_TERMS, _ROW = "terms", "row"
_HEAP = 3_500_000_000
"""Bytes the writer may hold before it starts another segment. They are taken only as needed: 0.8 KB a passage of 60 words."""
_MARGIN = 16


@dataclass
class Bm25Config:
    """The sparse index."""

    language: str = "english"
    """`english` stems and drops stop words; another Snowball language stems; `none` takes words as they are."""


class Bm25Engine:
    """`retrieval.engine.Engine` over an index folder."""

    wants_vectors = False

    def __init__(self, config: Bm25Config, directory: Path) -> None:
        """Opens a folder. Raises RetrievalError."""
        import tantivy

        self._terms = analyzer(config.language)
        self._config, self._directory, self._schema = config, directory, _schema()
        try:
            self._searcher = tantivy.Index.open(str(directory)).searcher()
        except (OSError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise RetrievalError(f"index {directory} cannot be read ({detail}); build it again") from None
        self.num_rows = int(self._searcher.num_docs)

    def search(self, queries: Queries, k: int) -> list[Found]:
        """At most k rows of each query; none for a text without a known term."""
        return [self._search(self._terms(text), k) for text in queries.texts]

    def save(self, directory: Path) -> None:
        """The index already lies in the folder it was built in; another one gets a copy."""
        if directory.resolve() != self._directory.resolve():
            shutil.copytree(self._directory, directory, dirs_exist_ok=True)

    def spec(self) -> dict[str, Any]:
        return {"kind": "bm25", "engine": "tantivy", "language": self._config.language, "analysis": ANALYSIS}

    def _search(self, terms: list[str], k: int) -> Found:
        from tantivy import Occur, Query

        if not terms or not self.num_rows:
            return Found(np.empty(0, np.int64), np.empty(0))
        # in a fixed order, because scores are sums of float32
        parts = [(Occur.Should, Query.term_query(self._schema, _TERMS, term, "freq")) for term in sorted(terms)]
        query, k = Query.boolean_query(parts), min(k, self.num_rows)
        limit = k + _MARGIN
        while True:
            hits = self._searcher.search(query, limit, count=False).hits
            if len(hits) < limit or hits[-1][0] < hits[k - 1][0]:
                break
            limit *= 4  # more rows may tie with the k-th, and the smallest of them are wanted
        rows = self._searcher.fast_field_values(_ROW, [address for _, address in hits]) if hits else []
        rows_K, scores_K = np.array(rows, dtype=np.int64), np.array([score for score, _ in hits], dtype=np.float64)
        best = np.lexsort((rows_K, -scores_K))[:k]
        return Found(rows_K[best], scores_K[best])


def build(
    config: Bm25Config,
    directory: Path,
    texts: Callable[[], Iterator[str]],
    vectors: np.ndarray | None,
    num_rows: int,
) -> Bm25Engine:
    """Indexes `num_rows` texts, in order of row, into an empty folder. Takes no vectors. Raises RetrievalError."""
    import tantivy

    terms = analyzer(config.language)
    directory.mkdir(parents=True, exist_ok=True)
    # one thread, so that the same texts make the same segments
    writer = tantivy.Index(_schema(), path=str(directory)).writer(heap_size=_HEAP, num_threads=1)
    row = -1
    for row, text in enumerate(texts()):
        document = tantivy.Document()
        document.add_text(_TERMS, " ".join(terms(text)))
        document.add_unsigned(_ROW, row)
        writer.add_document(document)
    if row + 1 != num_rows:
        raise IndexMismatch(f"the corpus holds {row + 1} texts but {num_rows} rows; build the index again")
    writer.commit()
    writer.wait_merging_threads()
    return Bm25Engine(config, directory)


def load(config: Bm25Config, directory: Path) -> Bm25Engine:
    """The index that `build` or `save` wrote, memory-mapped. Raises RetrievalError."""
    return Bm25Engine(config, directory)


def _schema() -> Any:
    import tantivy

    fields = tantivy.SchemaBuilder()
    fields.add_text_field(_TERMS, stored=False, tokenizer_name="whitespace", index_option="freq")
    fields.add_unsigned_field(_ROW, stored=False, indexed=False, fast=True)
    return fields.build()
