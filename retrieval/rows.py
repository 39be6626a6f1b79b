"""Which document, and which part of its text, a row of an index stands for: memory-mapped, shared by all processes of a node.

Invariants: documents are numbered in order of id and rows in order of document and place, so the order of rows breaks ties as
the order of ids would; when documents are whole, row and document number are the same and no passages are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from agents.types import Hit
from retrieval.engine import Found
from retrieval.errors import RetrievalError

_IDS, _ENDS, _PASSAGES = "ids.utf8", "id_ends.i64", "passages.u32"
_FLUSH = 1 << 16
MAX_TEXT = (1 << 32) - 1
"""Offsets are stored in 32 bits."""


class Rows:
    """An open table."""

    def __init__(self, directory: str | Path) -> None:
        """Opens the table in a folder. Raises RetrievalError."""
        directory = Path(directory)
        try:
            # plain arrays over the maps: `memmap` objects cost microseconds at every access
            self._ids = np.asarray(np.memmap(directory / _IDS, dtype=np.uint8, mode="r")).data
            self._ends_N = np.asarray(np.memmap(directory / _ENDS, dtype="<i8", mode="r"))
            self._passages_P3: np.ndarray | None = None
            """uint32 [row, (document number, start, end)]"""
            if (directory / _PASSAGES).exists():
                self._passages_P3 = np.asarray(np.memmap(directory / _PASSAGES, dtype="<u4", mode="r")).reshape(-1, 3)
            whole = int(self._ends_N[-1]) == len(self._ids)
        except (OSError, ValueError) as error:
            raise RetrievalError(f"the rows of index {directory} cannot be read ({error}); build it again") from None
        if not whole:
            raise RetrievalError(f"the rows of index {directory} are cut off; build it again")
        self.num_documents = len(self._ends_N)
        self.num_rows = self.num_documents if self._passages_P3 is None else len(self._passages_P3)

    @property
    def chunked(self) -> bool:
        """Whether a document may have several rows."""
        return self._passages_P3 is not None

    @staticmethod
    def write(directory: str | Path, documents: Iterable[tuple[str, Sequence[tuple[int, int]] | None]]) -> None:
        """Stores (id, spans) of documents in order of id; spans are None for all or for none of them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        ends: list[int] = []
        table: list[tuple[int, int, int]] = []
        end = 0
        with (
            (directory / _IDS).open("wb") as ids_file,
            (directory / _ENDS).open("wb") as ends_file,
            (directory / _PASSAGES).open("wb") as passages_file,
        ):

            def flush() -> None:
                # not by `tofile`, whose error does not say that a disk is full
                ends_file.write(np.array(ends, dtype="<i8").tobytes())
                passages_file.write(np.array(table, dtype="<u4").tobytes())
                ends.clear()
                table.clear()

            for number, (id_, spans) in enumerate(documents):
                encoded = id_.encode()
                ids_file.write(encoded)
                end += len(encoded)
                ends.append(end)
                if spans is not None:
                    table += [(number, start, stop) for start, stop in spans]
                if len(ends) + len(table) >= _FLUSH:
                    flush()
            flush()
            chunked = passages_file.tell() > 0
        if not chunked:
            (directory / _PASSAGES).unlink()

    def id(self, number: int) -> str:
        """Id of a document."""
        start = int(self._ends_N[number - 1]) if number else 0
        return str(self._ids[start : int(self._ends_N[number])], "utf-8")

    def place(self, row: int) -> tuple[int, tuple[int, int] | None]:
        """(document number, span of the passage); the span is None when documents are whole."""
        if self._passages_P3 is None:
            return row, None
        number, start, end = self._passages_P3[row].tolist()
        return number, (start, end)

    def hits(self, found: Found, k: int) -> list[Hit]:
        """The best k distinct documents, each by its best passage."""
        rows_K, scores_K = found.rows_K, found.scores_K
        spans: list[tuple[int, int] | None]
        if self._passages_P3 is None:
            numbers_K, scores_K, spans = rows_K[:k], scores_K[:k], [None] * len(rows_K[:k])
        else:
            places_K3 = self._passages_P3[rows_K]
            _, first = np.unique(places_K3[:, 0], return_index=True)
            best_K = np.sort(first)[:k]
            numbers_K, scores_K = places_K3[best_K, 0].astype(np.int64), scores_K[best_K]
            spans = [(start, end) for start, end in places_K3[best_K, 1:].tolist()]
        ends = self._ends_N[numbers_K].tolist()
        starts = np.where(numbers_K > 0, self._ends_N[numbers_K - 1], 0).tolist()
        ids = [str(self._ids[start:end], "utf-8") for start, end in zip(starts, ends, strict=True)]
        return [Hit(id_, score, span) for id_, score, span in zip(ids, scores_K.tolist(), spans, strict=True)]

    def run(self, first_row: int, num_rows: int) -> Iterator[tuple[int, list[tuple[int, int] | None]]]:
        """(document number, spans of those of its passages that are in the run) of the rows that follow each other."""
        last = first_row + num_rows
        if self._passages_P3 is None:
            for number in range(first_row, last):
                yield number, [None]
            return
        blocks = (self._passages_P3[i : min(i + _FLUSH, last)].tolist() for i in range(first_row, last, _FLUSH))
        for number, places in groupby(chain.from_iterable(blocks), key=itemgetter(0)):
            yield number, [(start, end) for _, start, end in places]
