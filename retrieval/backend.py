"""An index and a document store as one `Backend`, built in memory or in a folder.

A folder holds `manifest.json`, `documents.sqlite` and the index. Invariants: it appears whole or not at all; its manifest
fingerprints corpus, encoder and index, and opening it with another configuration or corpus is refused with both values
named; blocking calls run in the backend's own threads, never on the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.analysis import ANALYSIS, indexed_text
from retrieval.corpus import CorpusReport, read_documents
from retrieval.docstore import DocStore, MemoryStore
from retrieval.encoders import EncoderConfig, HashingEncoder, make_encoder
from retrieval.errors import BadQuery, Closed, CorpusError, IndexMismatch, RetrievalError

FORMAT = 1
_MANIFEST, _STORE, _STATE = "manifest.json", "documents.sqlite", "encoder.npz"
_ENCODE_BATCH = 512
T = TypeVar("T")
Store = DocStore | MemoryStore


@dataclass
class BackendConfig:
    """Which index to serve a corpus with."""

    kind: str = "faiss"
    """`faiss` (dense, exact) or `bm25`."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Encoder of the dense index."""
    title_weight: int = 2
    """How many times an index sees the title."""
    k1: float = 1.2
    """BM25: how soon repeated terms stop counting."""
    b: float = 0.75
    """BM25: how much long documents are marked down."""
    language: str = "english"
    """BM25: `english` stems and drops stop words; `none` takes words as they are."""
    threads: int = 1
    """Threads of one search."""


class Engine(Protocol):
    """What `IndexedBackend` asks of an index."""

    def search(self, texts: Sequence[str], k: int) -> list[list[tuple[str, float]]]: ...

    def save(self, directory: Path) -> None: ...

    def spec(self) -> dict[str, Any]: ...


class IndexedBackend:
    """`agents.interfaces.Backend` over an index and a store."""

    def __init__(self, name: str, engine: Engine, store: Store) -> None:
        self._engine = engine
        self.store = store
        digest = hashlib.blake2b(_canonical({"corpus": store.fingerprint, "index": engine.spec()}), digest_size=16)
        # `caseless`: queries that differ in case only give the same hits
        self._info = BackendInfo(name, len(store), digest.hexdigest(), ("caseless", "exact"))
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix=f"retrieval-{name}")
        self._closed = False

    def info(self) -> BackendInfo:
        return self._info

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Hits of each query, best first, ties by document id. Raises BadQuery."""
        return await self._run(lambda: self.search_batch(queries))

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None where an id is unknown."""
        return await self._run(lambda: self.store.get(ids))

    async def close(self) -> None:
        """Frees threads and files. May be called twice."""
        if not self._closed:
            self._closed = True
            self._threads.shutdown(wait=True, cancel_futures=True)
            self.store.close()

    def search_batch(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """`search`, on the calling thread."""
        for query in queries:
            if query.k < 1:
                raise BadQuery(f"k is {query.k}; ask for at least 1 result")
            if query.filters:
                raise BadQuery(f"backend {self._info.name} knows no filters, got {', '.join(map(str, query.filters))}")
        if not queries:
            return []
        # the exact top k of the largest k starts with that of every smaller one
        most = min(max(q.k for q in queries), max(1, self._info.num_docs))
        found = self._engine.search([q.text for q in queries], most)
        return [[Hit(i, s) for i, s in hits[: q.k]] for q, hits in zip(queries, found, strict=True)]

    async def _run(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise Closed("the retrieval backend is closed")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class FaissEngine:
    """Encoder and FAISS index."""

    def __init__(self, config: BackendConfig, encoder: HashingEncoder, index: Any) -> None:
        self._config, self._encoder, self._index = config, encoder, index

    @classmethod
    def build(cls, config: BackendConfig, store: Store) -> FaissEngine:
        from retrieval.faiss_index import FaissIndex

        encoder = make_encoder(config.encoder)
        encoder.fit(_texts(config, store))
        ids = store.ids()
        vectors_ND = np.zeros((len(ids), encoder.dim), dtype=np.float32)
        start = 0
        for batch in _batches(_texts(config, store), _ENCODE_BATCH):
            vectors_ND[start : start + len(batch)] = encoder.encode_documents(batch)
            start += len(batch)
        return cls(config, encoder, FaissIndex.build(vectors_ND, ids, threads=config.threads))

    @classmethod
    def load(cls, config: BackendConfig, directory: Path) -> FaissEngine:
        from retrieval.faiss_index import FaissIndex

        try:
            with np.load(directory / _STATE, allow_pickle=False) as stored:
                state = {name: stored[name] for name in stored.files}
        except (OSError, ValueError) as error:
            raise RetrievalError(f"{directory / _STATE} cannot be read ({error}); build the index again") from None
        return cls(config, make_encoder(config.encoder, state), FaissIndex.load(directory, threads=config.threads))

    def search(self, texts: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        found: list[list[tuple[str, float]]] = self._index.search(self._encoder.encode_queries(texts), k)
        return found

    def save(self, directory: Path) -> None:
        self._index.save(directory)
        arrays: dict[str, Any] = dict(self._encoder.state())
        np.savez(directory / _STATE, **arrays)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "faiss", "index": "flat", "metric": "inner_product", "title_weight": self._config.title_weight,
            "encoder": self._encoder.spec(),
        }  # fmt: skip


class Bm25Engine:
    """BM25 index."""

    def __init__(self, config: BackendConfig, index: Any) -> None:
        self._config, self._index = config, index

    @classmethod
    def build(cls, config: BackendConfig, store: Store) -> Bm25Engine:
        from retrieval.bm25 import Bm25Index

        return cls(
            config,
            Bm25Index.build(_texts(config, store), store.ids(), k1=config.k1, b=config.b, language=config.language),
        )

    @classmethod
    def load(cls, config: BackendConfig, directory: Path) -> Bm25Engine:
        from retrieval.bm25 import Bm25Index

        return cls(config, Bm25Index.load(directory))

    def search(self, texts: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        return [self._index.search(text, k) for text in texts]

    def save(self, directory: Path) -> None:
        self._index.save(directory)

    def spec(self) -> dict[str, Any]:
        c = self._config
        return {
            "kind": "bm25", "method": "lucene", "k1": c.k1, "b": c.b, "title_weight": c.title_weight,
            "language": c.language, "analysis": ANALYSIS,
        }  # fmt: skip


ENGINES: dict[str, tuple[Callable[[BackendConfig, Store], Engine], Callable[[BackendConfig, Path], Engine]]] = {
    "faiss": (FaissEngine.build, FaissEngine.load),
    "bm25": (Bm25Engine.build, Bm25Engine.load),
}


def build_backend(
    config: BackendConfig, documents: Iterable[Document] | None = None, directory: str | Path | None = None
) -> IndexedBackend:
    """A backend over documents (in memory), over documents stored in a folder, or over a folder built before.

    With documents and a folder, the folder is written anew; with a folder alone it is opened. Raises RetrievalError
    (IndexMismatch when the folder was built with another configuration) and ValueError for an unknown kind.
    """
    if config.kind not in ENGINES:
        raise ValueError(f"unknown retrieval backend {config.kind!r}; known: {', '.join(sorted(ENGINES))}")
    build, load = ENGINES[config.kind]
    if documents is None:
        if directory is None:
            raise ValueError("give documents, a folder, or both")
        return _open(config, Path(directory), load)
    if directory is None:
        memory = MemoryStore(documents)
        if not len(memory):
            raise CorpusError("the corpus holds no documents")
        return IndexedBackend(config.kind, build(config, memory), memory)
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        store = DocStore.build(partial / _STORE, documents)
        if not len(store):
            raise CorpusError("the corpus holds no documents")
        engine = build(config, store)
        engine.save(partial)
        spec = engine.spec()
        manifest = {
            "format": FORMAT,
            "kind": config.kind,
            "config": _relevant(config),
            "corpus": store.fingerprint,
            "documents": len(store),
            "index": spec,
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        store.close()
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _open(config, target, load)


def prepare_backend(
    config: BackendConfig,
    corpus: str | Path | Sequence[str | Path],
    directory: str | Path,
    *,
    malformed: str = "error",
    report: CorpusReport | None = None,
) -> IndexedBackend:
    """Opens the folder if it was built from this corpus with this configuration; otherwise (re)builds it.

    The corpus is always read once, so a change in it is never missed. Errors as `read_documents` and `build_backend`.
    """
    report = CorpusReport() if report is None else report
    for _ in read_documents(corpus, malformed=malformed, report=report):
        pass
    try:
        manifest = read_manifest(directory)
        fits = manifest["corpus"] == report.fingerprint and not _differences(manifest, config)
    except RetrievalError:
        fits = False
    if fits:
        return build_backend(config, directory=directory)
    return build_backend(config, read_documents(corpus, malformed=malformed), directory)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an index folder. Raises RetrievalError when there is none, or of another format."""
    path = Path(directory) / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        keys = manifest.keys() >= {"format", "kind", "config", "corpus", "documents", "index"}
    except FileNotFoundError:
        raise RetrievalError(f"{directory} holds no index; build one from a corpus") from None
    except (OSError, ValueError, AttributeError) as error:
        raise RetrievalError(f"{path} cannot be read ({error}); build the index again") from None
    if not keys:
        raise RetrievalError(f"{path} is not an index manifest; build the index again")
    if manifest["format"] != FORMAT:
        raise IndexMismatch(f"{path} has format {manifest['format']}, this version reads {FORMAT}; build it again")
    return dict(manifest)


def _open(config: BackendConfig, directory: Path, load: Callable[[BackendConfig, Path], Engine]) -> IndexedBackend:
    manifest = read_manifest(directory)
    differences = _differences(manifest, config)
    if differences:
        raise IndexMismatch(
            f"index {directory} does not fit: {'; '.join(differences)}; build it again or mend the config"
        )
    store = DocStore(directory / _STORE)
    if store.fingerprint != manifest["corpus"]:
        raise IndexMismatch(
            f"index {directory} was built from corpus {manifest['corpus']}, its documents are {store.fingerprint}; "
            "build it again"
        )
    engine = load(config, directory)
    if engine.spec() != manifest["index"]:
        found, expected = engine.spec(), manifest["index"]
        named = "; ".join(
            f"{k}: built with {expected.get(k)!r}, found {found.get(k)!r}"
            for k in sorted(found.keys() | expected.keys())
            if found.get(k) != expected.get(k)
        )
        raise IndexMismatch(f"index {directory} does not fit this version: {named}; build it again")
    return IndexedBackend(config.kind, engine, store)


def _relevant(config: BackendConfig) -> dict[str, Any]:
    """The settings that change the index of this kind."""
    if config.kind == "bm25":
        names: tuple[str, ...] = ("title_weight", "k1", "b", "language")
        return {n: getattr(config, n) for n in names}
    return {
        "title_weight": config.title_weight,
        **{f"encoder.{k}": v for k, v in dataclasses.asdict(config.encoder).items()},
    }


def _differences(manifest: Mapping[str, Any], config: BackendConfig) -> list[str]:
    if manifest["kind"] != config.kind:
        return [f"kind: built with {manifest['kind']!r}, asked for {config.kind!r}"]
    built, asked = manifest["config"], _relevant(config)
    return [
        f"{k}: built with {built.get(k)!r}, asked for {asked.get(k)!r}"
        for k in sorted(built.keys() | asked.keys())
        if built.get(k) != asked.get(k)
    ]


def _texts(config: BackendConfig, store: Store) -> Iterator[str]:
    """Indexed texts in order of document id."""
    return (indexed_text(d.title, d.text, config.title_weight) for d in store)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _replace(partial: Path, target: Path) -> None:
    """Moves a finished folder to its place; an older one stands aside until that has worked."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError as error:
        if old.exists():
            os.rename(old, target)
        raise RetrievalError(f"index {target} cannot be written: {error}") from None
    shutil.rmtree(old, ignore_errors=True)
