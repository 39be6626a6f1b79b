"""Encoders, indexes and backends: exactness, ties, determinism across processes, stored indexes."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Document, Query
from retrieval.analysis import analyzer, words
from retrieval.backend import BackendConfig, build_backend, prepare_backend, read_manifest
from retrieval.bm25 import Bm25Index
from retrieval.encoders import EncoderConfig, HashingEncoder
from retrieval.errors import BadQuery, Closed, CorpusError, IndexMismatch, RetrievalError
from retrieval.faiss_index import FaissIndex
from tests.builders import write_documents

KINDS = ("faiss", "bm25")


def corpus(n: int = 200, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choice("bdfgklmn") + rng.choice("aeiou") for _ in range(3)) for _ in range(300)]
    return [Document(f"d{i}", rng.choice(vocabulary), " ".join(rng.choices(vocabulary, k=30))) for i in range(n)]


def test_words_fold_case_forms_and_possessives() -> None:
    assert words("Émile's  ＡＢＣ straße, 東京 don't x_y") == ["émile", "abc", "strasse", "東", "京", "don't", "x", "y"]
    assert analyzer("english")("The runners were running") == ["runner", "were", "run"]
    assert words("Москва 서울") == ["москва", "서울"]
    with pytest.raises(ValueError, match="unknown language 'klingon'"):
        analyzer("klingon")


def test_hashing_encoder_is_the_same_in_every_process() -> None:
    texts = ["Badokiru lives in Gupezo", "", "東京 tower"]
    here = HashingEncoder(EncoderConfig(dim=64)).encode_documents(texts)
    script = (
        "import json;from retrieval.encoders import *;"
        f"print(json.dumps(HashingEncoder(EncoderConfig(dim=64)).encode_documents({texts!r}).tolist()))"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert np.array_equal(here, np.array(json.loads(out.stdout), dtype=np.float32))
    assert here.dtype == np.float32
    assert np.linalg.norm(here, axis=1) == pytest.approx([1, 0, 1])


def test_hashing_encoder_weighs_rare_words_and_similar_spellings() -> None:
    encoder = HashingEncoder(EncoderConfig(dim=4096))
    encoder.fit(["common rare"] + ["common word"] * 50)
    rare, common = encoder.encode_documents(["rare thing", "common thing"])
    query = encoder.encode_queries(["common rare"])[0]
    assert query @ rare > query @ common
    plain = HashingEncoder(EncoderConfig(dim=4096, idf=False))
    name, typo, other = plain.encode_documents(["Badokiru", "Badokira", "Lomitave"])
    assert name @ typo > 0.05 > abs(name @ other)
    # tf is sublinear: three times the word weighs 1 + ln 3 against another single word
    vectors = HashingEncoder(EncoderConfig(dim=1 << 16, char_max=0)).encode_documents(["aa aa aa bb", "aa"])
    assert vectors[0] @ vectors[1] == pytest.approx((1 + math.log(3)) / math.hypot(1 + math.log(3), 1), abs=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_faiss_gives_the_exact_top_k_with_ties_by_id(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    # few distinct vectors, so that ties are the rule
    pool = rng.integers(-1, 2, (4, 8)).astype(np.float32)
    vectors = pool[rng.integers(0, 4, 60)]
    ids = [f"{i}" for i in rng.permutation(60)]
    queries = pool[:3] + 0.5
    found = FaissIndex.build(vectors, ids).search(queries, k)
    for query, hits in zip(queries, found, strict=True):
        scores = vectors.astype(np.float64) @ query.astype(np.float64)
        expected = sorted(zip(ids, scores, strict=True), key=lambda p: (-p[1], p[0]))[:k]
        assert [h[0] for h in hits] == [e[0] for e in expected]
        assert [h[1] for h in hits] == pytest.approx([e[1] for e in expected])


def test_faiss_scores_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(1)
    vectors, queries = (rng.standard_normal((n, 96)).astype(np.float32) for n in (500, 64))
    index = FaissIndex.build(vectors, [f"{i:03}" for i in range(500)])
    assert index.search(queries, 7) == [index.search(q[None], 7)[0] for q in queries]
    assert index.search(np.zeros((1, 96), dtype=np.float32), 3) == [[]]
    with pytest.raises(IndexMismatch, match="95 dimensions, the index has 96"):
        index.search(queries[:, :95], 3)


def test_bm25_matches_lucenes_formula_by_hand() -> None:
    texts = {"a": "cat dog", "b": "cat cat bird fish", "c": "fish"}
    index = Bm25Index.build(texts.values(), list(texts), k1=1.2, b=0.75, language="none")
    # idf(cat) = ln(1 + (3 - 2 + 0.5) / (2 + 0.5)); average length 7/3
    idf = math.log(1 + 1.5 / 2.5)

    def score(tf: int, length: int) -> float:
        return idf * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * length / (7 / 3)))

    found = index.search("Cat unknown", 5)
    assert [f[0] for f in found] == ["b", "a"]
    assert [f[1] for f in found] == pytest.approx([score(2, 4), score(1, 2)], rel=1e-5)
    assert index.search("nothing known", 5) == [] and index.search("", 5) == []


def test_bm25_stems_and_breaks_ties_by_id_at_the_edge() -> None:
    ids = sorted(f"d{i}" for i in range(30))
    index = Bm25Index.build(["running shoes"] * 30, ids)
    assert [i for i, _ in index.search("he runs", 7)] == ids[:7]
    assert Bm25Index.build(["the of", "!"], ["a", "b"]).search("the", 2) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_stored_and_in_memory_backends_agree(kind: str, tmp_path: Path) -> None:
    config, documents = BackendConfig(kind=kind), corpus()
    memory = build_backend(config, documents)
    stored = build_backend(config, reversed(documents), tmp_path / "i")
    opened = build_backend(config, directory=tmp_path / "i")
    queries = [Query(d.title + " " + d.text[:30], k=k) for k, d in enumerate(documents[:20], start=1)]
    results = await memory.search(queries)
    assert results == await stored.search(queries) == await opened.search(queries)
    assert results == [(await opened.search([q]))[0] for q in queries]
    assert [len(r) for r in results] == [q.k for q in queries]
    assert memory.info() == stored.info() == opened.info()
    assert sum(r[0].doc_id == d.id for r, d in zip(results[4:], documents[4:20], strict=True)) >= 14
    assert await opened.get(["d1", "no"]) == [documents[1], None]
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    await opened.close()
    await opened.close()
    with pytest.raises(Closed):
        await opened.search(queries)


@pytest.mark.parametrize("kind", KINDS)
async def test_bad_queries_are_refused(kind: str) -> None:
    backend = build_backend(BackendConfig(kind=kind), corpus(5))
    with pytest.raises(BadQuery, match="k is 0"):
        await backend.search([Query("x", k=0)])
    with pytest.raises(BadQuery, match="knows no filters, got lang"):
        await backend.search([Query("x", filters={"lang": "en"})])
    assert await backend.search([]) == []
    assert len((await backend.search([Query(corpus(5)[0].text, k=10**9)]))[0]) <= 5
    assert await backend.search([Query("?!")]) == [[]]


def test_an_index_that_does_not_fit_is_refused_with_both_values(tmp_path: Path) -> None:
    build_backend(BackendConfig(kind="faiss", encoder=EncoderConfig(dim=64)), corpus(5), tmp_path / "i")
    with pytest.raises(IndexMismatch, match=r"encoder\.dim: built with 64, asked for 128"):
        build_backend(BackendConfig(kind="faiss", encoder=EncoderConfig(dim=128)), directory=tmp_path / "i")
    with pytest.raises(IndexMismatch, match="kind: built with 'faiss', asked for 'bm25'"):
        build_backend(BackendConfig(kind="bm25"), directory=tmp_path / "i")
    with pytest.raises(RetrievalError, match="holds no index"):
        build_backend(BackendConfig(), directory=tmp_path)
    with pytest.raises(ValueError, match="unknown retrieval backend 'magic'; known: bm25, faiss"):
        build_backend(BackendConfig(kind="magic"), corpus(5))
    with pytest.raises(CorpusError, match="no documents"):
        build_backend(BackendConfig(), [], tmp_path / "j")
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    (tmp_path / "i" / "documents.sqlite").unlink()
    write_documents(tmp_path / "other.jsonl", corpus(6))
    other = build_backend(BackendConfig(kind="bm25"), corpus(6), tmp_path / "o")
    (tmp_path / "i" / "documents.sqlite").write_bytes((tmp_path / "o" / "documents.sqlite").read_bytes())
    old, new = read_manifest(tmp_path / "i")["corpus"], other.store.fingerprint
    with pytest.raises(IndexMismatch, match=f"corpus {old}, its documents are {new}"):
        build_backend(BackendConfig(kind="faiss", encoder=EncoderConfig(dim=64)), directory=tmp_path / "i")


def test_prepare_reuses_what_fits_and_rebuilds_what_does_not(tmp_path: Path) -> None:
    path, config = tmp_path / "c.jsonl", BackendConfig(kind="bm25")
    write_documents(path, corpus(20))
    first = prepare_backend(config, path, tmp_path / "i")
    made = (tmp_path / "i" / "manifest.json").stat().st_mtime_ns
    assert prepare_backend(config, path, tmp_path / "i").info() == first.info()
    assert (tmp_path / "i" / "manifest.json").stat().st_mtime_ns == made
    write_documents(path, corpus(21))
    assert prepare_backend(config, path, tmp_path / "i").info().num_docs == 21
    assert prepare_backend(BackendConfig(kind="faiss"), path, tmp_path / "i").info().name == "faiss"
