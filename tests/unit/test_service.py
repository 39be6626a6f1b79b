"""The search service: batching, sharing, deadlines, shedding, caching."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.caches import Cache
from retrieval.deadline import time_limit
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, Overloaded
from retrieval.meter import stage
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
    with pytest.raises(Overloaded, match="10 are allowed, 11 more"):
        await service.search([Query(f"r{i}") for i in range(11)])
    backend.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(not isinstance(r, Exception) for r in results) == 100 - len(shed)
    assert (await service.search([Query("after")]))[0]
    assert service.stats()["shed"] == len(shed) + 11
    await service.close()


async def test_ten_times_more_than_it_can_do_never_grows_without_bound() -> None:
    """While 100 queries come, the backend answers 10. Every call ends, most with Overloaded, and then all is as before."""
    turns = asyncio.Semaphore(0)

    class Steady(Slow):
        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            await turns.acquire()
            return await super().search(queries)

    service = SearchService(Steady(), ServiceConfig(max_queue=50, max_batch=10, concurrency=1, max_wait_ms=0))

    async def ask(number: int) -> str:
        try:
            hits = (await service.search([Query(f"q{number}", 1)]))[0]
        except Overloaded:
            return "shed"
        assert hits[0].doc_id == f"q{number}", "an answer is never another's"
        return "answered"

    calls: list[asyncio.Task[str]] = []
    most_waiting = 0
    for burst in range(50):
        calls += [asyncio.create_task(ask(burst * 100 + i)) for i in range(100)]
        turns.release()
        for _ in range(20):
            await asyncio.sleep(0)
        assert service.stats()["queue_depth"] <= 50
        most_waiting = max(most_waiting, sum(not call.done() for call in calls))
    assert 50 <= most_waiting <= 80, "what is refused is over at once"
    for _ in range(20):
        turns.release()
    outcomes = await asyncio.gather(*calls)
    assert 450 <= outcomes.count("answered") <= 600 and len(outcomes) == 5000
    turns.release()
    assert await ask(-1) == "answered" and service.stats()["queue_depth"] == 0
    await service.close()


async def test_deadlines_are_typed_and_do_not_disturb_others() -> None:
    backend = Slow(held=True)
    service = SearchService(backend, ServiceConfig(max_wait_ms=0, concurrency=1))
    patient = asyncio.create_task(service.search([Query("a")], timeout_s=5))
    await asyncio.sleep(0.01)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match=r"after 0\.0\d+ s"):
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


async def test_who_joins_with_more_time_is_not_bound_by_the_first() -> None:
    backend = Slow(held=True)
    service = SearchService(backend, ServiceConfig(concurrency=1))
    hasty = asyncio.create_task(service.search([Query("a")], timeout_s=0.05))
    await asyncio.sleep(0.01)
    patient = asyncio.create_task(service.search([Query("a")], timeout_s=20))
    with pytest.raises(DeadlineExceeded):
        await hasty
    await asyncio.sleep(0.05)
    backend.gate.set()
    assert (await patient)[0][0].doc_id == "a"
    await service.close()


async def test_the_time_of_the_first_call_binds_no_later_one() -> None:
    service = SearchService(Slow(), ServiceConfig())
    with time_limit(0.5):
        await service.search([Query("a")])
    await asyncio.sleep(0.55)
    assert await service.search([Query("b")])
    await service.close()


async def test_a_query_alone_waits_for_nobody() -> None:
    service = SearchService(Slow(), ServiceConfig(max_wait_ms=5000))
    await asyncio.wait_for(service.search([Query("a")]), 2)
    await service.close()


async def test_a_bad_query_in_a_batch_is_not_the_others_fault() -> None:
    class Picky(Slow):
        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            if any(q.text == "bad" for q in queries):
                raise BadQuery("the index cannot read this query")
            return await super().search(queries)

    service = SearchService(Picky(), ServiceConfig())
    found = await asyncio.gather(*[service.search([Query(t, 1)]) for t in ("a", "bad", "b")], return_exceptions=True)
    assert [type(f) for f in found] == [list, BadQuery, list]
    assert service.stats()["errors_BadQuery"] == 1
    await service.close()


async def test_the_others_of_a_bad_query_s_batch_are_soon_searched_and_only_while_they_are_wanted() -> None:
    class Picky(Slow):
        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            found = await super().search(queries)
            if any(q.text == "bad" for q in queries):
                raise BadQuery("the index cannot read this query")
            return found

    backend = Picky(held=True)
    service = SearchService(backend)
    asked = [asyncio.create_task(service.search([Query(t, 1)])) for t in ["bad", *(f"q{i}" for i in range(31))]]
    await asyncio.sleep(0.01)
    asked[31].cancel()
    await asyncio.sleep(0.01)
    backend.gate.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(f) for f in found] == [BadQuery, *[list] * 30, asyncio.CancelledError]
    assert len(backend.batches) == 1 + 2 * 5, "halves of 32, not 32 times one"
    assert Query("q30", 1) not in [q for batch in backend.batches[1:] for q in batch]
    await service.close()


async def test_questions_nobody_waits_for_take_nobody_s_place() -> None:
    backend = Slow(held=True)
    service = SearchService(backend, ServiceConfig(max_queue=4, concurrency=1))
    first = asyncio.create_task(service.search([Query("first")]))
    await asyncio.sleep(0.01)
    for i in range(4):
        with pytest.raises(DeadlineExceeded):
            await service.search([Query(f"q{i}")], timeout_s=0.01)
    assert service.stats()["queue_depth"] == 4
    fresh = asyncio.create_task(service.search([Query("fresh"), Query("q1")]))
    await asyncio.sleep(0.01)
    backend.gate.set()
    assert [hits[0].doc_id for hits in await fresh] == ["fresh", "q1"] and await first
    assert [q.text for batch in backend.batches for q in batch] == ["first", "q1", "fresh"]
    await service.close()


async def test_stats_tell_of_batches_stages_and_errors() -> None:
    class Staged(Slow):
        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            with stage("encode"):
                await asyncio.sleep(0.02)
            return await super().search(queries)

    backend = Staged()
    service = SearchService(backend, ServiceConfig(max_batch=4))
    await asyncio.gather(*[service.search([Query(f"q{i}")]) for i in range(5)])
    backend.fails = ConnectionError("gone")
    with pytest.raises(ConnectionError):
        await service.search([Query("x")])
    await service.get(["a", "a", "b"])
    await service.get(["a"])
    stats = service.stats()
    assert (stats["batches_le_1"], stats["batches_le_4"], stats["batches_le_256"]) == (2, 3, 3)
    assert stats["errors"] == stats["errors_ConnectionError"] == 1
    assert 19 < stats["encode_p50_ms"] <= stats["batch_p99_ms"] <= stats["total_p99_ms"]
    assert stats["page_hit_rate"] == 0.25 and stats["hit_rate"] == 0
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
    for query in (Query(" "), Query("x", k=0), Query("x" * 11), Query("x", filters={"a": 1}), Query("\ud800")):
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


async def test_what_was_found_without_a_leg_is_not_kept() -> None:
    class Hybrid(Slow):
        degraded = 0.0
        down = True

        def stats(self) -> dict[str, float]:
            return {"degraded": self.degraded}

        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            self.degraded += self.down * len(queries)
            return await super().search(queries)

    backend = Hybrid()
    service = SearchService(backend)
    await service.search([Query("a")])
    backend.down = False
    for _ in range(3):
        await service.search([Query("a")])
    assert len(backend.batches) == 2 and service.stats()["degraded"] == 1
    await service.close()


async def test_pages_are_kept_by_their_bytes() -> None:
    class Long(Slow):
        async def get(self, ids: Sequence[str]) -> list[Document | None]:
            self.gets.append(list(ids))
            return [Document(i, i, "x" * 200_000, {"raw": ["y" * 200_000]}) for i in ids]

    backend = Long()
    service = SearchService(backend, ServiceConfig(page_cache_mb=1))
    for id_ in "aabcaab":
        await service.get([id_])
    assert "".join(ids[0] for ids in backend.gets) == "abcab", "two pages of 0.4 MB fit, not three"
    assert 0.7 < service.stats()["page_cache_mb"] <= 1
    await service.close()


@given(st.integers(0, 30), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12)), max_size=40))
def test_a_cache_keeps_what_was_used_last_and_never_more_than_its_bound(
    limit: int, puts: list[tuple[str, int]]
) -> None:
    cache: Cache[int] = Cache(limit, weight=lambda value: value)
    for key, value in puts:
        cache.put(key, value)
        assert cache.get(key) == (value if value <= limit else None)
    kept = {key: value for key in "abcdef" if (value := cache.get(key)) is not None}
    assert cache.weight == sum(kept.values()) <= limit and len(cache) == len(kept)


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
