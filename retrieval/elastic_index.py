"""What a corpus looks like inside Elasticsearch, and how it is asked: configuration, mapping, documents, queries, hits. Pure.

One Elasticsearch document per passage: `doc` (document id), `start` and `end` (offsets), `body` (what BM25 reads: title and passage, as
every index of ours sees them) and `vector`. The first passage of a document also carries its `page` and has the document's id, so
that pages come by id. `body` and `vector` are indexed but not kept in the source.

Invariants: the name of an index is made from all that its content depends on, so a load that was cut short finds its own work
again and never another's; hits are sorted by (-score, document id, start).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from agents.types import BackendInfo, Document, Hit
from retrieval.analysis import ANALYSIS, analyzer, indexed_text
from retrieval.chunks import ChunkConfig, passages
from retrieval.manifest import differences, digest

FORMAT = 1
MODES = ("bm25", "dense", "hybrid")
INDEX_OPTIONS = ("hnsw", "flat", "int8_hnsw", "int8_flat", "int4_hnsw", "int4_flat", "bbq_hnsw", "bbq_flat")
PRETOKENISED = "pretokenised"
WINDOW = 10_000
"""Most hits of one search, by the server's default."""
_LONGEST_ID = 480
"""Bytes; Elasticsearch takes 512."""
_SEARCH = {"runtime": True}
"""Marks what may change without loading again."""


@dataclass
class ElasticConfig:
    """Which cluster, which index, and how it is filled and asked. Secrets stand in the environment, never here."""

    urls: list[str] = field(default_factory=lambda: ["http://127.0.0.1:9200"], metadata=_SEARCH)
    """Nodes of one cluster, each with scheme and port."""
    index: str = "gumshoe"
    """Alias under which the loaded corpus serves. The indexes behind it have names of their own: this and a fingerprint."""
    mode: str = "bm25"
    """`bm25`, `dense` (nearest vectors of our encoder), or `hybrid` (both, fused by reciprocal rank)."""
    analyzer: str = "english"
    """An analyzer of the server, or `pretokenised`: our own terms, the very ones of the embedded BM25."""
    analyzer_fallback: str = ""
    """What to use where the server lacks `analyzer`; empty: refuse."""
    language: str = "english"
    """Of `pretokenised`, as for the embedded BM25."""
    k1: float = 1.2
    """BM25: how soon repeated terms stop counting."""
    b: float = 0.75
    """BM25: how much long documents are marked down."""
    index_options: str = "hnsw"
    """How vectors are kept: `flat` is exact, `hnsw` nearly, `int8_hnsw` and the like save memory and lose recall."""
    num_candidates: int = field(default=200, metadata=_SEARCH)
    """Passages that a vector search considers, at least twice those asked for; more cost time and lose less."""
    oversample: float = field(default=0.0, metadata=_SEARCH)
    """Quantised vectors: rescore this many times the candidates with full vectors; 0 leaves it to the server."""
    depth: int = field(default=100, metadata=_SEARCH)
    """Hybrid: how deep each leg is read."""
    rrf_k: int = field(default=60, metadata=_SEARCH)
    """Hybrid: a hit at rank r is worth 1 / (rrf_k + r)."""
    shards: int = 1
    replicas: int = field(default=1, metadata=_SEARCH)
    """Copies of each shard once the load is done; none while it runs."""
    api_key_env: str = field(default="", metadata=_SEARCH)
    """Name of the environment variable that holds an API key (encoded form)."""
    user_env: str = field(default="", metadata=_SEARCH)
    """Name of the environment variable that holds the user name; with `password_env`."""
    password_env: str = field(default="", metadata=_SEARCH)
    ca_certs: str = field(default="", metadata=_SEARCH)
    """PEM file of the authority that signed the cluster's certificate; empty: those the system knows."""
    verify: bool = field(default=True, metadata=_SEARCH)
    """False takes any certificate: for experiments only."""
    timeout_s: float = field(default=30.0, metadata=_SEARCH)
    """Of one request."""
    retries: int = field(default=2, metadata=_SEARCH)
    """How often a search is sent again, to another node where there is one."""
    connections: int = field(default=32, metadata=_SEARCH)
    """Most connections to a node."""
    bulk_documents: int = field(default=500, metadata=_SEARCH)
    """Most passages in one bulk request; halved while the server pushes back."""
    bulk_mb: float = field(default=8.0, metadata=_SEARCH)
    """About where a bulk request ends."""
    bulk_workers: int = field(default=2, metadata=_SEARCH)
    """Bulk requests at once, while the next one is encoded."""
    bulk_retries: int = field(default=8, metadata=_SEARCH)
    """How often a bulk request is sent again, with growing pauses, before the load gives up."""
    delete_old: bool = field(default=False, metadata=_SEARCH)
    """Delete the index that served before, once the new one does."""

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("index_options", INDEX_OPTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"retrieval.elasticsearch.{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        for name in ("num_candidates", "depth", "shards", "connections", "bulk_documents", "bulk_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"retrieval.elasticsearch.{name} is {getattr(self, name)}; it must be at least 1")
        if self.oversample and self.oversample < 1:
            raise ValueError(f"retrieval.elasticsearch.oversample is {self.oversample}; it must be 0, or 1 and more")

    @property
    def dense(self) -> bool:
        return self.mode != "bm25"


@dataclass(frozen=True)
class Layout:
    """All that the content of an index depends on."""

    corpus: str
    """Fingerprint of the documents."""
    documents: int
    title_weight: int
    chunk: Mapping[str, Any]
    text: Mapping[str, Any]
    vectors: Mapping[str, Any] | None
    """Encoder, dimensions and index type; None without vectors."""
    shards: int = 1
    format: int = FORMAT

    def name(self, alias: str) -> str:
        return f"{alias}-{digest(asdict(self))[:12]}"

    def differences(self, asked: Layout, *, dense: bool) -> list[str]:
        """What keeps an index of this layout from serving another one, with both values named."""
        built, wanted = asdict(self), asdict(asked)
        for values in (built, wanted):
            del values["shards"]  # the results do not depend on it
            if not dense:  # vectors that nobody asks for do not disturb
                del values["vectors"]
        if dense and self.vectors is None:
            return ["vectors: built without, asked for with"]
        return differences(built, wanted)


def layout(
    config: ElasticConfig, *, corpus: str, documents: int, title_weight: int, chunk: ChunkConfig,
    encoder: Mapping[str, Any] | None, dims: int | None, used_analyzer: str | None = None,
) -> Layout:  # fmt: skip
    """The layout that a configuration asks for. `encoder`: its spec; `dims`: length of its vectors."""
    text: dict[str, Any] = {"analyzer": used_analyzer or config.analyzer, "k1": config.k1, "b": config.b}
    if text["analyzer"] == PRETOKENISED:
        text |= {"language": config.language, "analysis": ANALYSIS}
    vectors = {"encoder": encoder, "dims": dims, "index_options": config.index_options} if config.dense else None
    pieces = {"unit": "none"} if chunk.unit == "none" else asdict(chunk)
    # as the server will give them back
    pieces, text, vectors = json.loads(json.dumps([pieces, text, vectors]))
    return Layout(corpus, documents, title_weight, pieces, text, vectors, config.shards)


def creation(layout: Layout) -> dict[str, Any]:
    """Settings and mappings of a new index that is about to be filled: no refresh, no copies, every reply on disk."""
    name = "whitespace" if layout.text["analyzer"] == PRETOKENISED else layout.text["analyzer"]
    properties: dict[str, Any] = {
        "doc": {"type": "keyword"},
        "start": {"type": "integer", "index": False},
        "end": {"type": "integer", "index": False},
        "page": {"type": "object", "enabled": False},
        "body": {"type": "text", "analyzer": name, "similarity": "gumshoe", "index_options": "freqs"},
    }
    if layout.vectors:
        properties["vector"] = {
            "type": "dense_vector", "dims": layout.vectors["dims"], "similarity": _similarity(layout),
            "index_options": {"type": layout.vectors["index_options"]},
        }  # fmt: skip
    similarity = {"type": "BM25", "k1": layout.text["k1"], "b": layout.text["b"]}
    return {
        "settings": {
            "number_of_shards": layout.shards, "number_of_replicas": 0, "refresh_interval": "-1",
            "translog.durability": "request", "similarity": {"gumshoe": similarity},
        },
        "mappings": {
            "dynamic": "strict", "_source": {"excludes": ["body", "vector"]}, "properties": properties, "_meta": meta(layout),
        },
    }  # fmt: skip


def _similarity(layout: Layout) -> str:
    """`dot_product` takes vectors of length 1 only."""
    encoder = (layout.vectors or {}).get("encoder") or {}
    return "max_inner_product" if encoder.get("normalize") is False else "dot_product"


def meta(layout: Layout, passages: int | None = None) -> dict[str, Any]:
    """What an index says of itself; the number of passages only once it holds them all."""
    return {"gumshoe": {"layout": asdict(layout), "passages": passages}}


def read_meta(mappings: Mapping[str, Any]) -> tuple[Layout, int | None] | None:
    """Layout and number of passages, or None when the index is not one of ours."""
    try:
        stored = mappings["_meta"]["gumshoe"]
        return Layout(**stored["layout"]), stored["passages"]
    except (KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Row:
    """A passage on its way into an index."""

    doc_id: str
    id: str
    """Of the Elasticsearch document."""
    text: str
    """What indexes see."""
    source: Mapping[str, Any]

    def operation(self, layout: Layout, vector: np.ndarray | None) -> bytes:
        """Two lines of a bulk request: `create`, so that an operation sent twice changes nothing, not even statistics."""
        body = self.text
        if layout.text["analyzer"] == PRETOKENISED:
            body = " ".join(analyzer(layout.text["language"])(body))
        source = {**self.source, "body": body}
        if vector is not None and np.any(vector):  # a text without terms has no direction, and none is looked for
            source["vector"] = vector.tolist()
        return f"{_json({'create': {'_id': self.id}})}\n{_json(source)}\n".encode()


def rows(document: Document, layout: Layout) -> Iterator[Row]:
    """The passages of a document, in order."""
    for number, (start, end) in enumerate(passages(document.text, ChunkConfig(**layout.chunk))):
        source: dict[str, Any] = {"doc": document.id, "start": start, "end": end}
        if number == 0:
            source["page"] = {"title": document.title, "text": document.text, "meta": dict(document.meta)}
        text = indexed_text(document.title, document.text[start:end], layout.title_weight)
        yield Row(document.id, row_id(document.id, number), text, source)


def row_id(doc_id: str, number: int = 0) -> str:
    """The id of a passage: the document's own for the first, so a page is found by it; very long ids are hashed."""
    if len(doc_id.encode("utf-8", "surrogatepass")) > _LONGEST_ID:
        doc_id = f"hash:{hashlib.blake2b(doc_id.encode('utf-8', 'surrogatepass'), digest_size=24).hexdigest()}"
    return f"{doc_id}\x1f{number}" if number else doc_id


def page(doc_id: str, reply: Mapping[str, Any]) -> Document | None:
    """A document from one entry of an `_mget` reply."""
    if not reply.get("found") or "page" not in reply["_source"]:
        return None
    stored = reply["_source"]["page"]
    return Document(doc_id, stored["title"], stored["text"], stored["meta"])


# ----------------------------------------------------------------------------------------------------- searching

_SORT: tuple[Mapping[str, str], ...] = ({"_score": "desc"}, {"doc": "asc"}, {"start": "asc"}, {"end": "asc"})


def text_search(layout: Layout, text: str, size: int) -> dict[str, Any] | None:
    """The BM25 leg of one query; None when no term is left of it. `match` knows no syntax: every character is text."""
    text = text.encode("utf-8", "replace").decode()
    if layout.text["analyzer"] == PRETOKENISED:
        text = " ".join(analyzer(layout.text["language"])(text))
    return _search({"query": {"match": {"body": text}}}, layout, size) if text.strip() else None


def vector_search(config: ElasticConfig, layout: Layout, vector: np.ndarray, size: int) -> dict[str, Any] | None:
    """The dense leg of one query; None for a text without terms.

    All candidates come back to be sorted, so a tie is broken by id as far as the candidates reach.
    """
    if not np.any(vector):
        return None
    wanted = min(WINDOW, max(config.num_candidates, 2 * size))
    knn: dict[str, Any] = {"field": "vector", "query_vector": vector.tolist(), "k": wanted, "num_candidates": wanted}
    if config.oversample:
        knn["rescore_vector"] = {"oversample": config.oversample}
    return _search({"knn": knn}, layout, size)


def _search(what: Mapping[str, Any], layout: Layout, size: int) -> dict[str, Any]:
    # what a hit is stands in its sort values, so neither ids nor sources are read
    found = {**what, "size": size, "sort": list(_SORT), "stored_fields": "_none_", "track_total_hits": False}
    return found if layout.chunk["unit"] == "none" else {**found, "collapse": {"field": "doc"}}


def hits(reply: Mapping[str, Any], layout: Layout, *, vectors: bool) -> list[Hit]:
    """Hits of one search; the score of a vector is its inner product with the query, as in the other dense indexes."""
    whole = layout.chunk["unit"] == "none"
    found = []
    for hit in reply["hits"]["hits"]:
        score, doc, start, end = hit["sort"]
        if vectors and _similarity(layout) == "dot_product":
            score = 2.0 * score - 1.0
        elif vectors:  # 1 + x for x of at least 0, else 1 / (1 - x)
            score = score - 1.0 if score >= 1.0 else 1.0 - 1.0 / score
        found.append(Hit(doc, score, None if whole else (start, end)))
    return found


def about(config: ElasticConfig, layout: Layout) -> BackendInfo:
    """What is served: everything that changes a result goes into the fingerprint."""
    how: dict[str, Any] = {"layout": asdict(layout), "mode": config.mode}
    if config.dense:
        how |= {"num_candidates": config.num_candidates, "oversample": config.oversample}
    if config.mode == "hybrid":
        how |= {"depth": config.depth, "rrf_k": config.rrf_k}
    exact = not config.dense or config.index_options == "flat"
    return BackendInfo("elasticsearch", layout.documents, digest(how), ("exact",) if exact else ())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def errors_of(reply: Mapping[str, Any]) -> tuple[int, str, str]:
    """(status, type, reason) of an error inside a reply, the innermost that the server names."""
    error = reply.get("error")
    status = int(reply.get("status", 0))
    if not isinstance(error, Mapping):
        return status, "", str(error or "")
    causes: Sequence[Any] = error.get("root_cause") or [error]
    first = causes[0] if isinstance(causes[0], Mapping) else error
    return status, str(first.get("type", "")), str(first.get("reason", ""))
