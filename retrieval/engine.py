"""What an index is: texts or vectors go in, rows come out.

A row is one passage of a document (a whole document when the corpus is not chunked). Rows are numbered in order of document
id, then of place in the document, so the smaller row of two equal scores is the one of the smaller id; a shard holds a run of
rows that follow each other and counts them from 0. Who knows which document a row belongs to is `retrieval.rows`.

Invariants: results are sorted by (-score, row); a score depends on query and passage alone, not on batch, shard or machine load,
so the merge of exact shards equals the exact whole, row by row and bit by bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from agents.types import Query
from retrieval.deadline import seconds_left
from retrieval.errors import BadQuery, Closed, DeadlineExceeded

T = TypeVar("T")


@dataclass(frozen=True)
class Queries:
    """A batch: texts for engines that read words, vectors for those that compare them."""

    texts: tuple[str, ...]
    vectors_QD: np.ndarray | None = None
    """float32 [Q, D], of length 1, or 0 for a text without terms. None for engines that do not need them."""


@dataclass(frozen=True)
class Found:
    """The best rows of one query, by (-score, row)."""

    rows_K: np.ndarray
    """int64"""
    scores_K: np.ndarray
    """float64; higher is better"""


class Engine(Protocol):
    """The index of one shard. Calls block; several threads may search at once."""

    wants_vectors: bool
    num_rows: int

    def search(self, queries: Queries, k: int) -> list[Found]:
        """At most k rows of each query; fewer when fewer match."""
        ...

    def save(self, directory: Path) -> None: ...

    def spec(self) -> dict[str, Any]:
        """All that changes the results; part of the index fingerprint."""
        ...


class Shard(Protocol):
    """An engine that may live in another process."""

    async def search(self, queries: Queries, k: int) -> list[Found]: ...

    async def close(self) -> None: ...


class LocalShard:
    """An engine of this process, in threads of its own, never on the event loop."""

    def __init__(self, engine: Engine, threads: int = 2) -> None:
        self._engine = engine
        self._threads = Threads(threads)

    async def search(self, queries: Queries, k: int) -> list[Found]:
        return await self._threads.run(lambda: self._engine.search(queries, k))

    async def close(self) -> None:
        self._threads.close()


class Threads:
    """Where blocking work runs, which knows the time limit of who asked (`retrieval.deadline`); past it, nothing is begun.

    Raises DeadlineExceeded for that, and Closed after `close`, which may be called twice.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="retrieval")
        self._closed = False

    async def run(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise Closed("the retrieval backend is closed")
        return await asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, _in_time, work)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._pool.shutdown(wait=True, cancel_futures=True)


def _in_time(work: Callable[[], T]) -> T:
    if not seconds_left():
        raise DeadlineExceeded("the request's time ran out before a thread was free for it")
    return work()


def check_k(queries: Sequence[Query]) -> None:
    """Raises BadQuery for a query that asks for nothing."""
    for query in queries:
        if query.k < 1:
            raise BadQuery(f"k is {query.k}; ask for at least 1 result")


def merge(parts: Sequence[Found], first_rows: Sequence[int], k: int) -> Found:
    """The best k of several shards' finds of one query; `first_rows` says where each shard's rows begin in the whole."""
    rows = np.concatenate([p.rows_K + first for p, first in zip(parts, first_rows, strict=True)])
    scores = np.concatenate([p.scores_K for p in parts])
    best = np.lexsort((rows, -scores))[:k]
    return Found(rows[best], scores[best])
