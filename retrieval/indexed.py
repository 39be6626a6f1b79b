"""A backend over the shards of one index, its rows, its pages and its encoder, wherever they are.

Invariants: hits are the best documents by (-score, id), each by its best passage; what a query finds does not depend on the queries it
shares a batch with; blocking calls run in threads, never on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.docstore import DocStore
from retrieval.encoders import checked
from retrieval.engine import Found, Queries, Shard, Threads, check_k, merge
from retrieval.errors import BadQuery
from retrieval.meter import stage
from retrieval.rows import Rows

_LEAST_DEPTH = 16


class Pages(Protocol):
    """A document store that may live in another process."""

    async def get(self, ids: Sequence[str]) -> list[Document | None]: ...

    async def close(self) -> None: ...


class AsyncEncoder(Protocol):
    """An encoder of queries that may live in another process."""

    async def encode(self, texts: Sequence[str]) -> np.ndarray: ...

    async def close(self) -> None: ...


class LocalPages:
    """A document store of this process, in threads of its own."""

    def __init__(self, store: DocStore) -> None:
        self.store = store
        self._threads = Threads(2)

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        return await self._threads.run(lambda: self.store.get(ids))

    async def close(self) -> None:
        self._threads.close()
        self.store.close()


class LocalEncoder:
    """An encoder of this process, in a thread of its own; one that has `ask_queries`, since others do its work, needs none."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._threads = Threads(1)
        self.at_once: int = encoder.config.concurrency if hasattr(encoder, "ask_queries") else 1
        """Batches that are worth encoding at once."""

    async def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim], all finite. Raises what the encoder raises, and RetrievalError for numbers that are none."""
        if hasattr(self._encoder, "ask_queries"):
            vectors_QD = await self._encoder.ask_queries(texts)
        else:
            vectors_QD = await self._threads.run(lambda: self._encoder.encode_queries(texts))
        return checked(vectors_QD, len(texts), self._encoder.dim)

    async def close(self) -> None:
        self._threads.close()
        if hasattr(self._encoder, "close"):
            await self._encoder.close()


class IndexedBackend:
    """`agents.interfaces.Backend` over the shards of one index. Shards, pages and encoder may be anywhere."""

    def __init__(
        self,
        info: BackendInfo,
        pages: Pages,
        rows: Rows,
        shards: Sequence[Shard],
        first_rows: Sequence[int],
        encoder: AsyncEncoder | None = None,
    ) -> None:
        self._info, self._pages, self._rows = info, pages, rows
        self._shards, self._first_rows, self._encoder = list(shards), list(first_rows), encoder

    def info(self) -> BackendInfo:
        return self._info

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Hits of each query, best first, ties by document id. Raises BadQuery, and what shards and encoder raise."""
        check_k(queries)
        for query in queries:
            if query.filters:
                raise BadQuery(f"backend {self._info.name} knows no filters, got {', '.join(map(str, query.filters))}")
        if not queries:
            return []
        texts = [q.text for q in queries]
        vectors_QD = None
        if self._encoder is not None:
            with stage("encode"):
                vectors_QD = await self._encoder.encode(texts)
        hits: list[list[Hit]] = [[] for _ in queries]
        # of each query alone, in steps: approximate indexes find other rows when they are asked for more of them
        waiting: dict[int, list[int]] = {}
        for i, query in enumerate(queries):
            waiting.setdefault(self._depth(query.k), []).append(i)
        while waiting:
            depth = min(waiting)
            members = waiting.pop(depth)
            part = Queries(
                tuple(texts[i] for i in members),
                vectors_QD if vectors_QD is None or len(members) == len(queries) else vectors_QD[members],
            )
            for i, found in zip(members, await self._find(part, depth), strict=True):
                hits[i] = self._rows.hits(found, queries[i].k)
                if len(hits[i]) < queries[i].k and len(found.rows_K) == depth < self._rows.num_rows:
                    waiting.setdefault(min(depth * 4, self._rows.num_rows), []).append(i)
        return hits

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None where an id is unknown."""
        with stage("store"):
            return await self._pages.get(ids)

    async def close(self) -> None:
        """Frees threads and files. May be called twice."""
        for part in (*self._shards, self._pages, self._encoder):
            if part is not None:
                await part.close()

    def _depth(self, k: int) -> int:
        """Rows to ask for. More than k where several may be of one document."""
        wanted = max(k * 2 if self._rows.chunked else k, _LEAST_DEPTH)
        return min(1 << (wanted - 1).bit_length(), self._rows.num_rows)

    async def _find(self, queries: Queries, depth: int) -> list[Found]:
        with stage("search"):
            if len(self._shards) == 1:
                return await self._shards[0].search(queries, depth)
            parts = await asyncio.gather(*(shard.search(queries, depth) for shard in self._shards))
        return [merge(found, self._first_rows, depth) for found in zip(*parts, strict=True)]
