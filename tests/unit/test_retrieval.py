"""Encoders, indexes and backends: exactness, ties, determinism across processes, stored indexes."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Document, Query
from retrieval.analysis import analyzer, words
from retrieval.backend import (
    BackendConfig,
    Corpus,
    IndexedBackend,
    IndexFolder,
    build_backend,
    open_backend,
    prepare_folder,
)
from retrieval.build import Busy
from retrieval.chunks import ChunkConfig
from retrieval.corpus import CorpusReport
from retrieval.encoders import EncoderConfig
from retrieval.engine import Found, Queries
from retrieval.errors import BadQuery, Closed, CorpusError, IndexMismatch, RetrievalError
from retrieval.faiss_config import FaissConfig
from retrieval.hybrid import HybridConfig
from retrieval.manifest import Manifest
from retrieval.rerank import RerankConfig
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
    with pytest.raises(IndexMismatch, match=r"chunk\.unit: built with 'none', asked for 'words'"):
        build_backend(
            BackendConfig(chunk=ChunkConfig("words"), encoder=EncoderConfig(dim=64)), directory=tmp_path / "i"
        )
    with pytest.raises(ValueError, match="unknown retrieval backend 'magic'; known: auto, bm25, "):
        build_backend(BackendConfig(kind="magic"), corpus(5))
    with pytest.raises(CorpusError, match="no documents"):
        build_backend(BackendConfig(), [], tmp_path / "j")
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    (tmp_path / "i" / "documents.sqlite").unlink()
    write_documents(tmp_path / "other.jsonl", corpus(6))
    build_backend(BackendConfig(kind="bm25"), corpus(6), tmp_path / "o")
    (tmp_path / "i" / "documents.sqlite").write_bytes((tmp_path / "o" / "documents.sqlite").read_bytes())
    old, new = (Manifest.read(tmp_path / name).corpus for name in ("i", "o"))
    with pytest.raises(IndexMismatch, match=f"corpus {old}, its documents are {new}"):
        build_backend(BackendConfig(kind="faiss", encoder=EncoderConfig(dim=64)), directory=tmp_path / "i")


def test_a_folder_whose_parts_disagree_is_refused_with_both_values(tmp_path: Path) -> None:
    config = BackendConfig(encoder=EncoderConfig(dim=64))
    build_backend(config, corpus(5), tmp_path / "i")
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    for change, says in (
        ({"encoder": {**manifest["encoder"], "dim": 32}}, "encoder of index .*: dim: built with 32, found 64"),
        ({"passages": 6}, "passages: built with 6, found 5"),
        (
            {"legs": {"faiss": {**manifest["legs"]["faiss"], "spec": {"kind": "old"}}}},
            "kind: built with 'old', found 'faiss'",
        ),
        ({"format": 1}, "has format 1, this version reads 2"),
        ({"config": {"kind": "faiss", "chunks": 1}}, "another version"),
    ):
        (tmp_path / "i" / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(IndexMismatch, match=says):
            open_backend(config, tmp_path / "i")
    (tmp_path / "i" / "manifest.json").write_text("{")
    with pytest.raises(RetrievalError, match="not a readable manifest"):
        open_backend(config, tmp_path / "i")


def test_prepare_reuses_what_fits_and_rebuilds_what_does_not(tmp_path: Path) -> None:
    path, out, config = tmp_path / "c.jsonl", tmp_path / "i", BackendConfig(kind="bm25")
    write_documents(path, corpus(20))
    assert prepare_folder(config, Corpus([path]), out)
    assert not prepare_folder(config, Corpus([path]), out)
    assert not prepare_folder(config, Corpus([path], columns={"title": "title"}), out), "the same documents"
    write_documents(path, corpus(21))
    assert prepare_folder(config, Corpus([path]), out) and Manifest.read(out).documents == 21
    assert prepare_folder(BackendConfig(), Corpus([path]), out) and list(Manifest.read(out).legs) == ["faiss"]
    assert prepare_folder(BackendConfig(shards=2), Corpus([path]), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "i"]


def test_a_corpus_whose_files_were_touched_is_read_once_more_not_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, config = tmp_path / "c.jsonl", tmp_path / "i", BackendConfig(kind="bm25")
    write_documents(path, corpus(20))
    prepare_folder(config, Corpus([path]), out)
    reads, read, manifest = [], Corpus.read, (out / "manifest.json").read_bytes()

    def counted(self: Corpus, report: CorpusReport) -> Iterator[Document]:
        reads.append(1)
        return read(self, report)

    monkeypatch.setattr(Corpus, "read", counted)
    os.utime(path, (1, 1))
    assert not any(prepare_folder(config, Corpus([path]), out) for _ in range(3))
    assert len(reads) == 1
    # those who serve the folder know it by its manifest
    assert (out / "manifest.json").read_bytes() == manifest

    # while another process builds it, the corpus is read once, not at every look
    reads.clear()
    write_documents(path, corpus(21))
    turns = []

    def busy(*args: object, **more: object) -> None:
        turns.append(1)
        if len(turns) == 4:
            raise RetrievalError("enough")
        raise Busy("building")

    monkeypatch.setattr("retrieval.backend.build_folder", busy)
    monkeypatch.setattr("time.sleep", lambda s: None)
    with pytest.raises(RetrievalError, match="enough"):
        prepare_folder(config, Corpus([path]), out)
    assert len(reads) == 1


@pytest.mark.parametrize(
    "lost", ["faiss/000/vectors.npy", "bm25/000/meta.json", "rows/ids.utf8", "documents.sqlite", "encoder.npz"]
)
def test_a_damaged_folder_is_built_again(tmp_path: Path, lost: str) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "i"
    write_documents(path, corpus(20))
    config = BackendConfig(kind="hybrid", encoder=EncoderConfig(dim=64))
    prepare_folder(config, Corpus([path]), out)
    (out / lost).unlink()
    assert prepare_folder(config, Corpus([path]), out) and (out / lost).exists()
    assert not prepare_folder(config, Corpus([path]), out)


def tied(rng: random.Random, n: int) -> list[Document]:
    """Documents of few different texts, so that equal scores are the rule."""
    texts = [" ".join(rng.choices(["ka", "lo", "mi", "ru"], k=rng.randint(1, 4))) for _ in range(4)]
    return [Document(f"{rng.randrange(10**6)}-{i}", "", rng.choice(texts)) for i in range(n)]


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 40), st.booleans())
@settings(max_examples=20, deadline=None)
def test_shards_of_a_flat_index_give_what_the_whole_gives(seed: int, shards: int, k: int, chunked: bool) -> None:
    rng = random.Random(seed)
    documents = tied(rng, rng.randint(1, 60))
    chunk = ChunkConfig("words", 2) if chunked else ChunkConfig()
    config = BackendConfig(encoder=EncoderConfig(dim=64), chunk=chunk)
    queries = [Query(text, k) for text in ("ka", "lo mi", "ru ru ka", "nothing known")]
    whole, cut = build_backend(config, documents), build_backend(replace(config, shards=shards), documents)

    async def search() -> None:
        assert await whole.search(queries) == await cut.search(queries)
        assert whole.info() == cut.info()
        for backend in (whole, cut):
            await backend.close()

    asyncio.run(search())


async def test_passages_are_found_where_they_stand_and_documents_once() -> None:
    filler = "Nothing of note stands here at all. "
    documents = [
        Document("long", "Tower", filler * 20 + "The lighthouse was built by Zupero. " + filler * 20),
        Document("many", "Other", "Zupero came. " * 200),
        *(Document(f"d{i}", "Page", filler) for i in range(30)),
        Document("short", "", "Zupero came once, and somebody saw."),
        Document("empty", "Zupero", ""),
    ]
    for kind in KINDS:
        backend = build_backend(BackendConfig(kind=kind, chunk=ChunkConfig("words", 12, 3)), documents)
        (found,) = await backend.search([Query("who built the lighthouse Zupero", k=4)])
        assert found[0].doc_id == "long" and found[0].span is not None
        start, end = found[0].span
        assert "lighthouse was built by Zupero" in documents[0].text[start:end] and end - start < 120
        # `many` alone fills the first rows: more of them are fetched until k documents are there
        (found,) = await backend.search([Query("Zupero came", k=4)])
        assert [h.doc_id for h in found][:1] == ["many"] and {h.doc_id for h in found} == {
            "many",
            "short",
            "long",
            "empty",
        }
        assert next(h.span for h in found if h.doc_id == "empty") == (0, 0)
        await backend.close()


async def test_a_query_finds_the_same_in_any_company() -> None:
    class Approximate:
        """Finds other rows when it is asked for more of them, as HNSW does."""

        async def search(self, queries: Queries, k: int) -> list[Found]:
            return [Found(np.arange(k) + k, -np.arange(k, dtype=float)) for _ in queries.texts]

        async def close(self) -> None:
            pass

    real = build_backend(BackendConfig(kind="bm25"), corpus(500))
    backend = IndexedBackend(real.info(), real._pages, real._rows, [Approximate()], [0])  # type: ignore[attr-defined]
    queries = [Query("a", k) for k in (1, 5, 16, 17, 40, 100)]
    assert await backend.search(queries) == [(await backend.search([q]))[0] for q in queries]


async def test_auto_takes_all_settings_from_the_folder(tmp_path: Path) -> None:
    made = BackendConfig(
        shards=3, title_weight=1, chunk=ChunkConfig("words", 9), encoder=EncoderConfig(dim=64, idf=False)
    )
    built = build_backend(made, corpus(20), tmp_path / "i")
    opened = open_backend(BackendConfig(kind="auto"), tmp_path / "i")
    assert opened.info() == built.info() and opened.info().name == "faiss"
    queries = [Query(d.text, 3) for d in corpus(20)]
    assert await opened.search(queries) == await built.search(queries)
    # settings of the search and the number of shards need no other index
    runtime = replace(made, shards=1, faiss=FaissConfig(nprobe=3), threads=2)
    assert await open_backend(runtime, tmp_path / "i").search(queries) == await built.search(queries)
    reranked = open_backend(BackendConfig(kind="auto", rerank=RerankConfig(url="http://127.0.0.1:1")), tmp_path / "i")
    assert reranked.info().name == "faiss+rerank"
    with pytest.raises(ValueError, match="needs the folder"):
        open_backend(made, None)


def test_what_cannot_be_sharded_says_so() -> None:
    with pytest.raises(RetrievalError, match="bm25 index cannot be cut into shards; set shards=1"):
        build_backend(BackendConfig(kind="bm25", shards=2), corpus(20))


def test_a_folder_does_not_say_where_queries_and_secrets_go(tmp_path: Path) -> None:
    made = BackendConfig(
        encoder=EncoderConfig(dim=64, url="http://builder:1/v1", api_key_env="BUILDERS_KEY", batch_size=7)
    )
    build_backend(made, corpus(5), tmp_path / "i")
    manifest = tmp_path / "i" / "manifest.json"
    assert not any(word in manifest.read_text() for word in ("builder", "BUILDERS_KEY", "nprobe", "batch_size"))
    foreign = json.loads(manifest.read_text())
    foreign["config"]["encoder"] |= {"url": "http://evil/v1", "api_key_env": "MY_SECRET"}
    manifest.write_text(json.dumps(foreign))
    mine = BackendConfig(kind="auto", encoder=EncoderConfig(url="http://mine:1/v1"))
    encoder = IndexFolder(mine, tmp_path / "i").config.encoder
    assert (encoder.dim, encoder.url, encoder.api_key_env) == (64, "http://mine:1/v1", "")


def test_auto_searches_as_the_config_says(tmp_path: Path) -> None:
    made = BackendConfig(kind="hybrid", hybrid=HybridConfig(legs=["faiss", "bm25"]), encoder=EncoderConfig(dim=64))
    build_backend(made, corpus(5), tmp_path / "i")
    asked = BackendConfig(
        kind="auto",
        faiss=FaissConfig(nprobe=3, ef_search=500, refine_factor=2),
        hybrid=HybridConfig(rrf_k=9, degrade=True),
    )
    found = IndexFolder(asked, tmp_path / "i").config
    assert (found.faiss.nprobe, found.faiss.ef_search, found.faiss.refine_factor) == (3, 500, 2)
    assert (found.hybrid.rrf_k, found.hybrid.degrade, sorted(found.hybrid.legs)) == (9, True, ["bm25", "faiss"])
    one = HybridConfig(legs=["bm25", "faiss", "elasticsearch"], depth=7)
    found = IndexFolder(BackendConfig(kind="auto", hybrid=one), tmp_path / "i").config
    assert (found.hybrid.legs, found.hybrid.depth) == (["faiss", "bm25"], 7)
