"""The search service: batching, sharing, deadlines, shedding, caching."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, Overloaded
from retrieval.service import SearchService, ServiceConfig


class Slow:
    """A backend that notes its batches and waits until told."""

    def __init__(self, *, held: bool = False, capabilities: tuple[str, ...] = ()) -> None:
        self.batches: list[list[Query]] = []
        self.gets: list[list[str]] = []
        self.gate = asyncio.Event()
        self.fails: Exception | None = None
        self.fingerprint = "f1"
        self.capabilities = capabilities
        self.closed = False
        if not held:
            self.gate.set()

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        self.batches.append(list(queries))
        await self.gate.wait()
        if self.fails:
            raise self.fails
        return [[Hit(q.text, float(i)) for i in range(q.k)] for q in queries]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        self.gets.append(list(ids))
        await self.gate.wait()
        return [Document(i, i, "text") if i != "none" else None for i in ids]

    def info(self) -> BackendInfo:
        return BackendInfo("slow", 1, self.fingerprint, self.capabilities)

    async def close(self) -> None:
        self.closed = True


async def test_concurrent_queries_share_a_batch_and_equal_ones_share_work() -> None:
    backend = Slow()
    service = SearchService(backend, ServiceConfig(max_wait_ms=20))
    found = await asyncio.gather(*[service.search([Query(t, 2)]) for t in ("a", "b", " a ", "a", "c")])
    assert [f[0][0].doc_id for f in found] == ["a", "b", "a", "a", "c"]
    assert [[q.text for q in b] for b in backend.batches] == [["a", "b", "c"]]
    stats = service.stats()
    assert (stats["coalesced"], stats["batches"], stats["batch_size_mean"], stats["queue_depth"]) == (2, 1, 3, 0)
    found = [*await service.search([Query("a", 2), Query("a", 3), Query("a", 2)])]
    assert [len(f) for f in found] == [2, 3, 2]
    assert [q.k for q in backend.batches[-1]] == [3]
    await service.close()
    assert backend.closed


async def test_a_full_batch_does_not_wait() -> None:
    backend = Slow()
    service = SearchService(backend, ServiceConfig(max_batch=2, max_wait_ms=60_000, concurrency=1))
    await asyncio.wait_for(service.search([Query(t) for t in "abcd"]), 5)
    assert [len(b) for b in backend.batches] == [2, 2]
    await service.close()


async def test_cache_keys_hold_fingerprint_and_case() -> None:
    backend = Slow()
    service = SearchService(backend, ServiceConfig(max_wait_ms=0))
    await service.search([Query("Paris")])
    await service.search([Query("  Paris  ")])
    assert len(backend.batches) == 1 and service.stats()["cache_hits"] == 1
    await service.search([Query("paris")])
    backend.fingerprint = "f2"
    await service.search([Query("Paris")])
    assert len(backend.batches) == 3
    backend.capabilities = ("caseless",)
    await service.search([Query("ROME")])
    await service.search([Query("rome")])
    assert len(backend.batches) == 4
    await service.close()


async def test_cache_is_bounded_and_answers_are_copies() -> None:
    backend = Slow()
    service = SearchService(backend, ServiceConfig(max_wait_ms=0, cache_size=2))
    for text in "abc":
        (await service.search([Query(text)]))[0].clear()
    await service.search([Query("c")])
    assert len(backend.batches) == 3
    assert len((await service.search([Query("c")]))[0]) == 5
    await service.search([Query("a")])
    assert len(backend.batches) == 4
    await service.close()


async def test_flood_is_shed_and_the_service_recovers() -> None:
    backend = Slow(held=True)
    service = SearchService(backend, ServiceConfig(max_queue=10, max_batch=5, concurrency=1, max_wait_ms=0))
    calls = [asyncio.create_task(service.search([Query(f"q{i}")])) for i in range(100)]
    await asyncio.sleep(0.05)
    shed = [c for c in calls if c.done() and isinstance(c.exception(), Overloaded)]
    assert 85 <= len(shed) <= 90 and service.stats()["queue_depth"] <= 10
    with pytest.raises(Overloaded, match="10 allowed"):
        await service.search([Query(f"r{i}") for i in range(11)])
    backend.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(not isinstance(r, Exception) for r in results) == 100 - len(shed)
    assert (await service.search([Query("after")]))[0]
    await service.close()


async def test_deadlines_are_typed_and_do_not_disturb_others() -> None:
    backend = Slow(held=True)
    service = SearchService(backend, ServiceConfig(max_wait_ms=0, concurrency=1))
    patient = asyncio.create_task(service.search([Query("a")], timeout_s=5))
    await asyncio.sleep(0.01)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match=r"after 0\.01 s"):
            await service.search([Query("a"), Query("late")], timeout_s=0.01)
    cancelled = asyncio.create_task(service.search([Query("a")]))
    await asyncio.sleep(0)
    cancelled.cancel()
    backend.gate.set()
    assert (await patient)[0][0].doc_id == "a"
    await service.search([Query("b")])
    assert [[q.text for q in b] for b in backend.batches] == [["a"], ["b"]], "nobody waited for 'late'"
    assert service.stats()["expired"] == 4
    await service.close()


async def test_a_backend_that_hangs_gives_its_slot_back() -> None:
    backend = Slow(held=True)
    service = SearchService(backend, ServiceConfig(max_wait_ms=0, concurrency=1, batch_timeout_s=0.02))
    with pytest.raises(DeadlineExceeded, match="the backend gave no answer"):
        await service.search([Query("a")])
    backend.gate.set()
    assert await service.search([Query("a")])
    await service.close()


async def test_backend_errors_reach_the_waiters_and_are_not_cached() -> None:
    backend = Slow()
    backend.fails = ConnectionError("gone")
    service = SearchService(backend, ServiceConfig(max_wait_ms=0))
    for _ in range(2):
        with pytest.raises(ConnectionError, match="gone"):
            await service.search([Query("a")])
    backend.fails = None
    assert await service.search([Query("a")])
    assert service.stats()["errors"] == 2
    await service.check()
    await service.close()


async def test_bad_queries_never_reach_the_batch() -> None:
    backend = Slow()
    service = SearchService(backend, ServiceConfig(max_query_chars=10))
    for query in (Query(" "), Query("x", k=0), Query("x" * 11), Query("x", filters={"a": 1})):
        with pytest.raises(BadQuery):
            await service.search([query])
    backend.capabilities = ("filters",)
    assert await service.search([Query("x", filters={"a": [1]}), Query("x", filters={"a": [2]})])
    assert len(backend.batches[0]) == 2
    await service.close()


async def test_pages_are_cached_and_bounded() -> None:
    backend = Slow()
    service = SearchService(backend, ServiceConfig(max_gets=1))
    found = await service.get(["a", "none", "a", "b"])
    assert [f and f.id for f in found] == ["a", None, "a", "b"]
    await service.get(["b", "none"])
    assert backend.gets == [["a", "none", "b"], ["none"]]
    backend.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await service.get(["c"], timeout_s=0.01)
    first = asyncio.create_task(service.get(["d"]))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await service.get(["e"])
    backend.gate.set()
    assert await first
    await service.close()


async def test_close_frees_the_waiters() -> None:
    backend = Slow(held=True)
    service = SearchService(backend, ServiceConfig(max_wait_ms=0, concurrency=1))
    calls = [asyncio.create_task(service.search([Query(t)])) for t in "abc"]
    await asyncio.sleep(0.02)
    await service.close()
    await service.close()
    assert all(isinstance(e, Closed) for e in await asyncio.gather(*calls, return_exceptions=True))
    with pytest.raises(Closed):
        await service.search([Query("x")])


async def test_extra_latency_delays_every_request_and_is_off_by_default() -> None:
    assert ServiceConfig().extra_latency_ms == 0
    service = SearchService(Slow(), ServiceConfig(max_wait_ms=0, extra_latency_ms=30))
    for _ in range(2):  # the second time from the caches
        for ask in (service.search([Query("a", 1)]), service.get(["a"])):
            began = asyncio.get_running_loop().time()
            await ask
            assert asyncio.get_running_loop().time() - began >= 0.029
    with pytest.raises(ValueError, match="extra_latency_ms"):
        ServiceConfig(extra_latency_ms=-1)
    await service.close()
