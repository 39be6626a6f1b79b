"""The sparse index: its formula, its ties, its analysis, what is stored."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import sparse
from retrieval import bm25
from retrieval.analysis import STOPWORDS_ENGLISH, analyzer, words
from retrieval.bm25 import Bm25Config, Bm25Engine
from retrieval.engine import Queries
from retrieval.errors import IndexMismatch, RetrievalError


def engine(folder: Path, texts: Sequence[str], language: str = "none") -> Bm25Engine:
    return bm25.build(Bm25Config(language), folder, lambda: iter(texts), None, len(texts))


def search(index: Bm25Engine, text: str, k: int) -> list[tuple[int, float]]:
    found = index.search(Queries((text,)), k)[0]
    assert found.rows_K.dtype == np.int64 and found.scores_K.dtype == np.float64
    return list(zip(found.rows_K.tolist(), found.scores_K.tolist(), strict=True))


def test_scores_follow_lucenes_formula(tmp_path: Path) -> None:
    index = engine(tmp_path, ["cat dog", "cat cat bird fish", "fish"])
    # idf(cat) = ln(1 + (3 - 2 + 0.5) / (2 + 0.5)); average length 7/3
    idf = math.log(1 + 1.5 / 2.5)

    def score(tf: int, length: int) -> float:
        return idf * 2.2 * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * length / (7 / 3)))

    found = search(index, "Cat unknown", 5)
    assert [row for row, _ in found] == [1, 0]
    assert [s for _, s in found] == pytest.approx([score(2, 4), score(1, 2)], rel=1e-5)
    twice = search(index, "cat cat", 5)
    assert [s for _, s in twice] == pytest.approx([2 * s for _, s in found], rel=1e-5)


def test_texts_without_terms_are_neither_found_nor_find_anything(tmp_path: Path) -> None:
    index = engine(tmp_path / "a", ["the of", "!", "", "running shoes"], "english")
    assert [row for row, _ in search(index, "he runs", 10**9)] == [3]
    for text in ("", "?!", "the", "unheard of", "\x00", "a" * 100_000):
        assert search(index, text, 3) == []
    assert search(engine(tmp_path / "b", ["", "the"], "english"), "the", 3) == []
    assert search(engine(tmp_path / "c", []), "word", 3) == []


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), min_size=1, max_size=60), st.integers(1, 9), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_rows_come_by_score_and_ties_by_row(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], k: int, many: bool
) -> None:
    # few words and many copies, so that ties at the k-th place are the rule
    rows = [" ".join(t) for t in texts] * (5 if many else 1)
    index = engine(tmp_path_factory.mktemp("index"), rows)
    whole = search(index, "a b c", len(rows))
    assert [row for row, _ in whole] == sorted((row for row, _ in whole), key=lambda r: (-dict(whole)[r], r))
    assert {row for row, _ in whole} == {row for row, text in enumerate(rows) if set("abc") & set(text)}
    for row, text in enumerate(rows):  # equal texts score equally
        assert dict(whole).get(row) == dict(whole).get(rows.index(text))
    assert search(index, "a b c", k) == whole[:k]
    assert index.search(Queries(("b", "a b c", "")), k)[1].scores_K.tolist() == [s for _, s in whole[:k]]


def test_several_segments_rank_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.zipf(1.3, 40) if i < 10**7) for _ in range(12_000)] * 2
    one = engine(tmp_path / "one", texts)
    monkeypatch.setattr(bm25, "_HEAP", 15_000_000)
    several = engine(tmp_path / "several", texts)
    assert (one._searcher.num_segments, several._searcher.num_segments > 1) == (1, True)
    for query in texts[:30]:
        assert search(one, query[:60], 7) == search(several, query[:60], 7)


def test_a_stored_index_is_opened_without_its_texts_and_can_be_copied(tmp_path: Path) -> None:
    texts = [f"runner number {i} of the {i % 3} cities" for i in range(50)]
    built = engine(tmp_path / "index", texts, "english")
    built.save(tmp_path / "index")
    built.save(tmp_path / "copy")
    (tmp_path / "index").rename(tmp_path / "moved")
    for folder in ("moved", "copy"):
        opened = bm25.load(Bm25Config(), tmp_path / folder)
        assert (opened.num_rows, opened.spec()) == (50, built.spec())
        assert search(opened, "running to city 2", 9) == search(built, "running to city 2", 9) != []
    assert built.wants_vectors is False


def test_what_is_no_index_is_refused_in_one_line(tmp_path: Path) -> None:
    for name, content in (("missing", None), ("empty", ""), ("broken", "{")):
        if content is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "meta.json").write_text(content)
        with pytest.raises(RetrievalError, match="build it again") as caught:
            bm25.load(Bm25Config(), tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(IndexMismatch, match="holds 1 texts but 2 rows"):
        bm25.build(Bm25Config(), tmp_path / "short", lambda: iter(["one"]), None, 2)


def test_several_threads_search_at_once(tmp_path: Path) -> None:
    index = engine(tmp_path, [f"word{i % 7} other{i % 11}" for i in range(300)])
    queries = [f"word{i % 7} other{i % 5}" for i in range(40)]
    expected = [search(index, q, 5) for q in queries]
    found: list[list[list[tuple[int, float]]]] = []
    threads = [threading.Thread(target=lambda: found.append([search(index, q, 5) for q in queries])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_analysis_by_language() -> None:
    assert analyzer("english")("The runners' shoes weren't running") == ["runner", "shoe", "weren't", "run"]
    assert analyzer("german")("Die Häuser") == ["die", "haus"]
    assert analyzer("none")("The runners") == ["the", "runners"]
    assert not set(analyzer("english")(" ".join(STOPWORDS_ENGLISH)))
    with pytest.raises(ValueError, match=r"unknown language 'klingon'; known: .*english.*none"):
        analyzer("klingon")


@given(st.text(st.characters(codec="ascii")) | st.text(st.sampled_from("ab'sS _-.1\n\t"), max_size=30))
def test_plain_text_gives_the_words_that_any_text_would(text: str) -> None:
    # a character beyond ASCII takes the general way; this one is a word of its own
    assert words(text + " 東") == [*words(text), "東"]


def test_rankings_are_those_of_exact_bm25_over_passages_of_one_length(tmp_path: Path) -> None:
    sparse.make_corpus("passages:1500", tmp_path / "corpus", num_queries=40)
    sparse.make_reference(tmp_path / "corpus")
    sparse.measure_build("tantivy", tmp_path / "corpus", tmp_path / "index")
    figures = sparse.measure_search("tantivy", tmp_path / "corpus", tmp_path / "index")
    assert figures["exact_rankings"] == figures["overlap_at_10"] == figures["recall_at_1"] == 1
    assert figures["same_in_batches"] is True
