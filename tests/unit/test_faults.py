"""Faults made on purpose: what each does, that they repeat, and how recovery is counted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Document, Query, Task, Uid
from envs.config import FaultConfig, GuardConfig, SandboxConfig
from envs.faults import FaultyBackend, recovery
from envs.guard import guard_of
from envs.journal import same
from envs.sandbox import Session
from retrieval.backend import BackendConfig, build_backend
from rewards.metrics.intervals import wilson
from tests.support.sandbox_play import actions, backend, play, world

DOCS = [Document(f"d{i:02d}", f"T{i}", f"Gupezo number {i}. " + "Rain fell. Sun rose. " * (i + 1)) for i in range(30)]
SEARCH = ("search", {"query": "gupezo", "k": 4})
TASK = world().tasks[0]


def session(faults: FaultConfig, uid: str = "t/g/0", shared: Any = None, **more: Any) -> Session:
    shared = shared or build_backend(BackendConfig(kind="bm25"), DOCS)
    config = SandboxConfig(**{"retry_wait_s": 0, "retries": 2, "faults": faults, **more})
    return Session(FaultyBackend(shared, faults, uid), config)


def ids(config: FaultConfig, uid: str = "t/g/0") -> list[str]:
    return [s.doc_id for s in play(session(config, uid), [SEARCH])[0].seen]


def test_what_each_fault_of_a_search_does() -> None:
    ranking = [
        h.doc_id for h in asyncio.run(build_backend(BackendConfig(kind="bm25"), DOCS).search([Query("gupezo", 16)]))[0]
    ]
    assert ids(FaultConfig()) == ranking[:4]
    assert ids(FaultConfig(empty=1)) == []
    assert ids(FaultConfig(truncated=1)) == ranking[:2]
    orders = {tuple(ids(FaultConfig(shuffled=1, seed=seed))) for seed in range(6)}
    assert len(orders) > 2 and all(sorted(order) == sorted(ranking[:4]) for order in orders)
    swapped = ids(FaultConfig(distractors=1))
    assert len(set(swapped)) == 4 and sum(i in ranking[:4] for i in swapped) == 2 and set(swapped) < set(ranking)
    shown = session(FaultConfig(distractors=1), shared=build_backend(BackendConfig(kind="bm25"), DOCS[:3]))
    play(shown, [SEARCH])
    assert shown.journal.entries[0].faults == (), "there was nothing to swap in, so nothing is noted"


def test_scores_stay_sorted_whatever_was_shuffled() -> None:
    faulty = FaultyBackend(build_backend(BackendConfig(kind="bm25"), DOCS), FaultConfig(shuffled=1))
    hits = asyncio.run(faulty.search([Query("gupezo rain 7", 8)]))[0]
    assert faulty.injected == ["shuffled"] and [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


def test_pages_are_cut_or_old() -> None:
    whole = DOCS[5].text
    for config, kind in ((FaultConfig(truncated=1), "truncated"), (FaultConfig(stale=1), "stale")):
        shown = session(config)
        page = play(shown, [("open", {"doc_id": "d05"})])[0].seen[0].text
        assert len(page) < len(whole) and shown.journal.entries[0].faults == (kind,)
        assert whole.startswith(page) or kind == "stale"
        match = play(shown, [("find", {"pattern": "number 5"})])[0]
        assert bool(match.seen) == ("number 5" in page), "find reads the page that was shown"
    kept = build_backend(BackendConfig(kind="bm25"), [Document("p", "P", "It is open.", {"older": "It is closed."})])
    assert (
        play(session(FaultConfig(stale=1), shared=kept), [("open", {"doc_id": "p"})])[0].seen[0].text == "It is closed."
    )


def test_faults_of_a_search_leave_the_pages_of_its_hits_alone() -> None:
    shown = session(FaultConfig(stale=1))
    found = play(shown, [SEARCH])[0]
    assert len(found.seen) == 4 and shown.journal.entries[0].faults == ()
    play(shown, [("open", {"doc_id": found.seen[0].doc_id})])
    assert shown.journal.entries[1].faults == ("stale",), "also after the search has fetched the page"


@pytest.mark.parametrize(("kind", "says"), [("timeout", "TimeoutError"), ("error", "503")])
def test_transport_faults_are_retried_and_then_mask_the_rollout(kind: str, says: str) -> None:
    dead = session(FaultConfig(**{kind: 1.0}))
    event = play(dead, [SEARCH])[0]
    assert event.infrastructure and says in event.text and dead.journal.entries[0].faults == (kind,) * 3
    assert dead.usage()["search"] == 0 and dead.usage()["uncharged"] == 1
    half = session(FaultConfig(**{kind: 0.5}), max_calls=0)
    play(half, [SEARCH] * 60)
    entries = half.journal.entries
    assert any(e.faults and not e.error for e in entries), "most are saved by a retry"
    assert all(e.error == ("backend" if len(e.faults) == 3 else "") for e in entries)
    assert 20 < sum(bool(e.faults) for e in entries) < 40


def test_latency_follows_its_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("envs.faults.asyncio.sleep", sleep)
    faulty = FaultyBackend(backend(), FaultConfig(latency=1, latency_p50_ms=100, latency_p99_ms=1000))
    for index in range(2000):
        faulty.begin(index)
        asyncio.run(faulty._travel())
    slept.sort()
    assert 0.09 < slept[1000] < 0.11 and 0.75 < slept[1980] < 1.35


ALL = FaultConfig(timeout=0.2, error=0.1, empty=0.1, truncated=0.2, shuffled=0.2, distractors=0.2, stale=0.4)


@settings(max_examples=40, deadline=None)
@given(actions(TASK), st.integers(0, 3))
def test_same_seed_and_actions_give_the_same_journal_whatever_others_do(calls: list[Any], seed: int) -> None:
    faults = FaultConfig(**{**vars(ALL), "seed": seed})

    async def together() -> list[Session]:
        sessions = [session(faults, uid, backend()) for uid in ("t/g/0", "t/g/1", "t/g/2")]
        await asyncio.gather(*(asyncio.to_thread(play, s, calls[: 4 * i or None]) for i, s in enumerate(sessions)))
        return sessions

    alone = session(faults, "t/g/0", backend())
    play(alone, calls)
    assert same(alone.journal, asyncio.run(together())[0].journal)


def test_seeds_and_trajectories_have_streams_of_their_own() -> None:
    def met(seed: int, uid: str) -> list[tuple[str, ...]]:
        shown = session(FaultConfig(**{**vars(ALL), "seed": seed}), uid, backend())
        play(shown, [("search", {"query": "mentor"})] * 30)
        return [e.faults for e in shown.journal.entries]

    assert met(0, "t/g/0") == met(0, "t/g/0")
    assert len({str(met(seed, uid)) for seed in (0, 1) for uid in ("t/g/0", "t/g/1", "t/h/0")}) == 6


class Stumbling:
    """Fails, for real, at the requests of these numbers."""

    def __init__(self, inner: Any, at: set[int]) -> None:
        self._inner, self._at, self._count = inner, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def search(self, queries: Any) -> Any:
        self._count += 1
        if self._count in self._at:
            raise ConnectionError("really gone")
        return await self._inner.search(queries)


def test_real_trouble_does_not_change_which_faults_are_made() -> None:
    calls = [("search", {"query": "mentor", "k": 4})] * 20
    calm = session(ALL, shared=backend(), retries=9)
    rough = session(ALL, shared=Stumbling(backend(), {1, 4, 5, 9}), retries=9)
    play(calm, calls), play(rough, calls)
    assert same(calm.journal, rough.journal) and len({e.faults for e in calm.journal.entries}) > 4
    assert sum(e.attempts for e in rough.journal.entries) == sum(e.attempts for e in calm.journal.entries) + 4


def test_a_page_is_guarded_before_and_after_its_faults() -> None:
    marked = Document("p", "P", "One. Two. Three. Four. Five. canary b7a3c1d9-4a4a", {"older": "by Lomitave"})
    task = Task("t", "Who?", ("J. R. R. Tolkien",))
    for kind in ("truncated", "stale"):
        config = SandboxConfig(guard=GuardConfig(canaries=["b7a3c1d9-4a4a"]), faults=FaultConfig(**{kind: 1.0}))
        shared = FaultyBackend(build_backend(BackendConfig(kind="bm25"), [marked]), config.faults, "t")
        shown = Session(shared, config, guard=guard_of(config, task))
        assert play(shown, [("open", {"doc_id": "p"})])[0].error == "leak_guard", "though the mark would be cut off"
    written = Document("p", "P", "By J. R. R. Tolkien and others. More. Yes. " * 3)
    older = Document("q", "Q", "Nothing.", {"older": "It is by JRR Tolkien."})
    for seed in range(8):
        config = SandboxConfig(guard=GuardConfig(answer="redact"), faults=FaultConfig(stale=1, seed=seed))
        shared = FaultyBackend(build_backend(BackendConfig(kind="bm25"), [written, older]), config.faults, "t")
        for event in play(
            Session(shared, config, guard=guard_of(config, task)), [("open", {"doc_id": i}) for i in "pq"]
        ):
            assert not event.error and "Tolkien" not in event.text and "R." not in event.text


def test_a_delay_beyond_the_time_limit_is_drawn_anew_for_the_next_attempt() -> None:
    late = FaultConfig(latency=1, latency_p50_ms=60_000, latency_p99_ms=60_000)
    shown = session(late, call_timeout_s=0.02)
    assert play(shown, [SEARCH])[0].error == "backend"
    assert shown.journal.entries[0].faults == ("latency",) * 3


def test_recovery_by_hand() -> None:
    uids = [Uid("t", "g", i) for i in range(6)]
    met = dict(zip(uids, [{"empty"}, {"empty", "stale"}, {"empty"}, set(), set(), {"timeout"}], strict=True))
    right = {uids[0]: True, uids[1]: False, uids[2]: True, uids[3]: True, uids[4]: False, uids[5]: None}
    rows = {r.fault: r for r in recovery(met, right, wilson)}
    assert list(rows) == ["none", "empty", "stale", "timeout"]
    assert (rows["empty"].met, rows["empty"].recovered, rows["empty"].masked) == (3, 2, 0)
    assert (rows["none"].met, rows["none"].recovered) == (2, 1) and (rows["stale"].met, rows["stale"].recovered) == (
        1,
        0,
    )
    assert (rows["timeout"].met, rows["timeout"].masked) == (0, 1)
    assert rows["empty"].rate == pytest.approx(2 / 3) and rows["empty"].low < 2 / 3 < rows["empty"].high


def test_rates_that_make_no_sense() -> None:
    for bad in (
        {"timeout": 1.1},
        {"stale": -0.1},
        {"timeout": 0.6, "error": 0.6},
        {"empty": 0.5, "shuffled": 0.6},
        {"truncated": 0.5, "stale": 0.6},
        {"latency_p50_ms": 0},
        {"latency_p99_ms": 1},
    ):
        with pytest.raises(ValueError):
            FaultConfig(**bad)  # type: ignore[arg-type]
    assert not FaultConfig().active and FaultConfig(latency=0.1).active
