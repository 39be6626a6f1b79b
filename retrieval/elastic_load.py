"""Fills an Elasticsearch index with a corpus and puts it into service.

Invariants:
- The alias moves to a new index only after every passage was counted in it: a load that fails leaves the old one serving.
- A passage counts as loaded when the server has acknowledged it, and it does so once it is on disk. The same load started again
  asks what is there and adds the rest, whichever side was killed; nothing needs to be remembered here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from agents.types import Document
from retrieval import elastic_index as form
from retrieval.chunks import ChunkConfig
from retrieval.corpus import CorpusReport
from retrieval.elastic import ApiError, TlsError, TransportError, address, calls, one_line, said
from retrieval.elastic_index import ElasticConfig, Layout, Row
from retrieval.errors import CorpusError, IndexMismatch, Overloaded, RetrievalError

_ANALYZERS = ("standard", "simple", "whitespace", "stop", "keyword")
_LONGEST_PAUSE_S = 20.0
_PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses of what may be over when tried again."""


class Encoder(Protocol):
    """What a load asks of an encoder."""

    dim: int

    def spec(self) -> dict[str, Any]: ...

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Loaded:
    """What a load came to."""

    index: str
    """The index behind the alias."""
    documents: int
    passages: int
    resumed: int
    """Passages that an earlier load had brought."""
    seconds: float


def load(
    config: ElasticConfig, documents: Callable[[], Iterable[Document]], *, title_weight: int = 2,
    chunk: ChunkConfig | None = None, encoder: Encoder | None = None, corpus: tuple[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Loaded:  # fmt: skip
    """Loads a corpus, or what is missing of it, and moves the alias. Calls block.

    `documents` gives the corpus anew at every call; `corpus` is its fingerprint and number of documents, found here when None;
    `encoder` must be fitted. `progress(done, all)` counts documents. Raises RetrievalError that names the documents refused.
    """
    started = time.monotonic()
    if config.dense and encoder is None:
        raise RetrievalError(f"mode {config.mode} of Elasticsearch needs an encoder; name one, or use mode bm25")
    if corpus is None:
        report = CorpusReport()
        for document in documents():
            report.add(document)
        corpus = report.fingerprint, report.documents
    if not corpus[1]:
        raise CorpusError("the corpus holds no documents")
    encoder = encoder if config.dense else None
    layouts = [
        form.layout(
            config, corpus=corpus[0], documents=corpus[1], title_weight=title_weight, chunk=chunk or ChunkConfig(),
            encoder=encoder.spec() if encoder else None, dims=encoder.dim if encoder else None, used_analyzer=name,
        )
        for name in (config.analyzer, config.analyzer_fallback) if name
    ]  # fmt: skip
    with calls(config) as client:
        if client.indices.exists(index=config.index) and not client.indices.exists_alias(name=config.index):
            raise RetrievalError(
                f"{config.index!r} at {address(config)} is an index, not an alias; choose another retrieval.elasticsearch.index"
            )
        load_ = _Load(client, config, encoder, *_begin(client, config, layouts))
        load_.fill(documents, progress)
        load_.finish()
    return Loaded(load_.index, corpus[1], load_.passages, load_.resumed, time.monotonic() - started)


def _begin(client: Any, config: ElasticConfig, layouts: Sequence[Layout]) -> tuple[Layout, str, int | None]:
    """Layout and name of the index to fill, and whether it was there: None for a new one, else how many passages it is known to hold."""
    for layout in layouts:
        index = layout.name(config.index)
        try:
            client.indices.create(index=index, **form.creation(layout))
            return layout, index, None
        except ApiError as error:
            _, kind, reason = said(error)
            if kind == "resource_already_exists_exception":
                stored = form.read_meta(client.indices.get_mapping(index=index)[index]["mappings"])
                if stored is None or stored[0] != layout:
                    raise IndexMismatch(
                        f"index {index!r} at {address(config)} is not what its name says; delete it"
                    ) from None
                return layout, index, stored[1] or 0
            if "has not been configured" not in reason:
                raise
    asked = [layout.text["analyzer"] for layout in layouts]
    present = [name for name in _ANALYZERS if name not in asked and _analyzes(client, name)]
    raise RetrievalError(
        f"Elasticsearch at {address(config)} has no analyzer {' or '.join(map(repr, asked))}; of those tried it has "
        f"{', '.join(present) or 'none'}: name one as retrieval.elasticsearch.analyzer, or {form.PRETOKENISED}"
    )


class _Load:
    """One load on its way."""

    def __init__(
        self, client: Any, config: ElasticConfig, encoder: Encoder | None, layout: Layout, index: str, held: int | None
    ) -> None:
        self._client, self._config, self._encoder, self._layout, self.index = client, config, encoder, layout, index
        self._new, self._full = held is None, bool(held)
        self.passages = self.resumed = held or 0

    def fill(self, documents: Callable[[], Iterable[Document]], progress: Callable[[int, int], None] | None) -> None:
        """Brings all passages that are not there."""
        if self._full:
            return
        settings = {"refresh_interval": "-1", "number_of_replicas": 0}
        self._client.indices.put_settings(index=self.index, settings={"index": settings})
        num_documents = 0
        flying: deque[tuple[Future[None], int]] = deque()

        def landed() -> None:
            """Waits for the oldest request, so that what is reported is acknowledged without a gap."""
            request, documents_then = flying.popleft()
            request.result()
            if progress is not None:
                progress(documents_then, self._layout.documents)

        with ThreadPoolExecutor(self._config.bulk_workers, thread_name_prefix="elastic-bulk") as pool:
            for batch in _batches(documents(), self._layout, self._config.bulk_documents):
                if len(flying) == self._config.bulk_workers:
                    landed()
                there = set() if self._new else self._existing(batch)
                operations = self._operations([row for row in batch if row.id not in there])
                self.passages += len(batch)
                self.resumed += len(batch) - len(operations)
                num_documents += sum("page" in row.source for row in batch)
                flying.append((pool.submit(self._send, operations), num_documents))
            while flying:
                landed()

    def finish(self) -> None:
        """Counts, restores what was off for the load, and moves the alias."""
        client, config, index = self._client, self._config, self.index
        client.options(request_timeout=max(config.timeout_s, 300.0)).indices.refresh(index=index)
        counted = client.count(index=index)["count"]
        if counted != self.passages:
            raise RetrievalError(
                f"index {index!r} at {address(config)} holds {counted} passages, the corpus has {self.passages}: two documents "
                "share an id, or another program writes to it; delete it and load again"
            )
        settings = {"refresh_interval": None, "number_of_replicas": config.replicas}
        client.indices.put_settings(index=index, settings={"index": settings})
        client.indices.put_mapping(index=index, meta=form.meta(self._layout, self.passages))
        aliased = client.indices.exists_alias(name=config.index)
        old = [name for name in client.indices.get_alias(name=config.index) if name != index] if aliased else []
        leave: list[dict[str, Any]] = [
            {"remove_index": {"index": name}}
            if config.delete_old
            else {"remove": {"index": name, "alias": config.index}}
            for name in old
        ]
        client.indices.update_aliases(actions=[*leave, {"add": {"index": index, "alias": config.index}}])

    def _operations(self, rows: Sequence[Row]) -> list[tuple[str, bytes]]:
        """(document id, operation) of each row."""
        vectors_ND: Sequence[np.ndarray | None] | np.ndarray = [None] * len(rows)
        if self._encoder is not None and rows:
            vectors_ND = self._encoder.encode_documents([row.text for row in rows])
        return [(row.doc_id, row.operation(self._layout, v)) for row, v in zip(rows, vectors_ND, strict=True)]

    def _existing(self, batch: Sequence[Row]) -> set[str]:
        """Which passages the server holds, refreshed or not. Asking costs less than encoding."""
        reply = self._client.mget(index=self.index, ids=[row.id for row in batch], source=False)
        return {entry["_id"] for entry in reply["docs"] if entry.get("found")}

    def _send(self, operations: Sequence[tuple[str, bytes]]) -> None:
        """Returns when the server has acknowledged every (document id, operation). Smaller and slower while it pushes back."""
        waiting, most, tries = list(operations), self._config.bulk_documents, 0
        while waiting:
            size, num_bytes = 0, 0
            while size < min(most, len(waiting)) and (not size or num_bytes < self._config.bulk_mb * 1e6):
                num_bytes += len(waiting[size][1])
                size += 1
            part = waiting[:size]
            try:
                again, trouble = self._bulk(part)
            except ApiError as error:
                if error.meta.status == 413 and size > 1:
                    most = size // 2
                    continue
                if error.meta.status == 413:
                    raise RetrievalError(
                        f"Elasticsearch at {address(self._config)} finds document {part[0][0]!r} too large ({num_bytes} bytes, "
                        "413); chunk or drop it, or raise http.max_content_length there"
                    ) from None
                if error.meta.status not in _PASSING:
                    raise
                again, trouble = part, str(error)
            except TransportError as error:
                if isinstance(error, TlsError):
                    raise
                again, trouble = part, str(error)
            waiting = again + waiting[size:]
            if not again:
                tries, most = 0, min(self._config.bulk_documents, 2 * most)
                continue
            tries += 1
            if tries > self._config.bulk_retries:
                raise Overloaded(
                    f"Elasticsearch at {address(self._config)} took no more documents after {tries} tries ({one_line(trouble)}); "
                    "what it acknowledged is kept: start the same load again once it is well"
                )
            most = max(1, size // 2)
            time.sleep(min(_LONGEST_PAUSE_S, 0.1 * 2**tries))

    def _bulk(self, part: list[tuple[str, bytes]]) -> tuple[list[tuple[str, bytes]], str]:
        """One request: what must be sent again, and why. Raises RetrievalError for documents that never will be taken."""
        reply = self._client.options(max_retries=0).bulk(
            index=self.index, operations=[line for _, line in part], filter_path="items.*.status,items.*.error"
        )
        again, refused, trouble = [], [], ""
        for operation, item in zip(part, reply["items"], strict=True):
            status, kind, reason = form.errors_of(item["create"])
            if status in _PASSING:
                again.append(operation)
                trouble = f"{status} {kind}: {reason}"
            elif status >= 300 and status != 409:  # 409: it is there, from a request whose answer was lost
                refused.append(f"{operation[0]!r} ({status} {kind}: {one_line(reason)})")
        if refused:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            raise RetrievalError(
                f"Elasticsearch at {address(self._config)} refused {len(refused)} of {len(part)} documents: "
                f"{', '.join(refused[:3])}{more}; mend or drop them and start again"
            )
        return again, trouble


def _batches(documents: Iterable[Document], layout: Layout, size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for document in documents:
        for row in form.rows(document, layout):
            batch.append(row)
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def _analyzes(client: Any, name: str) -> bool:
    try:
        client.indices.analyze(analyzer=name, text="a")
    except ApiError:
        return False
    return True
