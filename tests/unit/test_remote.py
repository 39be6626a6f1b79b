"""A remote `/retrieve` server as a backend: ours, Search-R1's and ASearcher's answer shapes, and servers that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest

from agents.types import Document, Hit, Query
from envs.serve.app import make_app
from envs.serve.config import ServeConfig
from retrieval.asking import HttpConfig
from retrieval.backend import build_backend
from retrieval.config import BackendConfig
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, Overloaded, RetrievalError
from retrieval.remote import RemoteBackend, RemoteConfig
from retrieval.service import SearchService, ServiceConfig
from tests.support.backend_contract import BackendContract, Build, Make, corpus
from tests.support.serving import DOCUMENTS, Words, running, served

Handler = Callable[[httpx.Request], httpx.Response]


def remote(handler: Any, seen_documents: int = 100, **http: Any) -> RemoteBackend:
    config = RemoteConfig(
        "http://corpus.example:8000",
        seen_documents=seen_documents,
        http=HttpConfig(**{"retries": 2, "backoff_s": 0.001, **http}),
    )
    return RemoteBackend(config, transport=httpx.MockTransport(handler))


def gives(result: Any, status: int = 200, **headers: str) -> Handler:
    return lambda request: httpx.Response(status, json=result, headers=headers)


# ------------------------------------------------------------------------------------------------------------- our server


@pytest.mark.parametrize("spans", [False, True])
async def test_our_own_server_gives_what_its_backend_gives(spans: bool) -> None:
    direct, app = Words(spans=spans), make_app(Words(spans=spans))
    async with running(app):
        backend = RemoteBackend(RemoteConfig(url="http://localhost:8000/retrieve"), transport=httpx.ASGITransport(app))
        queries = [Query("cat purrs", 2), Query("dog", 3), Query("wren sing", 1)]
        before = backend.info()
        assert await backend.search(queries) == await direct.search(queries)
        ids = [d.id for d in DOCUMENTS]
        found = await backend.get([*ids, "nowhere", ids[0]])
        assert [(d.title, d.text) for d in found[:3] if d] == [(d.title, d.text) for d in DOCUMENTS]
        assert found[3] is None and found[4] == found[0]
        assert backend.info().fingerprint != before.fingerprint, "the server told the fingerprint of its index"
        await backend.close()
        with pytest.raises(Closed):
            await backend.search(queries)


async def test_many_queries_are_asked_in_pieces_and_in_order() -> None:
    app = make_app(Words())
    async with running(app):
        backend = RemoteBackend(RemoteConfig(url="http://localhost:8000", batch=7), transport=httpx.ASGITransport(app))
        queries = [Query(word, 1) for word in ["cat", "dog", "wren"] * 20]
        hits = await backend.search(queries)
        assert [h[0].doc_id for h in hits[:3]] * 20 == [h[0].doc_id for h in hits]
        await backend.close()


def test_search_r1s_own_client_is_served() -> None:
    """The call its trainer makes: a bare post, then `result`, and of each document the first line and the rest."""
    with served(make_app(Words())) as url:
        payload = {"queries": ["cat purrs", "dog"], "topk": 3, "return_scores": True}
        results = httpx.post(f"{url}/retrieve", json=payload).json()["result"]
        assert [len(r) for r in results] == [3, 3]
        content = results[0][0]["document"]["contents"]
        assert content.split("\n")[0] == '"The "cat" page"'
        assert "\n".join(content.split("\n")[1:]) == DOCUMENTS[0].text


async def test_a_token_is_sent_and_its_absence_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUMSHOE_SERVE_TOKEN", "a-token-of-sixteen-or-more")
    monkeypatch.setenv("MY_TOKEN", "a-token-of-sixteen-or-more")
    app = make_app(Words(), ServeConfig(host="0.0.0.0"))
    async with running(app):
        for config, works in [
            (RemoteConfig(url="http://c:1", token_env="MY_TOKEN"), True),
            (RemoteConfig(url="http://c:1"), False),
        ]:
            backend = RemoteBackend(config, transport=httpx.ASGITransport(app))
            if works:
                assert await backend.search([Query("cat", 1)])
            else:
                with pytest.raises(RetrievalError, match=r"401.*token_env"):
                    await backend.search([Query("cat", 1)])
            await backend.close()
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(RetrievalError, match="MY_TOKEN, which is not set"):
        RemoteBackend(RemoteConfig(url="http://c:1", token_env="MY_TOKEN"))


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    for url in ("http://ann:S3CRET@corpus:8000", "ann:S3CRET@corpus:8000"):
        with pytest.raises(RetrievalError, match=r"retrieval\.remote\.token_env") as caught:
            RemoteBackend(RemoteConfig(url=url))
        assert "S3CRET" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "corpus:8000", "ftp://corpus", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RetrievalError, match=r"retrieval\.remote\.url"):
        RemoteBackend(RemoteConfig(url=url))


class TestOverOurServer(BackendContract):
    """What every backend must do, by way of HTTP; but for what a server does not tell before it is asked, and `meta`."""

    @pytest.fixture
    def build(self) -> Build:
        def build(documents: Iterable[Document]) -> RemoteBackend:
            behind = SearchService(
                build_backend(BackendConfig(kind="bm25"), documents), ServiceConfig(max_query_chars=100_000)
            )
            app = make_app(behind, ServeConfig(max_topk=10**9))
            return RemoteBackend(RemoteConfig(url="http://localhost"), transport=httpx.ASGITransport(app))

        return build

    async def test_pages_come_as_they_went_in(self, make: Make) -> None:
        backend, documents = make(), corpus()
        ids = ["nobody", "", "x" * 3000, "tie1 ", "a\x1f1", "\ud800", *(d.id for d in documents)]
        pages = await backend.get(ids)
        assert pages[:6] == [None] * 6
        assert [(p.id, p.title, p.text) for p in pages[6:] if p] == [(d.id, d.title, d.text) for d in documents]

    async def test_fingerprint_changes_with_the_corpus_and_nothing_else(self, make: Make) -> None:
        first, again, other = make(), make(reversed(corpus())), make(corpus()[1:])
        told = []
        for backend in (first, again, other):
            await backend.search([Query("zupero")])
            told.append(backend.info().fingerprint)
        assert told[0] == told[1] != told[2]


# ---------------------------------------------------------------------------------------------------------- others' shapes


async def test_search_r1s_shape_with_scores() -> None:
    rows = [
        {"document": {"id": "7", "contents": '"Title"\nbody\nmore'}, "score": 0.75},
        {"document": {"id": 9, "contents": "T\nx"}, "score": "?"},
    ]
    asked: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"result": [rows]}) if request.url.path == "/retrieve" else httpx.Response(404)

    backend = remote(handler)
    assert await backend.search([Query("q", 5)]) == [[Hit("7", 0.75), Hit("9", 0.5)]]
    assert asked == [("/retrieve", {"queries": ["q"], "topk": 5, "return_scores": True})]
    assert await backend.get(["7", "9", "1"]) == [Document("7", "Title", "body\nmore"), Document("9", "T", "x"), None]
    assert asked[1] == ("/access", {"urls": ["1"]})
    assert await backend.get(["1"]) == [None]
    assert len(asked) == 2, "a server without /access is asked once"


async def test_bare_documents_are_ranked_as_they_come() -> None:
    rows = [{"id": "b", "contents": "B\nb"}, {"title": "A", "text": "a"}, {"url": "http://c", "contents": "C\nc"}]
    backend = remote(gives({"result": [rows]}))
    (hits,) = await backend.search([Query("q", 2)])
    assert [h.score for h in hits] == [1.0, 0.5] and hits[0].doc_id == "b"
    assert len(hits[1].doc_id) == 24, "a document without an id gets one of its content"


async def test_a_passage_whose_page_cannot_be_had_is_a_document_of_its_own() -> None:
    rows = [
        {"id": "p", "contents": "P\nin the middle", "span": [20, 33]},
        {"id": "p", "contents": "P\nat the end", "span": [50, 60]},
        {"id": "q", "contents": "Q\nfound", "span": [3, 8]},
        {"id": "r", "contents": "R\nmoved", "span": [3, 8]},
    ]
    pages = {"q": {"id": "q", "contents": "Q\nis found here"}, "r": {"id": "r", "contents": "R\nan edited page"}}

    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        return httpx.Response(200, json={"result": [pages.get(u) for u in body["urls"]] if "urls" in body else [rows]})

    backend = remote(handler)
    (hits,) = await backend.search([Query("x", 4)])
    assert [h.span for h in hits] == [None, None, (3, 8), None] and len({h.doc_id for h in hits}) == 4
    texts = [d.text for d in await backend.get([h.doc_id for h in hits]) if d]
    assert texts == ["in the middle", "at the end", "is found here", "moved"]
    assert await backend.search([Query("x", 4)]) == [hits]


async def test_passages_of_one_address_keep_their_own_text() -> None:
    rows = [{"url": "u", "title": "A", "text": "first"}, {"url": "u", "title": "A", "text": "second"}]
    backend = remote(lambda r: httpx.Response(404) if r.url.path == "/access" else gives({"result": [rows]})(r))
    (hits,) = await backend.search([Query("x", 2)])
    assert hits[0].doc_id == "u" and hits[1].doc_id.startswith("u#")
    assert [d and d.text for d in await backend.get([h.doc_id for h in hits])] == ["first", "second"]


async def test_half_characters_do_not_come_in() -> None:
    body = b'{"result": [[{"id": "a\\ud800", "contents": "T\\nsmile \\uD83D\\uDE00 \\udc00"}]]}'
    backend = remote(lambda r: httpx.Response(200, content=body) if r.url.path == "/retrieve" else httpx.Response(404))
    ((hit,),) = await backend.search([Query("q", 1)])
    assert await backend.get([hit.doc_id]) == [Document("a?", "T", "smile \U0001f600 ?")]


async def test_seen_documents_are_bounded() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/access":
            return httpx.Response(404)
        return httpx.Response(200, json={"result": [[{"id": q, "contents": f"{q}\n{q}"}] for q in body["queries"]]})

    backend = remote(handler, seen_documents=2)
    await backend.search([Query(t, 1) for t in "abc"])
    assert [d is None for d in await backend.get(["a", "b", "c"])] == [True, False, False]


# ------------------------------------------------------------------------------------------------------------ misbehaviour


@pytest.mark.parametrize(
    "result",
    [
        None, [], {}, {"result": None}, {"result": []}, {"result": [[], []]}, {"result": ["x"]}, {"result": [[1]]},
        {"result": [[{"document": None, "score": 1}]]}, {"result": [[{"document": {"id": "a"}, "score": 1}]]}, {"result": [{"a": 1}]},
    ],
)  # fmt: skip
async def test_answers_of_another_form_are_one_error(result: Any) -> None:
    with pytest.raises(RetrievalError, match=r"corpus\.example") as caught:
        await remote(gives(result)).search([Query("q", 1)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [(400, BadQuery, 1), (422, BadQuery, 1), (401, RetrievalError, 1), (418, RetrievalError, 1), (429, Overloaded, 3), (503, Overloaded, 3), (500, RetrievalError, 3)],
)  # fmt: skip
async def test_statuses_become_typed_errors_and_passing_ones_are_tried_again(
    status: int, kind: type[Exception], tries: int
) -> None:
    count = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        return httpx.Response(status, json={"error": {"type": "T", "message": "it is\nso"}})

    with pytest.raises(kind, match="it is so") as caught:
        await remote(handler).search([Query("q", 1)])
    assert type(caught.value) is kind and count == tries


async def test_what_passes_is_survived() -> None:
    answers: list[Any] = [
        httpx.ConnectError("no"),
        httpx.ReadTimeout("slow"),
        httpx.Response(200, json={"result": [[]]}),
    ]

    def handler(request: httpx.Request) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert await remote(handler).search([Query("q", 1)]) == [[]]


async def test_a_dead_server_is_one_line() -> None:
    with pytest.raises(
        RetrievalError, match=r"http://127\.0\.0\.1:9/retrieve cannot be reached \(ConnectError\); is it running\?"
    ):
        await RemoteBackend(RemoteConfig(url="http://127.0.0.1:9", http=HttpConfig(retries=0))).search([Query("q", 1)])


async def test_a_silent_server_ends_in_time() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(DeadlineExceeded, match=r"no answer in 0\.05 s"):
        await remote(handler, timeout_s=0.05, retries=0).search([Query("q", 1)])
    with pytest.raises(DeadlineExceeded, match=r"no answer in 0\.1 s"):
        await remote(handler, timeout_s=30, deadline_s=0.1).search([Query("q", 1)])


async def test_a_retry_waits_as_long_as_it_is_told() -> None:
    with pytest.raises(DeadlineExceeded, match="answers 429"):
        await remote(gives({}, 429, **{"retry-after": "60"}), deadline_s=0.2).search([Query("q", 1)])


@pytest.mark.parametrize("packed", [False, True])
async def test_an_endless_answer_is_cut_off(packed: bool) -> None:
    import gzip

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            piece = gzip.compress(b"x" * 2**20) if packed else b"x" * 2**16
            while True:
                yield piece

    headers = {"content-encoding": "gzip"} if packed else {}
    with pytest.raises(RetrievalError, match="more than 1000000 bytes"):
        await remote(lambda r: httpx.Response(200, headers=headers, stream=Endless()), max_bytes=1_000_000).search([Query("q", 1)])  # fmt: skip


async def test_queries_it_cannot_pass_on_are_refused() -> None:
    for query in (Query("q", 0), Query("q", 1, {"year": 2020})):
        with pytest.raises(BadQuery):
            await remote(gives({})).search([query])
