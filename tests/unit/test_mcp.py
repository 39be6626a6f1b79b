"""The MCP server, asked by the official client: in this process, over HTTP, and over standard input and output."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from envs.serve.app import make_app
from envs.serve.config import ServeConfig
from envs.serve.mcp_tools import mcp_server
from gumshoe import ROOT, child_env
from retrieval.backend import build_backend
from retrieval.config import BackendConfig
from retrieval.errors import RetrievalError
from retrieval.service import SearchService
from tests.support.serving import DOCUMENTS, Words, running


async def test_tools_are_listed_with_their_schemas() -> None:
    async with Client(mcp_server(SearchService(Words()), ServeConfig())) as client:
        tools = {t.name: t for t in (await client.list_tools()).tools}
        assert tools.keys() == {"search", "get_document"}
        assert tools["search"].input_schema["required"] == ["query"]
        assert tools["get_document"].input_schema["required"] == ["docid"]


async def test_search_and_read() -> None:
    async with Client(mcp_server(SearchService(Words(spans=True)), ServeConfig(topk=2))) as client:
        found = await client.call_tool("search", {"query": "dog barks"})
        results = found.structured_content["results"]
        assert [r["docid"] for r in results][:1] == ["https://a.example/dogs"] and len(results) == 2
        assert results[0].keys() == {"docid", "score", "title", "text"}
        assert results[0]["text"] == DOCUMENTS[1].text[:20].strip()
        assert json.loads(found.content[0].text) == found.structured_content
        read = await client.call_tool("get_document", {"docid": "birds"})
        assert read.structured_content == {"docid": "birds", "title": "Birds", "text": DOCUMENTS[2].text}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("search", {}, "'query' is a required property"),
        ("search", {"query": "cat", "k": 0}, "$.k: 0 is less than"),
        ("search", {"query": "  "}, "empty"),
        ("get_document", {"docid": "nothing"}, "no document 'nothing'"),
        ("fly", {}, "no tool 'fly'"),
    ],
)
async def test_mistakes_are_results_marked_as_errors(name: str, arguments: dict[str, object], says: str) -> None:
    async with Client(mcp_server(SearchService(Words()), ServeConfig())) as client:
        answer = await client.call_tool(name, arguments)
        assert answer.is_error and says in answer.content[0].text


async def test_a_failing_engine_is_an_error_without_a_trace() -> None:
    backend = Words()
    backend.fails = ZeroDivisionError("secret")
    async with Client(mcp_server(SearchService(backend), ServeConfig())) as client:
        answer = await client.call_tool("search", {"query": "cat"})
        assert answer.is_error and "secret" not in answer.content[0].text
        backend.fails = RetrievalError("the index is gone")
        assert "the index is gone" in (await client.call_tool("search", {"query": "cat"})).content[0].text


async def test_a_tool_ends_in_time_and_long_pages_do_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asleep(Words):
        async def search(self, queries: Any) -> Any:
            await asyncio.sleep(60)

    async with Client(mcp_server(SearchService(Asleep()), ServeConfig(request_timeout_s=0.05))) as client:
        answer = await client.call_tool("search", {"query": "cat"})
        assert answer.is_error and "in time" in answer.content[0].text
    threads: set[int] = set()

    def window(*_: object) -> str:
        threads.add(threading.get_ident())
        return "cut"

    monkeypatch.setattr("envs.serve.mcp_tools.window", window)
    async with Client(mcp_server(SearchService(Words()), ServeConfig())) as client:
        assert not (await client.call_tool("search", {"query": "cat"})).is_error
    assert threads and threading.get_ident() not in threads


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_over_http_with_a_token(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "a-token-of-sixteen-or-more"
    monkeypatch.setenv("GUMSHOE_SERVE_TOKEN", token)
    app = make_app(Words(), ServeConfig(host="0.0.0.0"))
    async with running(app):
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), headers={"authorization": f"Bearer {token}"})
        transport = streamable_http_client("http://corpus.example/mcp", http_client=http)
        async with http, Client(transport, mode=mode) as client:
            found = await client.call_tool("search", {"query": "dog barks", "k": 1})
            assert found.structured_content["results"][0]["docid"] == "https://a.example/dogs"


async def test_over_standard_input_and_output(tmp_path: Path) -> None:
    backend = build_backend(BackendConfig(kind="bm25"), DOCUMENTS, tmp_path / "index")
    await backend.close()
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "cluster.cli", "serve", str(tmp_path / "index"), "--stdio"],
        env=child_env(), cwd=str(ROOT),
    )  # fmt: skip
    async with Client(server) as client:
        found = await client.call_tool("search", {"query": "who barks at night", "k": 1})
        assert found.structured_content["results"][0]["docid"] == "https://a.example/dogs"
        assert not (await client.call_tool("get_document", {"docid": "birds"})).is_error
