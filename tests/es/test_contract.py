"""Elasticsearch passes what every backend must, in each mode; and what is its own: passages, alias, manifest, errors."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.types import Document, Query
from retrieval.backend import BackendConfig, build_backend
from retrieval.chunks import ChunkConfig
from retrieval.elastic import ElasticBackend, calls, open_backend
from retrieval.elastic_index import ElasticConfig
from retrieval.elastic_load import load
from retrieval.encoders import EncoderConfig, HashingEncoder
from retrieval.errors import BadQuery, CorpusError, DeadlineExceeded, IndexMismatch, RetrievalError
from retrieval.hybrid import HybridConfig
from tests.es.conftest import elastic
from tests.support.backend_contract import BackendContract, Build, corpus, ordered
from tests.support.elasticsearch_server import Access

numbers = itertools.count()


class Queries:
    """An encoder of queries."""

    def __init__(self, encoder: HashingEncoder) -> None:
        self._encoder = encoder

    async def encode(self, texts: Iterable[str]) -> np.ndarray:
        return self._encoder.encode_queries(list(texts))

    async def close(self) -> None:
        pass


def build(config: ElasticConfig, documents: Iterable[Document], chunk: ChunkConfig | None = None) -> ElasticBackend:
    documents = list(documents)
    encoder = HashingEncoder(EncoderConfig(dim=256, idf=False))
    load(config, lambda: documents, encoder=encoder, chunk=chunk)
    return reopen(config, chunk)


def reopen(config: ElasticConfig, chunk: ChunkConfig | None = None, dim: int = 256, **asked: Any) -> ElasticBackend:
    encoder = HashingEncoder(EncoderConfig(dim=dim, idf=False))
    return open_backend(config, encoder=Queries(encoder), encoder_spec=encoder.spec(), dims=dim, chunk=chunk, **asked)  # type: ignore[arg-type]


@pytest.fixture
def fresh(access: Access) -> Callable[..., ElasticConfig]:
    """Configurations of indexes that nobody used before."""
    return lambda **settings: elastic(access, f"i{next(numbers)}", **settings)


class TestElasticsearch(BackendContract):
    @pytest.fixture(params=["bm25", "pretokenised", "dense", "hybrid"])
    def build(self, request: pytest.FixtureRequest, fresh: Callable[..., ElasticConfig]) -> Build:
        settings = {"mode": request.param, "index_options": "flat"}
        if request.param == "pretokenised":
            settings |= {"mode": "bm25", "analyzer": "pretokenised", "shards": 2}
        # the same corpus under one alias is loaded once, so most tests only open it
        config = elastic(request.getfixturevalue("access"), f"contract-{request.param}", **settings)
        return lambda documents: build(config, documents)


async def test_chunked_documents_are_found_by_their_best_passage(fresh: Callable[..., ElasticConfig]) -> None:
    filler = "gupa deki lomo ratu sefi "
    documents = [Document(f"d{i}", f"Title{i}", filler * 8 + f"needle{i} here. " + filler * 8) for i in range(12)]
    chunk = ChunkConfig(unit="words", size=10)
    for mode in ("bm25", "dense", "hybrid"):
        backend = build(fresh(mode=mode), documents, chunk)
        (hits,) = await backend.search([Query("needle7 here", k=5)])
        assert hits[0].doc_id == "d7" and hits[0].span is not None
        assert "needle7" in documents[7].text[slice(*hits[0].span)]
        assert len({h.doc_id for h in hits}) == len(hits) == 5 and hits == ordered(hits)
        assert await backend.get(["d7", "d7\x1f1"]) == [documents[7], None]
        assert backend.info().num_docs == 12
        await backend.close()


async def test_an_index_folder_may_name_elasticsearch(fresh: Callable[..., ElasticConfig], tmp_path: Path) -> None:
    elasticsearch = fresh(mode="hybrid", index_options="flat")
    config = BackendConfig(kind="elasticsearch", elasticsearch=elasticsearch, encoder=EncoderConfig(dim=64))
    built = build_backend(config, corpus(), tmp_path / "index")
    queries = [Query(d.text, k=3) for d in corpus()[:5]]
    found = await built.search(queries)
    patient = replace(config, elasticsearch=replace(elasticsearch, timeout_s=60.0))
    opened = build_backend(patient, directory=tmp_path / "index")
    assert await opened.search(queries) == found and [f[0].doc_id for f in found] == [d.id for d in corpus()[:5]]
    assert opened.info() == built.info()
    both = replace(config, kind="hybrid", hybrid=HybridConfig(legs=["bm25", "elasticsearch"]))
    fused = build_backend(both, corpus(), tmp_path / "both")
    assert (await fused.search(queries))[0][0].doc_id == corpus()[0].id
    for backend in (built, opened, fused):
        await backend.close()
    with pytest.raises(IndexMismatch, match=r"k1: built with 1\.2, asked for 2\.0"):
        build_backend(replace(config, elasticsearch=replace(elasticsearch, k1=2.0)), directory=tmp_path / "index")


async def test_flat_vectors_agree_with_numpy(fresh: Callable[..., ElasticConfig]) -> None:
    documents = corpus()
    encoder = HashingEncoder(EncoderConfig(dim=256, idf=False))
    backend = build(fresh(mode="dense", index_options="flat"), documents)
    vectors = encoder.encode_documents(["\n".join([d.title, d.title, d.text]) for d in documents])
    queries = [d.text[:40] for d in documents[:10]]
    for query, hits in zip(queries, await backend.search([Query(q, k=10) for q in queries]), strict=True):
        scores = vectors @ encoder.encode_queries([query])[0]
        found = {h.doc_id: h.score for h in hits}
        assert list(found.values()) == pytest.approx(sorted(scores, reverse=True)[:10], abs=1e-5)
        assert all(scores[[d.id for d in documents].index(i)] == pytest.approx(s, abs=1e-5) for i, s in found.items())
    await backend.close()


async def test_a_new_corpus_takes_the_alias_and_open_backends_keep_theirs(fresh: Callable[..., ElasticConfig]) -> None:
    config = fresh()
    old = build(config, corpus(40))
    again = load(config, lambda: corpus(40))
    assert (again.resumed, again.documents, again.passages) == (40, 40, 40)
    new = build(config, corpus(50))
    assert (old.info().num_docs, new.info().num_docs) == (40, 50)
    assert len((await old.search([Query("zupero", k=99)]))[0]) == 10
    third = build(replace(config, delete_old=True), corpus(45))
    with pytest.raises(RetrievalError, match="has no index"):
        await new.search([Query("zupero")])
    for backend in (old, new, third):
        await backend.close()


async def test_a_load_that_fails_leaves_the_old_index_serving(fresh: Callable[..., ElasticConfig]) -> None:
    config = fresh()
    first = build(config, corpus(40))
    broken = [*corpus(40), Document("too long", "t", "x", {}), Document("twice", "a", "b"), Document("twice", "a", "b")]
    with pytest.raises(RetrievalError, match=r"holds 42 passages, the corpus has 43: two documents share an id"):
        load(config, lambda: broken)
    with pytest.raises(CorpusError, match="no documents"):
        load(config, list)
    assert reopen(config).info() == first.info()
    await first.close()


def test_refused_documents_are_named(fresh: Callable[..., ElasticConfig]) -> None:
    class Short(HashingEncoder):
        def encode_documents(self, texts: Iterable[str]) -> np.ndarray:
            return super().encode_documents(list(texts))[:, :100]

    with pytest.raises(
        RetrievalError, match=r"refused 5 of 5 documents: 'd0' \(400 document_parsing.*and 2 more; mend"
    ):
        documents = [Document(f"d{i}", "t", "some words") for i in range(5)]
        load(fresh(mode="dense"), lambda: documents, encoder=Short(EncoderConfig(dim=128, idf=False)))


def test_an_index_that_does_not_fit_is_refused_with_both_values(fresh: Callable[..., ElasticConfig]) -> None:
    config = fresh(mode="hybrid")
    build(config, corpus(20))
    for settings, asked, message in (
        ({"k1": 2.0}, {}, r"text\.k1: built with 1\.2, asked for 2\.0"),
        ({"analyzer": "simple"}, {}, r"text\.analyzer: built with 'standard', asked for 'simple'"),
        ({"index_options": "flat"}, {}, r"vectors\.index_options: built with 'hnsw', asked for 'flat'"),
        ({}, {"dim": 128}, r"vectors\.dims: built with 256, asked for 128"),
        ({}, {"title_weight": 3}, "title_weight: built with 2, asked for 3"),
        ({}, {"chunk": ChunkConfig("words", 50)}, r"chunk\.size: built with None, asked for 50"),
        ({}, {"corpus": "abc"}, r"corpus: built with '\w+', asked for 'abc'"),
    ):
        with pytest.raises(IndexMismatch, match=message):
            reopen(replace(config, **settings), **asked)
    only_text = fresh()
    build(only_text, corpus(20))
    with pytest.raises(IndexMismatch, match="vectors: built without, asked for with"):
        reopen(replace(only_text, mode="dense"))
    with pytest.raises(RetrievalError, match="needs an encoder"):
        open_backend(config)


def test_indexes_that_are_not_ours_or_not_whole_are_refused(fresh: Callable[..., ElasticConfig]) -> None:
    config = fresh()
    with pytest.raises(RetrievalError, match=r"has no index .*404.*load a corpus into it first"):
        open_backend(config)
    with calls(config) as client:
        client.indices.create(index=config.index, mappings={"properties": {"body": {"type": "text"}}})
        with pytest.raises(IndexMismatch, match="was not loaded by Gumshoe"):
            open_backend(config)
        with pytest.raises(RetrievalError, match="is an index, not an alias"):
            load(config, lambda: corpus(20))
        loaded = fresh()
        index = load(loaded, lambda: corpus(20)).index
        client.delete(index=index, id="tie1", refresh=True)
        with pytest.raises(IndexMismatch, match="holds 19 passages, was loaded with 20"):
            open_backend(loaded)
        meta = client.indices.get_mapping(index=index)[index]["mappings"]["_meta"]
        wrong = {"doc": {"type": "keyword"}, "body": {"type": "keyword"}}
        odd = fresh().index
        client.indices.create(index=odd, mappings={"properties": wrong, "_meta": meta})
        with pytest.raises(IndexMismatch, match=r"field body\.type: expected 'text', found 'keyword'"):
            open_backend(replace(loaded, index=odd))
        meta["gumshoe"]["passages"] = None
        client.indices.put_mapping(index=index, meta=meta)
        with pytest.raises(IndexMismatch, match="not loaded to its end; start the same load again"):
            open_backend(loaded)


def test_a_missing_analyzer_is_named_with_those_tried(fresh: Callable[..., ElasticConfig]) -> None:
    config = fresh(analyzer="klingon")
    with pytest.raises(
        RetrievalError, match=r"has no analyzer 'klingon'; of those tried it has standard, simple, whitespace"
    ):
        load(config, lambda: corpus(20))
    config = replace(config, analyzer_fallback="standard")
    load(config, lambda: corpus(20))
    assert open_backend(config).info().num_docs == 20


async def test_a_request_that_takes_too_long_ends_with_its_deadline(fresh: Callable[..., ElasticConfig]) -> None:
    config = fresh()
    build(config, corpus(20))
    backend = open_backend(config)
    backend._config = replace(config, timeout_s=0.000001)
    with pytest.raises(DeadlineExceeded, match="gave no answer in 1e-06 s"):
        await backend.search([Query("zupero")])
    await backend.close()


async def test_a_query_with_too_many_words_is_refused(fresh: Callable[..., ElasticConfig]) -> None:
    backend = build(fresh(), corpus(20))
    with pytest.raises(BadQuery, match=r"more words than Elasticsearch at .* takes .*; shorten it"):
        await backend.search([Query(" ".join(f"w{i}" for i in range(100_000)))])
    await asyncio.gather(*(backend.close() for _ in range(2)))
