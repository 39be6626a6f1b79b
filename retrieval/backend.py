"""Backends as a configuration composes them, over index folders that are built first where they must be."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from agents.interfaces import Backend
from agents.types import Document
from retrieval.build import ENGINES, Busy, Progress, build_folder, quiet
from retrieval.config import KINDS, SERVERS, BackendConfig, backends_of, is_dense, legs_of
from retrieval.corpus import Corpus, CorpusReport, corpus_files
from retrieval.errors import RetrievalError
from retrieval.folder import IndexFolder, LocalParts
from retrieval.hybrid import HybridBackend
from retrieval.indexed import AsyncEncoder, IndexedBackend, LocalEncoder, LocalPages, Pages
from retrieval.manifest import FORMAT, digest, read_key, write_key
from retrieval.rerank import RerankedBackend

__all__ = [
    "ENGINES", "KINDS", "AsyncEncoder", "BackendConfig", "Corpus", "IndexFolder", "IndexedBackend", "LocalEncoder", "LocalPages",
    "LocalParts", "Pages", "build_backend", "open_backend", "prepare_folder",
]  # fmt: skip


def open_backend(config: BackendConfig, directory: str | Path | None, parts: Any = None) -> Backend:
    """The backend a configuration names, over a folder that was built before where it needs one.

    `parts` has the methods of LocalParts and says where shards, pages and encoder are. Raises RetrievalError (IndexMismatch when
    the folder does not fit) and ValueError for an unknown kind.
    """
    names = backends_of(config)
    folder = None
    if config.kind == "auto" or legs_of(config):
        if directory is None:
            raise ValueError(f"a backend of kind {config.kind} needs the folder of its index")
        folder = IndexFolder(config, directory)
        config, names = folder.config, backends_of(folder.config)
        parts = LocalParts(folder) if parts is None else parts
    found = {
        name: _server(config, name) if folder is None or name in SERVERS else _leg(folder, name, parts)
        for name in names
    }
    backend = HybridBackend(found, config.hybrid) if config.kind == "hybrid" else found[config.kind]
    return RerankedBackend(backend, config.rerank) if config.rerank.active else backend


def _server(config: BackendConfig, name: str) -> Backend:
    if name == "remote":
        from retrieval.remote import RemoteBackend

        return RemoteBackend(config.remote)
    from retrieval.live import LiveBackend

    return LiveBackend(config.live)


def _leg(folder: IndexFolder, leg: str, parts: Any) -> Backend:
    return _elastic(folder, parts) if leg == "elasticsearch" else _indexed(folder, leg, parts)


def _indexed(folder: IndexFolder, leg: str, parts: Any) -> IndexedBackend:
    runs = folder.manifest.legs[leg].shards
    pages, rows = parts.pages(), folder.rows()
    shards = [parts.shard(leg, number) for number in range(len(runs))]
    encoder = parts.encoder() if is_dense(folder.config, leg) else None
    return IndexedBackend(folder.info(leg), pages, rows, shards, [r.first_row for r in runs], encoder)


def _elastic(folder: IndexFolder, parts: Any) -> Backend:
    from retrieval.elastic import open_backend

    config, built = folder.config, folder.manifest
    encoder = parts.encoder() if config.elasticsearch.dense else None
    return open_backend(
        config.elasticsearch, title_weight=config.title_weight, chunk=config.chunk, corpus=built.corpus, encoder=encoder,
        encoder_spec=built.encoder,
    )  # fmt: skip


def build_backend(
    config: BackendConfig, documents: Iterable[Document] | None = None, directory: str | Path | None = None
) -> Backend:
    """A backend over documents (in a folder that goes with it), over documents stored in a folder, or over a folder built before.

    With documents and a folder, the folder is written anew; with a folder alone it is opened. Raises RetrievalError
    (IndexMismatch when the folder was built with another configuration) and ValueError for an unknown kind.
    """
    legs_of(config)
    if documents is None:
        if directory is None:
            raise ValueError("give documents, a folder, or both")
        return open_backend(config, directory)
    given = documents
    if directory is not None:
        build_folder(config, lambda: given, Path(directory))
        return open_backend(config, directory)
    made = Path(tempfile.mkdtemp(prefix="gumshoe-index-"))
    try:
        build_folder(config, lambda: given, made / "index")
        backend = open_backend(config, made / "index")
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    weakref.finalize(backend, shutil.rmtree, made, ignore_errors=True)
    return backend


def prepare_folder(
    config: BackendConfig,
    corpus: Corpus,
    directory: str | Path,
    *,
    report: CorpusReport | None = None,
    progress: Progress = quiet,
) -> bool:
    """Builds the index folder, unless it is there: whole, of this corpus, with this configuration. Returns whether it was built.

    A corpus whose files have the names, sizes and times of those it was built from is not read again. Waits while another process
    builds it. Errors as `read_documents` and `build_folder`.
    """
    report = CorpusReport() if report is None else report
    stats = [(str(f.resolve()), f.stat()) for f in corpus_files(corpus.paths)]
    files = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    key = digest([FORMAT, files, corpus.malformed, dict(corpus.columns)])
    legs_of(config)
    total = sum(s.st_size for _, s in stats)

    def documents() -> Iterator[Document]:
        for document in corpus.read(report):
            yield document
            if report.documents % 256 == 0:
                expected = round(report.documents * total / max(1, report.bytes_read))
                progress("documents", report.documents, max(expected, report.documents))

    @cache
    def fingerprint() -> str:
        found = CorpusReport()
        for _ in corpus.read(found):
            pass
        return found.fingerprint

    while True:
        if _is_there(config, Path(directory), key, fingerprint, report):
            return False
        try:
            build_folder(config, documents, Path(directory), key=key, report=report, progress=progress)
            return True
        except Busy:
            progress("another process builds this index; waiting for it", 0, 0)
            time.sleep(1.0)


def _is_there(
    config: BackendConfig, directory: Path, key: str, fingerprint: Callable[[], str], report: CorpusReport
) -> bool:
    try:
        # its files are wanted, not a GPU
        folder = IndexFolder(replace(config, faiss=replace(config.faiss, device="cpu")), directory)
        if folder.manifest.config["shards"] != config.shards:
            return False
        folder.check()
    except RetrievalError:
        return False
    if read_key(directory) != key:
        if folder.manifest.corpus != fingerprint():
            return False
        with contextlib.suppress(OSError):  # the folder may be read only
            write_key(directory, key)
    report.skipped = folder.manifest.skipped
    return True
