"""The search service: a backend with batching, caching, deadlines and a bounded queue. Plain asyncio.

It is itself a `Backend`, so a sandbox cannot tell the two apart; an actor wraps it. Invariants:
- A query equal to one that waits or runs shares its work; waiters that time out or are cancelled do not disturb others.
- At most `max_queue` distinct queries wait. A call that would exceed that is refused whole with Overloaded.
- Every call ends within its deadline, by an answer or by DeadlineExceeded; a query nobody waits for is not run.
- Cache keys hold the backend's fingerprint, so a changed index never serves old hits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import unicodedata
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from agents.interfaces import Backend
from agents.types import BackendInfo, Document, Hit, Query
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, Overloaded, RetrievalError

T = TypeVar("T")
_LATENCIES = 4096


@dataclass
class ServiceConfig:
    """How a service batches, caches and protects itself."""

    max_batch: int = 64
    """Most queries in one call of the backend."""
    max_wait_ms: float = 2.0
    """How long the first query of a batch waits for company."""
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
    page_cache_size: int = 1024
    """Documents kept; 0 keeps none."""
    max_gets: int = 256
    """Most `get` calls that run or wait; more are refused with Overloaded."""
    max_query_chars: int = 4096
    """Longest query."""
    extra_latency_ms: float = 0.0
    """Fault injection: every search and every get first waits this long, cached ones too. For benchmarks and tests."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "concurrency", "max_gets", "max_query_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be positive")
        if self.extra_latency_ms < 0:
            raise ValueError(f"extra_latency_ms is {self.extra_latency_ms}; it must be 0 or more")


class _Item:
    """One distinct query on its way."""

    def __init__(self, key: Hashable, query: Query, future: asyncio.Future[tuple[Hit, ...]], now: float) -> None:
        self.key, self.query, self.future, self.since = key, query, future, now
        self.waiters = 0


class SearchService:
    """A `Backend` in front of a backend. Belongs to one event loop; starts with the first call."""

    def __init__(
        self, backend: Backend, config: ServiceConfig | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config or ServiceConfig()
        self._backend = backend
        self._clock = clock
        self._items: dict[Hashable, _Item] = {}
        self._queue: deque[_Item] = deque()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._batcher: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._gets = 0
        self._hits: OrderedDict[Hashable, tuple[Hit, ...]] = OrderedDict()
        self._pages: OrderedDict[Hashable, Document] = OrderedDict()
        self._counters: Counter[str] = Counter()
        self._latencies: dict[str, deque[float]] = {
            name: deque(maxlen=_LATENCIES) for name in ("wait", "search", "total", "get")
        }
        self._closed = False

    # ------------------------------------------------------------------------------------------- the Backend

    def info(self) -> BackendInfo:
        return self._backend.info()

    async def search(self, queries: Sequence[Query], timeout_s: float | None = None) -> list[list[Hit]]:
        """Hits of each query. Raises BadQuery, Overloaded, DeadlineExceeded, Closed, or what the backend raises."""
        await self._dawdle()
        if self._closed:
            raise Closed("the search service is closed")
        started = self._clock()
        info = self._backend.info()
        self._counters["calls"] += 1
        self._counters["queries"] += len(queries)
        plain = [self._checked(q, info) for q in queries]
        keys = [_key(q, info) for q in plain]
        fresh = {k for k in keys if k not in self._hits and k not in self._items}
        if len(self._queue) + len(fresh) > self.config.max_queue:
            self._counters["shed"] += len(queries)
            raise Overloaded(
                f"the search queue is full ({len(self._queue)} waiting, {self.config.max_queue} allowed); try again later"
            )
        found: list[list[Hit] | None] = [None] * len(queries)
        waiting: dict[Hashable, _Item] = {}
        for position, (key, query) in enumerate(zip(keys, plain, strict=True)):
            if key in self._hits:
                self._hits.move_to_end(key)
                self._counters["cache_hits"] += 1
                found[position] = list(self._hits[key])
            elif key in waiting:
                self._counters["coalesced"] += 1
            elif key in self._items:
                self._counters["coalesced"] += 1
                waiting[key] = self._items[key]
            else:
                waiting[key] = self._enqueue(key, query)
        try:
            for item in waiting.values():
                item.waiters += 1
            timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
            if waiting:
                futures = [item.future for item in waiting.values()]
                # not `wait_for(gather())`: a caller that gives up must not cancel work that others share
                _, late = await asyncio.wait(futures, timeout=max(0.0, timeout_s))
                if late:
                    self._counters["expired"] += len(late)
                    raise DeadlineExceeded(f"{len(late)} of {len(queries)} queries had no answer after {timeout_s:g} s")
        finally:
            for item in waiting.values():
                item.waiters -= 1
        answers = {key: item.future.result() for key, item in waiting.items()}
        self._latencies["total"].append(self._clock() - started)
        return [list(answers[key]) if hits is None else hits for key, hits in zip(keys, found, strict=True)]

    async def get(self, ids: Sequence[str], timeout_s: float | None = None) -> list[Document | None]:
        """Documents in the order asked, None where unknown. Raises Overloaded, DeadlineExceeded, Closed."""
        await self._dawdle()
        if self._closed:
            raise Closed("the search service is closed")
        started = self._clock()
        fingerprint = self._backend.info().fingerprint
        self._counters["gets"] += len(ids)
        known: dict[str, Document | None] = {}
        for id_ in ids:
            if (fingerprint, id_) in self._pages:
                self._pages.move_to_end((fingerprint, id_))
                known[id_] = self._pages[fingerprint, id_]
        self._counters["page_hits"] += sum(i in known for i in ids)
        missing = [i for i in dict.fromkeys(ids) if i not in known]
        if missing:
            if self._gets >= self.config.max_gets:
                self._counters["shed"] += len(ids)
                raise Overloaded(f"{self._gets} document requests wait, as many as allowed; try again later")
            timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
            self._gets += 1
            try:
                pages = await asyncio.wait_for(self._backend.get(missing), timeout_s)
            except TimeoutError:
                self._counters["expired"] += len(missing)
                raise DeadlineExceeded(f"{len(missing)} documents did not come within {timeout_s:g} s") from None
            finally:
                self._gets -= 1
            for id_, page in zip(missing, pages, strict=True):
                known[id_] = page
                if page is not None:
                    _remember(self._pages, (fingerprint, id_), page, self.config.page_cache_size)
        self._latencies["get"].append(self._clock() - started)
        return [known[i] for i in ids]

    async def close(self) -> None:
        """Fails what still waits with Closed, and closes the backend. May be called twice."""
        if self._closed:
            return
        self._closed = True
        tasks = [t for t in (self._batcher, *self._running) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for item in list(self._items.values()):
            self._settle(item, Closed("the search service is closed"))
        self._queue.clear()
        await self._backend.close()

    # ---------------------------------------------------------------------------------------------- for people

    async def check(self, text: str = "health") -> None:
        """A self-query past the cache. Raises what the backend raises; returns when search works."""
        await self._backend.search([Query(text, k=1)])

    def stats(self) -> dict[str, float]:
        """Counters since start, load now, and latencies of the last calls in milliseconds, as flat names."""
        c = self._counters
        stats: dict[str, float] = {
            name: float(c[name])
            for name in ("calls", "queries", "cache_hits", "coalesced", "shed", "expired", "errors", "batches", "gets", "page_hits")
        }  # fmt: skip
        stats["queue_depth"] = float(len(self._queue))
        stats["batch_size_mean"] = c["batched"] / c["batches"] if c["batches"] else 0.0
        stats["hit_rate"] = c["cache_hits"] / c["queries"] if c["queries"] else 0.0
        for name, values in self._latencies.items():
            ordered = sorted(values)
            for percent in (50, 95, 99):
                rank = min(len(ordered) - 1, len(ordered) * percent // 100)
                stats[f"{name}_p{percent}_ms"] = ordered[rank] * 1000 if ordered else 0.0
        return stats

    # ------------------------------------------------------------------------------------------------ batching

    async def _dawdle(self) -> None:
        if self.config.extra_latency_ms:
            await asyncio.sleep(self.config.extra_latency_ms / 1000)

    def _checked(self, query: Query, info: BackendInfo) -> Query:
        text = " ".join(unicodedata.normalize("NFC", query.text).split())
        if not text:
            raise BadQuery("the query is empty")
        if len(text) > self.config.max_query_chars:
            raise BadQuery(f"the query has {len(text)} characters, {self.config.max_query_chars} are allowed")
        if query.k < 1:
            raise BadQuery(f"k is {query.k}; ask for at least 1 result")
        if query.filters and "filters" not in info.capabilities:
            raise BadQuery(f"backend {info.name} knows no filters, got {', '.join(map(str, query.filters))}")
        return replace(query, text=text)

    def _enqueue(self, key: Hashable, query: Query) -> _Item:
        future: asyncio.Future[tuple[Hit, ...]] = asyncio.get_running_loop().create_future()
        # an error nobody waits for any more is not worth a log line
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        item = _Item(key, query, future, self._clock())
        self._items[key] = item
        self._queue.append(item)
        self._arrived.set()
        if len(self._queue) >= self.config.max_batch:
            self._full.set()
        if self._batcher is None:
            self._batcher = asyncio.get_running_loop().create_task(self._batch_forever())
        return item

    async def _batch_forever(self) -> None:
        while True:
            # a slot first: while all are busy, the next batch grows
            await self._slots.acquire()
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            patience = self._queue[0].since + self.config.max_wait_ms / 1000 - self._clock()
            if len(self._queue) < self.config.max_batch and patience > 0:
                self._full.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), patience)
            batch: list[_Item] = []
            while self._queue and len(batch) < self.config.max_batch:
                item = self._queue.popleft()
                if item.waiters > 0:
                    batch.append(item)
                else:
                    self._settle(item, DeadlineExceeded("nobody waits for this query any more"))
            if not batch:
                self._slots.release()
                continue
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: list[_Item]) -> None:
        started = self._clock()
        self._counters["batches"] += 1
        self._counters["batched"] += len(batch)
        self._latencies["wait"].extend(started - item.since for item in batch)
        try:
            # bounded, so that a backend that hangs cannot hold its slot for ever
            results = await asyncio.wait_for(
                self._backend.search([item.query for item in batch]), self.config.batch_timeout_s
            )
            if len(results) != len(batch):
                raise RetrievalError(f"the backend gave {len(results)} results for {len(batch)} queries")
        except TimeoutError:
            self._counters["errors"] += len(batch)
            for item in batch:
                self._settle(item, DeadlineExceeded(f"the backend gave no answer in {self.config.batch_timeout_s:g} s"))
        except Exception as error:  # any failure of the backend belongs to the waiters, not to the batcher
            self._counters["errors"] += len(batch)
            for item in batch:
                self._settle(item, error)
        else:
            self._latencies["search"].append(self._clock() - started)
            for item, hits in zip(batch, results, strict=True):
                _remember(self._hits, item.key, tuple(hits), self.config.cache_size)
                self._settle(item, tuple(hits))
        finally:
            self._slots.release()

    def _settle(self, item: _Item, outcome: tuple[Hit, ...] | Exception) -> None:
        self._items.pop(item.key, None)
        if item.future.done():
            return
        if isinstance(outcome, Exception):
            item.future.set_exception(outcome)
        else:
            item.future.set_result(outcome)


def _key(query: Query, info: BackendInfo) -> Hashable:
    text = query.text.casefold() if "caseless" in info.capabilities else query.text
    return info.fingerprint, text, query.k, _frozen(query.filters)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict) or hasattr(value, "items"):
        return tuple(sorted((str(k), _frozen(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_frozen(v) for v in value)
    return repr(value)


def _remember(cache: OrderedDict[Hashable, T], key: Hashable, value: T, size: int) -> None:
    if size < 1:
        return
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > size:
        cache.popitem(last=False)
