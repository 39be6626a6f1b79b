"""Fusion by reciprocal rank, over any backends and with some of them failing."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.errors import BadQuery, DeadlineExceeded, Overloaded, RetrievalError
from retrieval.hybrid import HybridBackend, HybridConfig, fuse


class Fixed:
    """A backend that finds the same for every query."""

    def __init__(self, ranking: str | Sequence[Hit], name: str = "x", error: Exception | None = None) -> None:
        self.hits = [Hit(d, 9.0 - i) if isinstance(d, str) else d for i, d in enumerate(ranking)]
        self.name, self.error = name, error
        self.asked: list[int] = []
        self.closed = 0
        self.wait_s = 0.0

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        self.asked += [q.k for q in queries]
        await asyncio.sleep(self.wait_s)
        if self.error is not None:
            raise self.error
        return [self.hits[: q.k] for q in queries]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        if self.error is not None:
            raise self.error
        return [Document(i, self.name, "") if i in {h.doc_id for h in self.hits} else None for i in ids]

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, len(self.hits), f"print-{self.name}", ("caseless", self.name))

    async def close(self) -> None:
        self.closed += 1


def hybrid(degrade: bool = False, weights: Sequence[float] = (), **legs: Fixed) -> HybridBackend:
    return HybridBackend(legs, HybridConfig(list(legs), list(weights), depth=4, degrade=degrade))


def test_scores_by_hand() -> None:
    # Cormack, Clarke and Buettcher 2009, with k = 60: b is second and first, a first and third, c third only, d second only
    found = fuse([[Hit("a", 5), Hit("b", 4), Hit("c", 3)], [Hit("b", 0.9), Hit("d", 0.8), Hit("a", 0.7)]], 9)
    assert [(h.doc_id, h.score) for h in found] == [
        ("b", pytest.approx(1 / 62 + 1 / 61)), ("a", pytest.approx(1 / 61 + 1 / 63)),
        ("d", pytest.approx(1 / 62)), ("c", pytest.approx(1 / 63)),
    ]  # fmt: skip
    # a ranking that repeats a document counts its best place
    assert fuse([[Hit("a", 2), Hit("a", 1)]], 9, rrf_k=1) == [Hit("a", 0.5)]
    weighted = fuse([[Hit("a", 1)], [Hit("b", 1)]], 9, rrf_k=1, weights=[1.0, 3.0])
    assert [(h.doc_id, h.score) for h in weighted] == [("b", 1.5), ("a", 0.5)]


def test_ties_by_id_and_the_span_of_the_best_rank_that_has_one() -> None:
    found = fuse([[Hit("z", 1), Hit("a", 1, (5, 9))], [Hit("a", 1), Hit("z", 1, (1, 2))]], 2)
    assert [h.doc_id for h in found] == ["a", "z"] and found[0].score == found[1].score
    assert [h.span for h in found] == [(5, 9), (1, 2)]
    assert fuse([[Hit("a", 1)], [Hit("b", 1), Hit("a", 1, (3, 4))]], 1)[0].span == (3, 4)


ranking = st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8).map(
    lambda ids: [Hit(d, 1.0, (i, i + 2) if (i * 7) % 3 else None) for i, d in enumerate(ids)]
)


@given(st.lists(ranking, min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 60), st.randoms())
@settings(deadline=None)
def test_the_order_of_legs_changes_nothing(legs: list[list[Hit]], k: int, rrf_k: int, rng: random.Random) -> None:
    weights = [rng.choice([0.1, 0.3, 0.7]) for _ in legs]
    whole = fuse(legs, 99, rrf_k, weights)
    order = list(range(len(legs)))
    rng.shuffle(order)
    assert fuse([legs[i] for i in order], 99, rrf_k, [weights[i] for i in order]) == whole
    assert fuse(legs, k, rrf_k, weights) == whole[:k]
    alone = fuse([legs[0]], 99, rrf_k)
    assert [(h.doc_id, h.span) for h in alone] == [(h.doc_id, h.span) for h in legs[0]]


async def test_every_leg_is_asked_deeply_and_at_once() -> None:
    dense, sparse = Fixed("abc", "dense"), Fixed("bcd", "sparse")
    dense.wait_s = sparse.wait_s = 0.2
    backend = hybrid(dense=dense, sparse=sparse)
    search = asyncio.create_task(backend.search([Query("q", k=1), Query("r", k=6)]))
    while not dense.asked:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sparse.asked and not search.done(), "the second does not wait for the first"
    results = await search
    assert [[h.doc_id for h in hits] for hits in results] == [["b"], ["b", "c", "a", "d"]]
    assert dense.asked == sparse.asked == [4, 6]
    assert await backend.search([]) == []
    with pytest.raises(BadQuery, match="k is 0"):
        await backend.search([Query("q", k=0)])
    assert await backend.get(["a", "d", "b"]) == [Document("a", "dense", ""), None, Document("b", "dense", "")]
    await backend.close()
    assert (dense.closed, sparse.closed) == (1, 1)


async def test_documents_come_from_a_store_of_their_own_if_there_is_one() -> None:
    pages = Fixed("ad", "pages")
    backend = HybridBackend({"x": Fixed("a")}, HybridConfig(["x"]), pages)
    assert await backend.get(["d"]) == [Document("d", "pages", "")]


def test_the_fingerprint_covers_all_that_changes_results() -> None:
    def of(config: HybridConfig, name: str = "d") -> str:
        return HybridBackend({"dense": Fixed("ab", name), "sparse": Fixed("abc", "s")}, config).info().fingerprint

    base = of(HybridConfig(["dense", "sparse"]))
    assert base == of(HybridConfig(["sparse", "dense"])) == of(HybridConfig(["dense", "sparse"], degrade=True))
    others = [HybridConfig(["dense", "sparse"], **c) for c in ({"rrf_k": 1}, {"depth": 7}, {"weights": [1, 2]})]
    assert len({base, of(HybridConfig(["dense"])), of(HybridConfig(["dense", "sparse"]), "e"), *map(of, others)}) == 6
    info = hybrid(dense=Fixed("ab", "d"), sparse=Fixed("abc", "s")).info()
    assert (info.name, info.num_docs, info.capabilities) == ("hybrid", 3, ("caseless",))


async def test_a_failing_leg_fails_the_search_and_is_named() -> None:
    broken = Fixed("", error=Overloaded("the queue is full"))
    with pytest.raises(Overloaded, match=r"^leg sparse of the hybrid search: the queue is full$"):
        await hybrid(dense=Fixed("ab"), sparse=broken).search([Query("q")])
    broken.error = OSError("line one\nline two")
    with pytest.raises(RetrievalError, match=r"^leg sparse of the hybrid search: line one line two$"):
        await hybrid(dense=Fixed("ab"), sparse=broken).search([Query("q")])


async def test_degrading_serves_without_a_leg_counts_it_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    broken = Fixed("b", error=Overloaded("the queue is full"))
    backend = hybrid(degrade=True, sparse=broken, dense=Fixed("ab", "dense"))
    with caplog.at_level(logging.WARNING, logger="retrieval.hybrid"):
        for _ in range(2):
            results = await backend.search([Query("q"), Query("r")])
            assert [[h.doc_id for h in hits] for hits in results] == [["a", "b"]] * 2
        assert len(caplog.records) == 1 and "leg sparse fails" in caplog.text
        assert backend.stats() == {"degraded": 4, "failed/sparse": 2, "failed/dense": 0}
        assert await backend.get(["b"]) == [Document("b", "dense", "")]
        broken.error = None
        assert [h.doc_id for h in (await backend.search([Query("q")]))[0]] == ["b", "a"]
        assert backend.stats()["degraded"] == 4 and "leg sparse answers again" in caplog.text
    broken.error = BadQuery("no filters")
    with pytest.raises(BadQuery, match="leg sparse of the hybrid search: no filters"):
        await backend.search([Query("q")])


async def test_when_no_leg_answers_the_search_fails() -> None:
    backend = hybrid(degrade=True, a=Fixed("", error=Overloaded("full")), b=Fixed("", error=OSError("gone")))
    with pytest.raises(Overloaded, match="leg a of the hybrid search: full"):
        await backend.search([Query("q")])
    with pytest.raises(OSError, match="gone"):
        await backend.get(["a"])


async def test_a_leg_that_hangs_is_given_up() -> None:
    slow = Fixed("b")
    slow.wait_s = 60
    legs = {"slow": slow, "quick": Fixed("a")}
    with pytest.raises(DeadlineExceeded, match=r"leg slow of the hybrid search: no answer within 0\.05 s"):
        await HybridBackend(legs, HybridConfig(list(legs), timeout_s=0.05)).search([Query("q")])
    served = HybridBackend(legs, HybridConfig(list(legs), timeout_s=0.05, degrade=True))
    assert [h.doc_id for h in (await served.search([Query("q")]))[0]] == ["a"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"legs": []}, "at least one"),
        ({"legs": ["a", "a"]}, "name each leg once"),
        ({"legs": ["a"], "weights": [1, 2]}, "one positive number per leg"),
        ({"legs": ["a"], "weights": [0.0]}, "one positive number per leg"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        HybridConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names 'b', which is not among the backends a"):
        HybridBackend({"a": Fixed("")}, HybridConfig(["a", "b"]))
