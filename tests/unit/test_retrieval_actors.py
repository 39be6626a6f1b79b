"""Retrieval in several processes, without the processes: replicas that die or are slow, errors on their way, deadlines."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from agents.types import BackendInfo, Document, Hit, Member, Query, Task
from cluster import retrieval_actors
from cluster.actors import Actors
from cluster.replicas import Replicas, RouterClient, as_retrieval_error, pack, unpack
from cluster.retrieval_actors import IndexShard, PageStore, Parts, QueryEncoder, Retrieval, opened, place
from cluster.runtime import unsealed
from cluster.services import RewardServer
from cluster.watchdog import Waits
from retrieval.backend import BackendConfig, build_backend, open_backend
from retrieval.deadline import seconds_left, time_limit
from retrieval.engine import Found, LocalShard, Queries
from retrieval.errors import BadQuery, DeadlineExceeded, IndexMismatch, Overloaded, RetrievalError, Unavailable
from retrieval.manifest import digest
from retrieval.service import SearchService, ServiceConfig, Topology
from rewards.config import RewardConfig
from rewards.judges.base import JudgeConfig
from tests.support.reward_cases import group, page, rollout

DEAD = ray.exceptions.ActorDiedError()


def raised(error: Exception) -> Exception:
    """`error` as Ray hands it on from an actor."""
    return ray.exceptions.RayTaskError("work", "a traceback", error).as_instanceof_cause()


class Handle:
    """An actor of this process: `handle.method.remote(...)` calls the object's method, unless the test says otherwise."""

    def __init__(self, actor: Any = None) -> None:
        self.actor = actor
        self.calls = 0
        self.does: Callable[[], Any] | Exception | float | None = None
        """An error to raise, seconds to take, or None."""

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._run(method, args))

    async def _run(self, method: str, args: tuple[Any, ...]) -> Any:
        self.calls += 1
        if isinstance(self.does, Exception):
            raise self.does
        if isinstance(self.does, float):
            await asyncio.sleep(self.does)
        return "answer" if self.actor is None else await getattr(self.actor, method)(*args)


# ------------------------------------------------------------------------------------------------------ replicas


async def test_the_replica_with_the_least_to_do_is_asked() -> None:
    handles = [Handle(), Handle(), Handle()]
    replicas = Replicas("shard", handles, slow_s=5)
    handles[0].does = 0.2
    calls = [asyncio.create_task(replicas.call("search")) for _ in range(9)]
    await asyncio.gather(*calls)
    assert [h.calls for h in handles] == [3, 3, 3]
    handles[0].does = 5.0
    slow = asyncio.create_task(replicas.call("search"))
    await asyncio.sleep(0.01)
    for _ in range(6):
        await replicas.call("search")
    assert handles[0].calls == 4, "it is still busy"
    slow.cancel()


async def test_a_dead_replica_is_passed_over_and_asked_again_later() -> None:
    handles = [Handle(), Handle()]
    replicas = Replicas("shard", handles, slow_s=5)
    handles[0].does = DEAD
    assert [await replicas.call("search") for _ in range(6)] == ["answer"] * 6
    assert handles[0].calls == 1, "once is enough to know"
    replicas._down = [0.0, 0.0]
    handles[0].does, handles[1].does = None, DEAD
    assert [await replicas.call("search") for _ in range(3)] == ["answer"] * 3


async def test_a_slow_replica_is_backed_by_another() -> None:
    handles = [Handle(), Handle()]
    replicas = Replicas("shard", handles, slow_s=0.5)
    handles[0].does = 30.0
    began = time.monotonic()
    assert await replicas.call("search") == "answer"
    assert 0.4 < time.monotonic() - began < 20 and [h.calls for h in handles] == [1, 1]
    for _ in range(5):
        await replicas.call("search")
    assert handles[0].calls <= 2, "it is asked last for a while"


async def test_when_all_are_dead_it_waits_for_one_to_come_back_within_the_time_of_the_request() -> None:
    handles = [Handle(), Handle()]
    replicas = Replicas("shard 0", handles, slow_s=5)
    for handle in handles:
        handle.does = DEAD
    with time_limit(0.3), pytest.raises(Unavailable, match="shard 0: none of 2 processes"):
        await replicas.call("search")
    asyncio.get_running_loop().call_later(0.2, setattr, handles[1], "does", None)
    with time_limit(30):
        assert await replicas.call("search") == "answer"
    handles[0].does = handles[1].does = 30.0
    with time_limit(0.1), pytest.raises(DeadlineExceeded, match="shard 0"):
        await replicas.call("search")


async def test_what_a_replica_says_is_not_asked_of_another() -> None:
    handles = [Handle(), Handle()]
    handles[0].does = handles[1].does = raised(BadQuery("no such field"))
    with pytest.raises(BadQuery, match="no such field"):
        await Replicas("shard", handles, slow_s=5).call("search")
    assert handles[0].calls + handles[1].calls == 1


async def test_a_replica_that_lives_and_lacks_something_is_not_taken_for_dead() -> None:
    handles = [Handle(), Handle()]
    handles[0].does = handles[1].does = raised(Unavailable("the embeddings server answers 503"))
    with time_limit(5), pytest.raises(Unavailable, match="embeddings server answers 503"):
        await Replicas("encoder", handles, slow_s=5).call("encode")
    assert handles[0].calls + handles[1].calls == 1


def test_errors_keep_their_type_or_get_one() -> None:
    assert type(as_retrieval_error(raised(Overloaded("full")))) is Overloaded
    assert type(as_retrieval_error(Overloaded("full"))) is Overloaded
    assert type(as_retrieval_error(DEAD)) is Unavailable
    assert "KeyError" in str(as_retrieval_error(raised(KeyError("x"))))
    assert type(as_retrieval_error(raised(KeyError("x")))) is RetrievalError


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**40), st.floats(-1e6, 1e6)), max_size=5), max_size=5))
def test_packing_loses_nothing(found: list[list[tuple[int, float]]]) -> None:
    given_ = [
        Found(np.array([r for r, _ in f], dtype=np.int64), np.array([s for _, s in f], dtype=np.float64)) for f in found
    ]
    back = unpack(pack(given_))
    assert [(f.rows_K.tolist(), f.scores_K.tolist()) for f in back] == [
        (f.rows_K.tolist(), f.scores_K.tolist()) for f in given_
    ]
    assert all(f.rows_K.dtype == np.int64 and f.scores_K.dtype == np.float64 for f in back)


# --------------------------------------------------------------------------------------------- parts of an index

CONFIG = BackendConfig(kind="faiss", shards=3)
QUERIES = [Query(f"colour {i} thing{i % 7}", k=5) for i in range(20)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    documents = [Document(f"d{i:03}", f"title {i}", f"colour {i % 40} thing{i % 7} word{i}") for i in range(200)]
    folder = tmp_path_factory.mktemp("actors") / "index"
    asyncio.run(build_backend(CONFIG, documents, folder).close())
    yield str(folder)


def spread(index: str, replicas: int = 2) -> dict[str, list[Handle]]:
    made = {
        "encoder": [Handle(QueryEncoder(CONFIG, index, "", ServiceConfig()))],
        "store": [Handle(PageStore(CONFIG, index, ""))],
    }
    for number in range(3):
        made[f"faiss-{number}"] = [Handle(IndexShard(CONFIG, index, "", "faiss", number, 1)) for _ in range(replicas)]
    return made


async def test_spread_over_actors_it_finds_exactly_what_one_process_finds(index: str) -> None:
    handles = spread(index)
    assert all([await h.ready.remote() > 0 for found in handles.values() for h in found])
    whole = open_backend(CONFIG, index)
    parts = open_backend(CONFIG, index, Parts(opened(CONFIG, index, ""), handles, 5))
    assert whole.info() == parts.info()
    expected = await whole.search(QUERIES)
    assert await parts.search(QUERIES) == expected
    ids = ["d003", "none", "d001"]
    assert await parts.get(ids) == await whole.get(ids)
    handles["faiss-1"][0].does = DEAD
    assert await parts.search(QUERIES) == expected, "the other replica answers"
    handles["faiss-1"][1].does = DEAD
    with time_limit(1.5), pytest.raises(Unavailable, match="faiss-1"):
        await parts.search(QUERIES)  # two of three shards are no answer
    await whole.close()


async def test_equal_texts_are_encoded_once_and_come_back_in_order(index: str) -> None:
    encoder = QueryEncoder(CONFIG, index, "", ServiceConfig())
    one, two, again = await asyncio.gather(*(encoder.encode(t, 30.0) for t in (["a b"], ["c", "a b"], ["a b", "a b"])))
    assert np.array_equal(one[0], two[1]) and np.array_equal(again, np.stack([one[0], one[0]]))


async def test_a_shard_begins_no_search_that_comes_too_late(index: str) -> None:
    shard = IndexShard(CONFIG, index, "", "faiss", 0, 1)
    begun: list[float] = []
    gate = threading.Event()

    class Slow:
        def search(self, queries: Queries, k: int) -> list[Found]:
            begun.append(seconds_left())
            assert gate.wait(60)
            return []

    shard._shard = LocalShard(Slow(), 1)  # type: ignore[arg-type]
    asked = [asyncio.create_task(shard.search(("a",), None, 1, left_s)) for left_s in (60.0, 0.05, 0.05)]
    await asyncio.sleep(0)  # their time runs from here, on a slow machine too
    await asyncio.sleep(0.1)
    gate.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(f) for f in found] == [tuple, DeadlineExceeded, DeadlineExceeded]
    assert len(begun) == 1 and 0 < begun[0] <= 60


def test_an_actor_that_comes_back_to_another_index_refuses(index: str) -> None:
    with pytest.raises(IndexMismatch, match="when this run began"):
        PageStore(CONFIG, index, "0" * 32)


def test_the_topology_says_who_is_started(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, dict[str, Any]]] = []

    def actor(cls: type, **options: Any) -> Any:
        return SimpleNamespace(remote=lambda *args: started.append((cls.__name__, options)) or args)

    monkeypatch.setattr(retrieval_actors, "actor", actor)
    _, others = place(CONFIG, ServiceConfig(), index)
    assert [name for name, _ in started] == ["Retrieval"] and not others
    started.clear()
    topology = Topology(encoders=1, shard_replicas=2, stores=1)
    (_, _, _, fingerprint, handles), others = place(CONFIG, ServiceConfig(topology=topology), index)
    assert sorted(others) == ["encoder.0", *(f"faiss-{n}.{i}" for n in range(3) for i in range(2)), "store.0"]
    assert len(unsealed(handles)["faiss-2"]) == 2 and len(fingerprint) == 32
    assert all(options["max_restarts"] == -1 for _, options in started)
    with pytest.raises(ValueError, match="shard_replicas"):
        Topology(shard_replicas=-1)


# ---------------------------------------------------------------------------------------------- router and client


@pytest.fixture
def router(index: str) -> Retrieval:
    return Retrieval(CONFIG, ServiceConfig(max_query_chars=100), index)


async def test_a_router_is_well_after_a_search_of_its_own(router: Retrieval) -> None:
    assert (await router.pulse())[0] == "a search of its own"
    deadline = time.monotonic() + 20
    while (await router.pulse())[0]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    pid, info = await router.ready()
    assert pid and info.num_docs == 200
    assert (await router.load())["retrieval/queue_depth"] == 0


async def test_each_query_of_a_call_has_its_own_outcome(router: Retrieval) -> None:
    found: list[Any] = [None]
    while found[0] is None:  # errors come at once, and wait for nobody
        found = await router.ask([(Query("colour 3"), 30.0), (Query("x" * 101), 30.0), (Query("thing4"), 0.0)])
    assert len(found[0]) == 5 and isinstance(found[1], BadQuery) and isinstance(found[2], DeadlineExceeded)


async def test_the_router_tells_what_the_processes_it_leans_on_do(index: str) -> None:
    handles = spread(index)
    router = Retrieval(CONFIG, ServiceConfig(), index, digest(asdict(opened(CONFIG, index, "").manifest)), handles)
    handles["faiss-2"][1].does = DEAD
    while await router.ask([(Query("colour 3"), 30.0)]) == [None]:
        pass
    await router.get(["d001"], 30.0)
    told = await router.load()
    assert told["retrieval/encoder.0/batches"] >= 1 and told["retrieval/encoder.0/queue_depth"] == 0
    assert told["retrieval/store.0/get_p50_ms"] > 0 and told["retrieval/queries"] >= 1
    assert any(f"retrieval/faiss-0.{i}/search_p99_ms" in told for i in range(2))
    assert not any("faiss-2.1" in name for name in told), "it is dead, and nobody waits for it"


async def test_a_slow_query_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cancel", lambda reference: None)

    class Service:
        """Searches for as many seconds as the query says."""

        async def search(self, queries: list[Query], left_s: float) -> list[list[Any]]:
            await asyncio.sleep(float(queries[0].text))
            return [[Hit(queries[0].text, 1.0)]]

    router = object.__new__(Retrieval)
    router._service = Service()  # type: ignore[assignment]
    seen, handle = client(router)
    slow = [asyncio.create_task(seen.search([Query(f"30.{i}")])) for i in range(8)]
    fast = [asyncio.create_task(seen.search([Query(f"0.0{i}")])) for i in range(10)]
    with time_limit(15):
        assert [(await f)[0][0].doc_id for f in fast] == [f"0.0{i}" for i in range(10)]
        assert (await seen.search([Query("0.5")]))[0][0].doc_id == "0.5"
    assert not any(s.done() for s in slow) and handle.calls <= 20
    await seen.close()


def client(router: Any, timeout_s: float = 60.0) -> tuple[RouterClient, Handle]:
    handle = Handle(router)
    return RouterClient(handle, BackendInfo("faiss", 200, "f"), timeout_s, Waits()), handle


async def test_what_is_asked_at_the_same_time_shares_calls(router: Retrieval, index: str) -> None:
    seen, handle = client(router)
    found = await asyncio.gather(*(seen.search([q]) for q in QUERIES), *(seen.get([f"d{i:03}"]) for i in range(20)))
    whole = open_backend(CONFIG, index)
    assert [f[0] for f in found[:20]] == await whole.search(QUERIES)
    await whole.close()
    assert [f[0].id for f in found[20:]] == [f"d{i:03}" for i in range(20)]
    assert handle.calls <= 6, "of 40 requests"
    assert await seen.search([]) == [] and await seen.get([]) == []


async def test_the_agent_s_mistake_arrives_as_one_and_does_not_spoil_other_queries(router: Retrieval) -> None:
    seen, _ = client(router)
    good, bad = await asyncio.gather(
        seen.search([Query("colour 3")]), seen.search([Query("x" * 101)]), return_exceptions=True
    )
    assert isinstance(good, list) and type(bad) is BadQuery


@pytest.mark.parametrize(
    ("does", "type_"), [(DEAD, Unavailable), (raised(Overloaded("full")), Overloaded), (raised(OSError("disk")), RetrievalError)]
)  # fmt: skip
async def test_trouble_of_the_router_is_typed(router: Retrieval, does: Exception, type_: type) -> None:
    seen, handle = client(router)
    handle.does = does
    for ask in (seen.search([Query("a")]), seen.get(["d001"])):
        with pytest.raises(RetrievalError) as caught:
            await ask
        assert type(caught.value) is type_


async def test_the_time_of_a_request_travels_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    class Router:
        async def ask(self, batch: list[tuple[Query, float]]) -> list[Any]:
            told.extend(left for _, left in batch)
            return [()] * len(batch)

    seen, handle = client(Router(), timeout_s=50.0)
    await seen.search([Query("a")])
    with time_limit(20.0):
        await seen.search([Query("b")])
    assert 40 < told[0] <= 50 and 15 < told[1] <= 20
    monkeypatch.setattr(ray, "cancel", lambda reference: None)
    handle.does = 30.0
    with time_limit(0.05), pytest.raises(DeadlineExceeded):
        await seen.search([Query("c")])


async def test_a_backend_below_a_service_knows_how_long_it_is_wanted() -> None:
    left: list[float] = []

    class Backend:
        async def search(self, queries: Any) -> list[list[Any]]:
            left.append(seconds_left())
            return [[] for _ in queries]

        def info(self) -> BackendInfo:
            return BackendInfo("b", 1, "f")

    service = SearchService(Backend(), ServiceConfig(batch_timeout_s=9))  # type: ignore[arg-type]
    await service.search([Query("a")], timeout_s=4)
    with time_limit(2):
        await service.search([Query("b")])
    await service.search([Query("c")], timeout_s=20)
    assert 3 < left[0] <= 4 and 0 < left[1] <= 2 and 8 < left[2] <= 9


async def test_a_reward_looks_up_gold_documents_where_the_rollouts_search(router: Retrieval) -> None:
    info = (await router.ready())[1]
    server = RewardServer(RewardConfig(name="stepsearch"), JudgeConfig(), (), Handle(router), info, 60.0)
    task = Task("t", "q?", ("Paris",), gold_docs=("d001",))
    made = [
        rollout("## Exact Answer\nParis", [page(i, text)])
        for i, text in (("d001", "colour 1 thing1 word1"), ("x", "no"))
    ]
    seen, other = await server.score(group(task, *made))
    assert seen.parts["gain"] == pytest.approx(1.0) and other.parts["gain"] == 0.0
    lost = RewardServer(RewardConfig(name="stepsearch"), JudgeConfig(), (), broken := Handle(router), info, 60.0)
    broken.does = DEAD
    assert [v.causes for v in await lost.score(group(task, *made))] == [{"gain": "gold_texts_Unavailable"}] * 2


async def test_a_reward_counts_what_its_judge_is_asked_about_how_many_questions(router: Retrieval) -> None:
    info = (await router.ready())[1]
    server = RewardServer(RewardConfig(name="slate"), JudgeConfig(), (), Handle(router), info, 60.0)
    task = Task("t", "q?", ("Paris",))
    made = group(task, *(rollout("## Exact Answer\nParis", []) for _ in range(3)))
    step = replace(made, members=tuple(Member(t, 1) for t in made.trajectories))
    await server.score(step)
    await server.score(replace(made, members=made.members[:1]))
    counts = await server.load()
    assert (counts["judge/questions_steps"], counts["judge/asked_steps"]) == (1, 3)
    assert counts["judge/questions_whole"] == 1 and counts["judge/asked"] == 3, (
        "an answer is compared, and nobody asked"
    )


def test_what_retrieval_tells_joins_what_the_fleet_tells() -> None:
    actors = object.__new__(Actors)
    actors._loads = [SimpleNamespace(take=lambda v=v: v) for v in ({"a": 1.0}, {"b": 2.0}, None)]  # type: ignore[misc]
    assert actors.load() == {"a": 1.0, "b": 2.0}
