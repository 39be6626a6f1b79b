"""A small corpus behind the HTTP server, for tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn

from agents.interfaces import Backend
from agents.types import BackendInfo, Document, Hit, Query
from envs.serve.app import make_app
from envs.serve.config import ServeConfig

DOCUMENTS = [
    Document(
        "https://a.example/cats",
        'The "cat" page',
        "Cats sleep.\n\nA cat purrs when it is content.",
        {"date": "2024-05-01"},
    ),
    Document("https://a.example/dogs", "Dogs", "Dogs bark at night. A dog guards the house."),
    Document("birds", "Birds", "Birds sing. " * 2000 + "The last bird is a wren."),
]


class Words:
    """A backend of documents by how many words of the query they hold; `fails` makes it fail."""

    def __init__(self, documents: Sequence[Document] = DOCUMENTS, *, spans: bool = False) -> None:
        self.documents = {d.id: d for d in documents}
        self.spans = spans
        self.fails: Exception | None = None
        self.searches: list[list[Query]] = []
        self.closed = False

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        self.searches.append(list(queries))
        if self.fails:
            raise self.fails
        return [self._hits(q) for q in queries]

    def _hits(self, query: Query) -> list[Hit]:
        wanted = set(query.text.lower().split())
        scores = {
            d.id: float(len(wanted & set(f"{d.title} {d.text}".lower().split()))) for d in self.documents.values()
        }
        best = sorted(scores, key=lambda i: (-scores[i], i))[: query.k]
        return [Hit(i, scores[i], (0, min(20, len(self.documents[i].text))) if self.spans else None) for i in best]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        if self.fails:
            raise self.fails
        return [self.documents.get(i) for i in ids]

    def info(self) -> BackendInfo:
        return BackendInfo("words", len(self.documents), "f1")

    async def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def client_of(
    backend: Backend, config: ServeConfig | None = None, **headers: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, in this process, while the app runs."""
    app = make_app(backend, config)
    async with (
        running(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=True),
            base_url="http://127.0.0.1:8000",
            headers=headers,
        ) as client,
    ):
        yield client


@asynccontextmanager
async def running(app: Any) -> AsyncIterator[None]:
    """The lifespan of an ASGI app."""
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    task = asyncio.create_task(
        app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, inbox.get, outbox.put)
    )
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
        await task


@contextmanager
def served(app: Any, lifespan: Any = "on") -> Iterator[str]:
    """An ASGI app on a free loopback port, in a thread; the address it has."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False, lifespan=lifespan))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        ends_at = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < ends_at
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
