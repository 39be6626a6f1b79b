"""The search service: a backend with batching, caches, deadlines and bounded queues. Plain asyncio.

It is itself a `Backend`, so a sandbox cannot tell the two apart; an actor or an HTTP server wraps it. Invariants:
- Batches, sharing and shedding of searches are those of `retrieval.batching`: nothing grows without bound.
- Every call ends within its time, by an answer or by DeadlineExceeded; what is under way below knows how long it is wanted
  (`retrieval.deadline`).
- Cache keys hold the backend's fingerprint, so a changed index never serves old hits or pages.
"""

from __future__ import annotations

import asyncio
import time
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agents.interfaces import Backend
from agents.types import BackendInfo, Document, Hit, Query
from retrieval.batching import Batcher, Item
from retrieval.caches import Cache, page_bytes
from retrieval.deadline import seconds_left, time_limit
from retrieval.engine import check_k
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, Overloaded
from retrieval.meter import Meter, metered

_NAMES = ("calls", "queries", "cache_hits", "coalesced", "shed", "expired", "errors", "batches", "gets", "page_hits")


@dataclass
class Topology:
    """Which parts of retrieval are processes of their own. With all 0 the router holds everything, as a laptop wants it."""

    encoders: int = 0
    """Query encoders."""
    shard_replicas: int = 0
    """Processes per shard of the index: one may die, or be slow, unnoticed when there are 2."""
    stores: int = 0
    """Document stores."""
    slow_s: float = 5.0
    """After so long without an answer another replica is asked as well."""
    threads: int = 1
    """Threads of one encoder or shard; `retrieval.threads` are those of one search."""
    encoder_gpus: float = 0.0
    """GPUs that each encoder asks Ray for."""
    shard_gpus: float = 0.0
    """GPUs that each replica of a shard asks Ray for."""

    def __post_init__(self) -> None:
        for name in ("encoders", "shard_replicas", "stores", "encoder_gpus", "shard_gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"topology.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.slow_s <= 0 or self.threads < 1:
            raise ValueError(
                f"topology.slow_s {self.slow_s} must be positive, topology.threads {self.threads} at least 1"
            )


@dataclass
class ServiceConfig:
    """How a service batches, caches and protects itself."""

    max_batch: int = 64
    """Most queries in one call of the backend."""
    max_wait_ms: float = 2.0
    """How long a query waits for company while other batches are at work; when none is, it does not wait."""
    max_queue: int = 1024
    """Most distinct queries that wait; more are refused with Overloaded."""
    concurrency: int = 2
    """Batches that run at once."""
    timeout_s: float = 30.0
    """Deadline of a call that brings none."""
    batch_timeout_s: float = 120.0
    """Longest call of the backend."""
    cache_size: int = 8192
    """Queries whose hits are kept; 0 keeps none."""
    page_cache_mb: float = 64.0
    """Memory for documents that were opened, in MiB; 0 keeps none."""
    max_gets: int = 256
    """Most `get` calls that run or wait; more are refused with Overloaded."""
    max_query_chars: int = 4096
    """Longest query."""
    extra_latency_ms: float = 0.0
    """Fault injection: every search and every get first waits this long, cached ones too. For benchmarks and tests."""
    topology: Topology = field(default_factory=Topology)
    """Processes of a run's retrieval."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "concurrency", "max_gets", "max_query_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("timeout_s", "batch_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("max_wait_ms", "cache_size", "page_cache_mb", "extra_latency_ms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")


class SearchService:
    """A `Backend` in front of a backend. Belongs to one event loop; starts with the first call."""

    def __init__(self, backend: Backend, config: ServiceConfig | None = None) -> None:
        self.config = c = config or ServiceConfig()
        self._backend = backend
        self._meter = Meter()
        self._batcher: Batcher[Query, tuple[Hit, ...]] = Batcher(
            self._search_batch, max_batch=c.max_batch, max_wait_s=c.max_wait_ms / 1000, max_queue=c.max_queue,
            concurrency=c.concurrency, batch_timeout_s=c.batch_timeout_s, meter=self._meter,
        )  # fmt: skip
        self._gets = 0
        self._hits: Cache[tuple[Hit, ...]] = Cache(c.cache_size)
        self._pages: Cache[Document] = Cache(int(c.page_cache_mb * 2**20), page_bytes)
        self._closed = False

    # ------------------------------------------------------------------------------------------- the Backend

    def info(self) -> BackendInfo:
        return self._backend.info()

    async def search(self, queries: Sequence[Query], timeout_s: float | None = None) -> list[list[Hit]]:
        """Hits of each query. Raises BadQuery, Overloaded, DeadlineExceeded, Closed, or what the backend raises."""
        began, left_s = await self._begin(timeout_s)
        info, counts = self._backend.info(), self._meter.counts
        counts["calls"] += 1
        counts["queries"] += len(queries)
        plain = [self._checked(q, info) for q in queries]
        keys = [query_key(q, info) for q in plain]
        known = {key: hits for key in keys if (hits := self._hits.get(key)) is not None}
        counts["cache_hits"] += sum(key in known for key in keys)
        missing = {key: query for key, query in zip(keys, plain, strict=True) if key not in known}
        counts["coalesced"] += len(keys) - sum(key in known for key in keys) - len(missing)
        if missing:
            known |= await self._batcher.answers(missing, left_s)
        self._meter.took("total", began)
        return [list(known[key]) for key in keys]

    async def get(self, ids: Sequence[str], timeout_s: float | None = None) -> list[Document | None]:
        """Documents in the order asked, None where unknown. Raises Overloaded, DeadlineExceeded, Closed."""
        began, left_s = await self._begin(timeout_s)
        fingerprint, counts = self._backend.info().fingerprint, self._meter.counts
        counts["gets"] += len(ids)
        known: dict[str, Document | None] = {
            i: page for i in ids if (page := self._pages.get((fingerprint, i))) is not None
        }
        counts["page_hits"] += sum(i in known for i in ids)
        missing = [i for i in dict.fromkeys(ids) if i not in known]
        if missing:
            if self._gets >= self.config.max_gets:
                counts["shed"] += len(ids)
                raise Overloaded(f"{self._gets} document requests wait, as many as allowed; try again later")
            self._gets += 1
            try:
                with time_limit(left_s), metered(self._meter):
                    pages = await asyncio.wait_for(self._backend.get(missing), left_s)
            except TimeoutError:
                counts["expired"] += len(missing)
                raise DeadlineExceeded(f"{len(missing)} documents did not come within {left_s:.3g} s") from None
            except Exception as error:
                self._meter.failed(error)
                raise
            finally:
                self._gets -= 1
            for id_, page in zip(missing, pages, strict=True):
                known[id_] = page
                if page is not None:
                    self._pages.put((fingerprint, id_), page)
        self._meter.took("get", began)
        return [known[i] for i in ids]

    async def close(self) -> None:
        """Fails what still waits with Closed, and closes the backend. May be called twice."""
        if not self._closed:
            self._closed = True
            await self._batcher.close()
            await self._backend.close()

    # ---------------------------------------------------------------------------------------------- for people

    async def check(self, text: str = "health") -> None:
        """A self-query past queue and cache. Raises what the backend raises; returns when search works."""
        with time_limit(self.config.timeout_s):
            try:
                await asyncio.wait_for(self._backend.search([Query(text, k=1)]), self.config.timeout_s)
            except TimeoutError:
                raise DeadlineExceeded(f"the self-query had no answer after {self.config.timeout_s:g} s") from None

    def stats(self) -> dict[str, float]:
        """Counts since start (errors by class, batches by size), load now, and p50, p95, p99 of the stages wait, batch
        (and in it encode, search), get (and in it store) and total in milliseconds, as flat names. A stage that never ran is absent."""
        c = self._meter.counts
        return dict.fromkeys(_NAMES, 0.0) | self._backend_stats() | self._meter.figures() | {
            "queue_depth": float(self._batcher.depth), "gets_under_way": float(self._gets),
            "batch_size_mean": c["batched"] / c["batches"] if c["batches"] else 0.0,
            "hit_rate": c["cache_hits"] / c["queries"] if c["queries"] else 0.0,
            "page_hit_rate": c["page_hits"] / c["gets"] if c["gets"] else 0.0,
            "page_cache_mb": self._pages.weight / 2**20,
        }  # fmt: skip

    # -------------------------------------------------------------------------------------------------- inside

    async def _begin(self, timeout_s: float | None) -> tuple[float, float]:
        """When the call began and how long it may take."""
        began = time.monotonic()
        left_s = seconds_left(self.config.timeout_s if timeout_s is None else timeout_s)
        if self.config.extra_latency_ms:
            await asyncio.sleep(self.config.extra_latency_ms / 1000)
        if self._closed:
            raise Closed("the search service is closed")
        return began, left_s

    def _checked(self, query: Query, info: BackendInfo) -> Query:
        text = " ".join(unicodedata.normalize("NFC", query.text).split())
        if not text:
            raise BadQuery("the query is empty")
        if text.encode(errors="ignore").decode() != text:
            raise BadQuery("the query has half a character (a lone surrogate), which no text may hold")
        if len(text) > self.config.max_query_chars:
            raise BadQuery(f"the query has {len(text)} characters, {self.config.max_query_chars} are allowed")
        check_k([query])
        if query.filters and "filters" not in info.capabilities:
            raise BadQuery(f"backend {info.name} knows no filters, got {', '.join(map(str, query.filters))}")
        return replace(query, text=text)

    def _backend_stats(self) -> dict[str, float]:
        """What the backend itself counts; `degraded` are queries that it served without a part of itself."""
        stats = getattr(self._backend, "stats", None)
        return {} if stats is None else dict(stats())

    async def _search_batch(
        self, batch: Sequence[Item[Query, tuple[Hit, ...]]]
    ) -> Sequence[tuple[Hit, ...] | Exception]:
        degraded = self._backend_stats().get("degraded")
        found = [tuple(hits) for hits in await self._backend.search([item.question for item in batch])]
        # not what a leg was missing from; and what is not one result each the batcher refuses
        if len(found) == len(batch) and self._backend_stats().get("degraded") == degraded:
            for item, hits in zip(batch, found, strict=True):
                self._hits.put(item.key, hits)
        return found


def query_key(query: Query, info: BackendInfo) -> Hashable:
    """Equal for queries that have the same hits."""
    text = query.text.casefold() if "caseless" in info.capabilities else query.text
    return info.fingerprint, text, query.k, _frozen(query.filters)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict) or hasattr(value, "items"):
        return tuple(sorted((str(k), _frozen(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_frozen(v) for v in value)
    return repr(value)
