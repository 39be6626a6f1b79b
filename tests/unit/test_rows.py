"""Rows: what an index finds becomes documents, in memory that processes share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Hit
from retrieval.engine import Found
from retrieval.errors import RetrievalError
from retrieval.rows import Rows


def found(*pairs: tuple[int, float]) -> Found:
    return Found(np.array([r for r, _ in pairs], dtype=np.int64), np.array([s for _, s in pairs], dtype=np.float64))


def test_whole_documents_are_their_rows(tmp_path: Path) -> None:
    Rows.write(tmp_path, [("a", None), ("é/東", None), ("z", None)])
    rows = Rows(tmp_path)
    assert (rows.num_documents, rows.num_rows, rows.chunked) == (3, 3, False)
    assert [rows.id(i) for i in range(3)] == ["a", "é/東", "z"]
    assert rows.hits(found((1, 0.5), (2, 0.5), (0, 0.25)), 2) == [Hit("é/東", 0.5), Hit("z", 0.5)]
    assert list(rows.run(1, 2)) == [(1, [None]), (2, [None])]


def test_a_document_is_found_once_by_its_best_passage(tmp_path: Path) -> None:
    Rows.write(tmp_path, [("a", [(0, 5), (5, 9)]), ("b", [(0, 3)]), ("c", [(0, 4), (2, 7), (7, 8)])])
    rows = Rows(tmp_path)
    assert (rows.num_documents, rows.num_rows, rows.chunked) == (3, 6, True)
    best = found((4, 0.9), (1, 0.8), (3, 0.8), (0, 0.7), (2, 0.1))
    assert rows.hits(best, 3) == [Hit("c", 0.9, (2, 7)), Hit("a", 0.8, (5, 9)), Hit("b", 0.1, (0, 3))]
    assert rows.hits(best, 1) == [Hit("c", 0.9, (2, 7))] and rows.hits(found(), 3) == []
    assert list(rows.run(1, 4)) == [(0, [(5, 9)]), (1, [(0, 3)]), (2, [(0, 4), (2, 7)])]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), st.integers(1, 4)),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[str, int]], chunked: bool
) -> None:
    spans = [[(i, i + n) for i in range(n)] if chunked else None for _, n in documents]
    folder = tmp_path_factory.mktemp("rows")
    Rows.write(folder, [(id_, s) for (id_, _), s in zip(documents, spans, strict=True)])
    rows = Rows(folder)
    assert [rows.id(i) for i in range(rows.num_documents)] == [id_ for id_, _ in documents]
    assert list(rows.run(0, rows.num_rows)) == [(i, s or [None]) for i, s in enumerate(spans)]
    flat = [(i, span) for i, s in enumerate(spans) for span in (s or [None])]
    assert [rows.place(row) for row in range(rows.num_rows)] == flat


def test_files_that_are_missing_or_cut_off_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="cannot be read") as caught:
        Rows(tmp_path)
    assert "\n" not in str(caught.value)
    Rows.write(tmp_path, [("abc", None), ("def", None)])
    (tmp_path / "ids.utf8").write_bytes(b"abcd")
    with pytest.raises(RetrievalError, match="cut off"):
        Rows(tmp_path)
