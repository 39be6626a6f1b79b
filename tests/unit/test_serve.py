"""The HTTP server: its protocols, its errors, and who may come in."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from agents.types import BackendInfo, Document
from envs.serve.app import Health, make_app, prometheus
from envs.serve.config import ServeConfig
from envs.serve.limits import Buckets
from envs.serve.sessions import Sessions
from retrieval.errors import BadQuery, DeadlineExceeded, Overloaded, RetrievalError
from retrieval.service import SearchService, ServiceConfig
from tests.support.serving import DOCUMENTS, Words, client_of

CATS = {
    "id": "https://a.example/cats",
    "url": "https://a.example/cats",
    "title": 'The "cat" page',
    "contents": '"The "cat" page"\nCats sleep.\n\nA cat purrs when it is content.',
}
TOKEN = "a-token-of-sixteen-or-more"


def error_of(response: httpx.Response, status: int, type_: str) -> str:
    """The message of a typed error, once all about its form was checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"type", "message"} and error["type"] == type_
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in response.text
    return str(error["message"])


# ------------------------------------------------------------------------------------------------ Search-R1, ASearcher


async def test_retrieve_has_search_r1s_shapes() -> None:
    async with client_of(Words()) as client:
        body = {"queries": ["cat purrs", "dog"], "topk": 1, "return_scores": True}
        response = await client.post("/retrieve", json=body)
        assert response.json()["result"][0] == [{"document": CATS, "score": 2.0}]
        assert response.json()["result"][1][0]["document"]["id"] == "https://a.example/dogs"
        assert response.headers["x-index-fingerprint"] == "f1"
        for bare in ({"return_scores": False}, {}, {"return_scores": None}):
            found = (await client.post("/retrieve", json={"queries": ["cat purrs"], "topk": 1, **bare})).json()
            assert found == {"result": [[CATS]]}


async def test_topk_falls_back_and_a_blank_query_finds_nothing() -> None:
    async with client_of(Words(), ServeConfig(topk=2)) as client:
        for topk in ({}, {"topk": None}, {"topk": 0}):
            found = (await client.post("/retrieve", json={"queries": ["cat", " \n", "dog"], **topk})).json()["result"]
            assert [len(f) for f in found] == [2, 0, 2]
        assert (await client.post("/retrieve", json={"queries": []})).json() == {"result": []}


async def test_passages_carry_their_span_and_access_gives_the_whole_page() -> None:
    async with client_of(Words(spans=True)) as client:
        found = (await client.post("/retrieve", json={"queries": ["sing"], "topk": 1})).json()["result"][0][0]
        assert (found["contents"], found["span"]) == ('"Birds"\nBirds sing. Birds si', [0, 20])
        pages = (await client.post("/access", json={"urls": [found["url"], "nowhere"]})).json()["result"]
        assert pages[0]["contents"] == f'"Birds"\n{DOCUMENTS[2].text}' and "span" not in pages[0]
        assert pages[1] is None


async def test_a_batch_larger_than_the_queue_is_searched_in_pieces() -> None:
    service = SearchService(Words(), ServiceConfig(max_queue=128, max_batch=64))
    async with client_of(service) as client:
        queries = [f"cat {i}" for i in range(1000)]
        found = (await client.post("/retrieve", json={"queries": queries, "topk": 1})).json()["result"]
        assert len(found) == 1000 and all(f[0]["id"] == CATS["id"] for f in found)


async def test_an_answer_too_long_is_refused() -> None:
    async with client_of(Words(), ServeConfig(max_answer_chars=1000)) as client:
        response = await client.post("/retrieve", json={"queries": ["birds sing"], "topk": 1})
        assert "1000 characters" in error_of(response, 400, "BadQuery")


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "status", "type_"),
    [
        (b"", 400, "BadRequest"),
        (b"{", 400, "BadRequest"),
        (b"[1]", 400, "BadRequest"),
        (b"\xff\xfe{}", 400, "BadRequest"),
        (b'{"queries": NaN}', 400, "BadRequest"),
        (b"[" * 100_000, 400, "BadRequest"),
        (b'{"queries": ["\\ud800"]}', 422, "BadRequest"),
        (b"{}", 422, "BadRequest"),
        (b'{"queries": "cat"}', 422, "BadRequest"),
        (b'{"queries": [1]}', 422, "BadRequest"),
        (b'{"queries": ["a"], "topk": -1}', 422, "BadRequest"),
        (b'{"queries": ["a"], "topk": 101}', 422, "BadRequest"),
        (b'{"queries": ["a"], "topk": 1e400}', 422, "BadRequest"),
    ],
)
async def test_bad_bodies_are_told_so(body: bytes, status: int, type_: str) -> None:
    async with client_of(Words()) as client:
        response = await client.post("/retrieve", content=body, headers={"content-type": "application/json"})
        error_of(response, status, type_)


async def test_other_mistakes_are_typed_too() -> None:
    async with client_of(Words()) as client:
        error_of(await client.post("/retrieve", content=b"{}", headers={"content-type": "text/plain"}), 415, "UnsupportedMediaType")  # fmt: skip
        for path in ("/nothing", "/retrieve/", "/mcp/"):
            error_of(await client.get(path), 404, "NotFound")
        for path in ("/retrieve", "/access", "/", "/mcp"):
            response = await client.get(path)
            error_of(response, 405, "MethodNotAllowed")
            assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("raised", "status", "type_"),
    [
        (BadQuery("no such filter"), 400, "BadQuery"),
        (Overloaded("the queue is full"), 503, "Overloaded"),
        (DeadlineExceeded("too late"), 504, "DeadlineExceeded"),
        (RetrievalError("the index\nis gone"), 502, "RetrievalError"),
        (ZeroDivisionError("secret"), 500, "InternalError"),
    ],
)
async def test_failures_of_the_search_are_typed(raised: Exception, status: int, type_: str) -> None:
    backend = Words()
    backend.fails = raised
    async with client_of(backend) as client:
        response = await client.post("/retrieve", json={"queries": ["cat"]})
        message = error_of(response, status, type_)
        assert "secret" not in message
        assert ("retry-after" in response.headers) == (status == 503)
        assert "output" not in response.json()
        assert "output" in (await client.post("/", json={"session_id": "s", "name": "browser.search", "arguments": {"query": "cat"}})).json()  # fmt: skip


async def test_a_request_that_takes_too_long_ends() -> None:
    class Asleep(Words):
        async def search(self, queries: Any) -> Any:
            await asyncio.sleep(60)

    async with client_of(Asleep(), ServeConfig(request_timeout_s=0.05)) as client:
        error_of(await client.post("/retrieve", json={"queries": ["cat"]}), 504, "DeadlineExceeded")
        body = {"session_id": "s", "name": "browser.search", "arguments": {"query": "cat"}}
        response = await client.post("/", json=body)
        assert response.status_code == 504 and response.json()["error"]["type"] == "DeadlineExceeded"


# ---------------------------------------------------------------------------------------------------------- who comes in


async def test_bodies_are_limited_told_or_not() -> None:
    async with client_of(Words(), ServeConfig(max_body_bytes=1000)) as client:
        long = {"queries": ["x" * 2000]}
        error_of(await client.post("/retrieve", json=long), 413, "PayloadTooLarge")

        async def pieces() -> Any:
            for _ in range(100):
                yield b"x" * 100

        response = await client.post("/retrieve", content=pieces(), headers={"content-type": "application/json"})
        error_of(response, 413, "PayloadTooLarge")
        error_of(await client.post("/mcp", json=long), 413, "PayloadTooLarge")


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    async with client_of(Words(), ServeConfig(read_timeout_s=0.05)) as client:
        response = await client.post("/retrieve", content=slow(), headers={"content-type": "application/json"})
        error_of(response, 408, "RequestTimeout")


async def test_a_client_that_asks_too_often_must_wait() -> None:
    async with client_of(Words(), ServeConfig(requests_per_s=0.5, burst=3)) as client:
        answers = [await client.post("/retrieve", json={"queries": ["cat"]}) for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        error_of(answers[-1], 429, "TooManyRequests")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 2


def test_buckets_fill_again_by_hand() -> None:
    now = 0.0
    buckets = Buckets(2.0, 2, clock=lambda: now)
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0.5]
    assert buckets.take("b") == 0
    now = 0.25
    assert buckets.take("a") == 0.25
    now = 0.5
    assert buckets.take("a") == 0
    assert buckets.take("a") == 0.5


async def test_a_server_for_others_needs_a_token_and_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUMSHOE_SERVE_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.5", "corpus.example"):
        with pytest.raises(RetrievalError, match="needs a token: set GUMSHOE_SERVE_TOKEN"):
            make_app(Words(), ServeConfig(host=host))
    monkeypatch.setenv("GUMSHOE_SERVE_TOKEN", "short")
    with pytest.raises(RetrievalError, match="too weak"):
        make_app(Words(), ServeConfig(host="0.0.0.0"))
    monkeypatch.setenv("GUMSHOE_SERVE_TOKEN", TOKEN)
    async with client_of(Words(), ServeConfig(host="0.0.0.0"), host="corpus.example") as client:
        ask = {"queries": ["cat"]}
        for given in ("", TOKEN, f"Basic {TOKEN}", "Bearer wrong", "Bearer ", f"Bearer {TOKEN}x"):
            for route in ("/retrieve", "/access", "/", "/mcp"):
                response = await client.post(route, json=ask, headers={"authorization": given})
                error_of(response, 401, "Unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
            for route in ("/metrics", "/openapi.json", "/nothing"):
                error_of(await client.get(route, headers={"authorization": given}), 401, "Unauthorized")
        assert (await client.get("/healthz")).status_code == 200
        good = {"authorization": f"Bearer {TOKEN}"}
        assert (await client.post("/retrieve", json=ask, headers=good)).status_code == 200
        document = (await client.get("/openapi.json", headers=good)).json()
        assert document["security"] == [{"token": []}] and document["paths"]["/healthz"]["get"]["security"] == []


async def test_a_loopback_server_answers_to_loopback_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUMSHOE_SERVE_TOKEN", raising=False)
    async with client_of(Words()) as client:
        for host in ("127.0.0.1:8000", "localhost:9", "LOCALHOST", "[::1]:8000", "127.0.0.1"):
            assert (await client.get("/healthz", headers={"host": host})).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", ""):
            error_of(await client.get("/healthz", headers={"host": host}), 403, "Forbidden")


async def test_no_more_requests_at_once_than_allowed() -> None:
    class Gate(Words):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.entered = asyncio.Event(), asyncio.Event()

        async def search(self, queries: Any) -> Any:
            self.entered.set()
            await self.gate.wait()
            return await super().search(queries)

    backend = Gate()
    async with client_of(backend, ServeConfig(max_in_flight=1)) as client:
        first = asyncio.create_task(client.post("/retrieve", json={"queries": ["cat"]}))
        await backend.entered.wait()
        response = await client.post("/retrieve", json={"queries": ["dog"]})
        error_of(response, 503, "Overloaded")
        assert response.headers["retry-after"] == "1"
        backend.gate.set()
        assert (await first).status_code == 200


# ------------------------------------------------------------------------------------------------------- CaRR's protocol


async def call(
    client: httpx.AsyncClient, name: str, session: str = "s1", forbid: list[str] | None = None, **arguments: Any
) -> str:
    body = {"session_id": session, "tool_call_id": "x", "name": name, "arguments": arguments,
            "remote_env_info": {"url": "http://here/", "search_forbidden_strs": forbid or []}}  # fmt: skip
    response = await client.post("/", json=body)
    assert response.status_code == 200, response.text
    assert response.json().keys() == {"output"}
    return str(response.json()["output"])


async def test_a_trajectory_searches_opens_and_finds() -> None:
    async with client_of(Words()) as client:
        assert await call(client, "start_session")
        found = await call(client, "browser.search", query="cat purrs", num=2)
        assert found.splitlines()[:2] == ['[0] Title: The "cat" page', "[0] URL Source: https://a.example/cats"]
        assert found.splitlines()[2].startswith("[0] Description: ")
        assert "[1] Title:" in found and "[2] Title:" not in found
        page = await call(client, "browser.open", id=0)
        assert page == (
            'Title: The "cat" page\n\nURL Source: https://a.example/cats\n\nPublished Time: 2024-05-01\n\n'
            "Markdown Content:\nCats sleep.\n\nA cat purrs when it is content."
        )
        assert (
            await call(client, "browser.find", pattern="PURRS")
            == "[Match 1]\nCats sleep.\n\nA cat purrs when it is content."
        )
        assert (await call(client, "browser.open", id="https://a.example/dogs")).startswith("Title: Dogs\n")
        assert await call(client, "browser.find", pattern="purrs") == ""
        birds = await call(client, "browser.open", id="birds")
        assert "wren" not in birds and "wren" in await call(client, "browser.find", pattern="wren")
        assert await call(client, "close_session")
        assert await call(client, "browser.find", pattern="bark") == ""


async def test_sessions_share_nothing() -> None:
    async with client_of(Words()) as client:
        await call(client, "browser.search", "one", query="dogs bark", num=1)
        await call(client, "browser.search", "two", query="cat purrs", num=1)
        assert "Title: Dogs" in await call(client, "browser.open", "one", id=0)
        assert 'Title: The "cat" page' in await call(client, "browser.open", "two", id=0)
        assert await call(client, "browser.find", "three", pattern="cat") == ""


async def test_pages_that_repeat_the_question_are_hidden() -> None:
    question = "Which animal guards the house at night and barks while all of the people in it are asleep?"
    leak = Document("leak", "Answers", f"Q: {question} A: the dog")
    async with client_of(Words([*DOCUMENTS, leak])) as client:
        assert "URL Source: leak" in await call(client, "browser.search", query="animal guards house")
        for forbid in ([question], ["안녕", question.upper()]):
            assert "leak" not in await call(client, "browser.search", forbid=forbid, query="animal guards house")
            refused = await call(client, "browser.open", forbid=forbid, id="leak")
            assert refused.startswith("Error:") and "URL Source:" not in refused and "the dog" not in refused
        assert "Title: Answers" in await call(client, "browser.open", "other", forbid=["안녕", "  "], id="leak")


async def test_what_a_session_forbade_stays_forbidden() -> None:
    question = "Which animal guards the house at night and barks while all of the people in it are asleep?"
    leak = Document("leak", "Answers", f"Q: {question} A: the dog")
    forbid: dict[str, Any] = {"remote_env_info": {"search_forbidden_strs": [question]}}
    async with client_of(Words([*DOCUMENTS, leak])) as client:
        await client.post("/", json={"session_id": "s1", "name": "start_session", **forbid})
        assert "leak" not in await call(client, "browser.search", query="animal guards house")
        assert (await call(client, "browser.open", id="leak")).startswith("Error:")
        assert "Title: Answers" in await call(client, "browser.open", "s2", id="leak")
        assert await call(client, "browser.find", "s2", [question], pattern="the dog") == ""
        for start in range(5):
            texts = [f"text {start} {i}" for i in range(16)]
            body = {"session_id": "s3", "name": "start_session" if not start else "browser.find", "arguments": {},
                    "remote_env_info": {"search_forbidden_strs": texts}}  # fmt: skip
            response = await client.post("/", json=body)
            assert response.status_code == (200 if start < 4 else 422)


async def test_a_number_and_its_text_are_two_sessions() -> None:
    async with client_of(Words()) as client:
        await client.post("/", json={"session_id": 1, "name": "browser.open", "arguments": {"id": "birds"}})
        assert await call(client, "browser.find", "1", pattern="wren") == ""
        again = {"session_id": 1, "name": "browser.find", "arguments": {"pattern": "wren"}}
        assert "wren" in (await client.post("/", json=again)).json()["output"]


async def test_a_session_keeps_neither_its_calls_nor_its_pages() -> None:
    sessions = Sessions(SearchService(Words()), ServeConfig())
    for arguments in ({"query": "birds"}, {"query": "x", "junk": "y" * 1000}):
        await sessions.call({"session_id": "s", "name": "browser.search", "arguments": arguments})
    (held,) = sessions._held.values()
    assert not held.session.journal.entries and not held.session._documents
    assert held.session.usage()["calls"] == 2


async def test_an_agents_mistakes_are_sentences_without_a_source() -> None:
    async with client_of(Words()) as client:
        for name, arguments in [
            ("browser.open", {"id": "no such page"}), ("browser.open", {"id": 7}), ("browser.open", {}), ("browser.open", {"id": [1]}),
            ("browser.search", {}), ("browser.search", {"query": "cat", "num": "many"}), ("browser.search", {"query": " "}),
            ("browser.find", {}), ("browser.fly", {}), ("browser.search", {"query": "cat", "colour": "red"}),
        ]:  # fmt: skip
            said = await call(client, name, **arguments)
            assert said and "URL Source:" not in said and "doc_id" not in said, said


async def test_sessions_are_bounded_and_idle_ones_forgotten() -> None:
    now = 0.0
    sessions = Sessions(SearchService(Words()), ServeConfig(max_sessions=2, session_idle_s=10), clock=lambda: now)

    async def start(key: str) -> None:
        await sessions.call({"session_id": key, "name": "start_session"})

    await start("a")
    now = 5.0
    await start("b")
    with pytest.raises(Overloaded, match="2 sessions are open"):
        await start("c")
    now = 10.0  # a was last used 10 s ago, b 5 s ago
    await start("c")
    assert len(sessions) == 2
    with pytest.raises(Overloaded):
        await start("d")


# ------------------------------------------------------------------------------------------------------------ for people


async def test_health_is_green_only_after_a_search_succeeded() -> None:
    backend = Words()
    backend.fails = RetrievalError("no index yet")
    async with client_of(backend, ServeConfig(health_every_s=0)) as client:
        assert "no index yet" in error_of(await client.get("/healthz"), 503, "Unhealthy")
        backend.fails = None
        healthy = {"status": "ok", "backend": "words", "documents": 3, "fingerprint": "f1"}
        assert (await client.get("/healthz")).json() == healthy
        backend.fails = RetrievalError("gone")
        error_of(await client.get("/healthz"), 503, "Unhealthy")


async def test_many_probes_share_one_search() -> None:
    backend = Words()
    async with client_of(backend, ServeConfig(health_every_s=60)) as client:
        await asyncio.gather(*(client.get("/healthz") for _ in range(20)))
    assert len(backend.searches) == 1


async def test_a_failure_is_shared_too_and_a_paid_search_is_not_repeated() -> None:
    now, backend = 0.0, Words()
    backend.fails = RetrievalError("gone")
    health = Health(SearchService(backend), 5.0, clock=lambda: now)
    outcomes = await asyncio.gather(*(health.check() for _ in range(5)), return_exceptions=True)
    assert len(backend.searches) == 1 and all("gone" in str(o) for o in outcomes)
    backend.fails, now = None, 6.0
    await health.check()
    backend.info = lambda: BackendInfo("live:x", 0, "f", ("live",))  # type: ignore[method-assign]
    for now in (12.0, 600.0, 3000.0):  # noqa: B007 - the clock reads it
        await health.check()
    assert len(backend.searches) == 3


async def test_metrics_count_answers_and_show_the_service() -> None:
    async with client_of(Words()) as client:
        await client.post("/retrieve", json={"queries": ["cat"]})
        await client.post("/retrieve", content=b"", headers={"content-type": "application/json"})
        for i in range(3):
            await client.get(f"/nothing/{i}")
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        lines = response.text.splitlines()
        assert "gumshoe_queries 1" in lines
        assert 'gumshoe_http_answers_total{route="/retrieve",status="200"} 1' in lines
        assert 'gumshoe_http_answers_total{route="/retrieve",status="400"} 1' in lines
        assert 'gumshoe_http_answers_total{route="other",status="404"} 3' in lines


def test_prometheus_names_are_legal() -> None:
    figures = {"wait_p99_ms": 1.5, "a-b.c": 2, "name": "x", "queries": 12_345_678}
    assert prometheus(figures, {}).splitlines()[:3] == [
        "gumshoe_a_b_c 2",
        "gumshoe_queries 12345678",
        "gumshoe_wait_p99_ms 1.5",
    ]


async def test_closing_the_app_closes_the_backend() -> None:
    backend = Words()
    async with client_of(backend) as client:
        assert not backend.closed
        assert json.loads((await client.get("/openapi.json")).content)["openapi"] == "3.1.0"
    assert backend.closed
