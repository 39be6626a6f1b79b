"""Live search: providers' answers, pages behind them, keys that stay secret."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest

from agents.types import Document, Hit, Query, ToolCall
from envs.sandbox import Session
from retrieval.asking import HttpConfig
from retrieval.errors import BadQuery, Overloaded, RetrievalError
from retrieval.live import LiveBackend, LiveConfig
from retrieval.reader import Refused
from retrieval.service import SearchService

KEY = "the-secret-key"
ROWS = [
    {"title": "One", "link": "https://one.example/", "snippet": "first", "date": "2 May 2024"},
    {"title": "No link"},
    {"title": "Again", "link": "https://one.example/", "snippet": "the same"},
    {"title": None, "link": "https://two.example/", "snippet": None},
    {"title": "Three", "link": "https://three.example/", "snippet": "third"},
]


class Reader:
    async def read(self, url: str) -> Document:
        if "three" in url or "private" in url:
            raise Refused(f"{url} may not be read")
        return Document(url, "Title of the page", f"text of {url}", {"url": url, "live": True})


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)


def live(handler: Any, provider: str = "serper", retries: int = 1) -> LiveBackend:
    config = LiveConfig(provider=provider, http=HttpConfig(backoff_s=0.001, retries=retries))
    return LiveBackend(config, transport=httpx.MockTransport(handler), reader=Reader())  # type: ignore[arg-type]


async def test_serper_is_asked_as_it_wants() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, str(request.url)) == ("POST", "https://google.serper.dev/search")
        assert request.headers["x-api-key"] == KEY
        assert json.loads(request.content) == {"q": "who", "num": 2}
        return httpx.Response(200, json={"organic": ROWS})

    one = Document("https://one.example/", "One", "first", {"live": True, "date": "2 May 2024"})
    two = Document("https://two.example/", "", "", {"live": True})
    assert await live(handler).search([Query("who", 2)]) == [
        [Hit(one.id, 1.0, preview=one), Hit(two.id, 0.5, preview=two)]
    ]


async def test_serpapi_is_asked_as_it_wants() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.method == "GET" and request.url.host == "serpapi.com" and request.url.path == "/search.json"
        assert dict(request.url.params) == {"engine": "google", "q": "who", "num": "3", "api_key": KEY}
        return httpx.Response(200, json={"organic_results": ROWS})

    (hits,) = await live(handler, "serpapi").search([Query("who", 3)])
    assert [h.doc_id for h in hits] == ["https://one.example/", "https://two.example/", "https://three.example/"]


async def test_pages_are_read_when_they_are_asked_for() -> None:
    backend = live(lambda r: httpx.Response(200, json={"organic": ROWS}))
    one, private, word = await backend.get(["https://one.example/", "http://private/", "a word"])
    assert one is not None and (one.title, one.text) == ("Title of the page", "text of https://one.example/")
    assert private is None and word is None


async def test_a_search_shows_what_the_provider_says_and_only_an_open_reads() -> None:
    read: list[str] = []

    class Noting(Reader):
        async def read(self, url: str) -> Document:
            read.append(url)
            return await super().read(url)

    answers = httpx.MockTransport(lambda r: httpx.Response(200, json={"organic": ROWS}))
    session = Session(SearchService(LiveBackend(LiveConfig(), transport=answers, reader=Noting())))  # type: ignore[arg-type]
    found = await session.call(ToolCall("search", {"query": "who"}))
    assert "Description: third" in found.text and not read
    page = await session.call(ToolCall("open", {"doc_id": "https://one.example/"}))
    assert "text of https://one.example/" in page.text and read == ["https://one.example/"]
    assert (await session.call(ToolCall("open", {"doc_id": "https://three.example/"}))).error == "not_found"


async def test_it_says_that_it_is_not_repeatable() -> None:
    info = live(lambda r: httpx.Response(500)).info()
    assert (info.name, info.capabilities, info.num_docs) == ("live:serper", ("live",), 0)
    assert info.fingerprint.startswith("live-")


@pytest.mark.parametrize("provider", ["serper", "serpapi"])
async def test_keys_are_needed_and_never_told(
    provider: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    said: list[str] = []
    for answer in (401, 403, 400, 429, 500, httpx.ConnectError("no")):

        def handler(request: httpx.Request, answer: Any = answer) -> httpx.Response:
            if isinstance(answer, Exception):
                raise answer
            return httpx.Response(answer, json={"error": "no"})

        with pytest.raises(RetrievalError) as caught:
            await live(handler, provider, retries=0).search([Query("who")])
        assert isinstance(caught.value, Overloaded) == (answer == 429)
        said.append(str(caught.value))
    assert not any(KEY in line or "\n" in line for line in [*said, caplog.text.replace("\n", " ")])
    monkeypatch.delenv(f"{provider.upper()}_API_KEY")
    with pytest.raises(
        RetrievalError, match=f"{provider} needs its key in the environment variable {provider.upper()}_API_KEY"
    ):
        live(handler, provider)


async def test_odd_answers_are_errors_and_no_results_are_none() -> None:
    assert await live(lambda r: httpx.Response(200, json={})).search([Query("who")]) == [[]]
    for odd in ([], 7, "x", {"organic": {}}, {"organic": 3}):
        with pytest.raises(RetrievalError, match="no list of results"):
            await live(lambda r, odd=odd: httpx.Response(200, json=odd)).search([Query("who")])
    with pytest.raises(RetrievalError, match="not JSON"):
        await live(lambda r: httpx.Response(200, content=b"<html>")).search([Query("who")])
    with pytest.raises(BadQuery):
        await live(lambda r: httpx.Response(200)).search([Query("who", 0)])
    with pytest.raises(RetrievalError, match="serper, serpapi"):
        LiveBackend(LiveConfig(provider="google"))
