"""Live web search as a backend: Serper or SerpAPI find urls, and the page reader reads them.

What it finds today it may not find tomorrow: `info` has the capability `live`, and only a recorded journal repeats a run.
Documents are pages, by url, read when they are asked for; a hit carries as its preview what the search engine said of its page.
Invariants: keys come from the environment and appear in no message; no page is fetched but by the reader, whose refusals make a page
unknown, not an error; a search reads no page.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.asking import Asker, HttpConfig, json_of
from retrieval.errors import BadQuery, RetrievalError
from retrieval.reader import PageReader, ReaderConfig, Refused

_MOST_RESULTS = 100


@dataclass
class LiveConfig:
    """Which search API to use. Its key is read from SERPER_API_KEY or SERPAPI_API_KEY unless `key_env` names another variable."""

    provider: str = "serper"
    """`serper` or `serpapi`."""
    key_env: str = ""
    """Environment variable that holds the key."""
    url: str = ""
    """Another address of the same API."""
    http: HttpConfig = field(
        default_factory=lambda: HttpConfig(timeout_s=20.0, retries=2, backoff_s=0.5, concurrency=8)
    )
    """Times, retries and sizes of a search."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """How pages are read."""


@dataclass(frozen=True)
class _Provider:
    url: str
    key_env: str
    results: str
    """Where the answer holds its results."""


PROVIDERS = {
    "serper": _Provider("https://google.serper.dev/search", "SERPER_API_KEY", "organic"),
    "serpapi": _Provider("https://serpapi.com/search.json", "SERPAPI_API_KEY", "organic_results"),
}


class LiveBackend:
    """`agents.interfaces.Backend` over a search API. Belongs to one event loop."""

    def __init__(
        self, config: LiveConfig, *, transport: httpx.AsyncBaseTransport | None = None, reader: PageReader | None = None
    ) -> None:
        """Raises RetrievalError for an unknown provider or a key that is not set."""
        if config.provider not in PROVIDERS:
            raise RetrievalError(
                f"retrieval.live.provider {config.provider!r} is unknown; one of {', '.join(PROVIDERS)}"
            )
        self._provider = PROVIDERS[config.provider]
        self._variable = config.key_env or self._provider.key_env
        self._key = os.environ.get(self._variable, "")
        if not self._key:
            raise RetrievalError(
                f"live search by {config.provider} needs its key in the environment variable {self._variable}"
            )
        self.config = config
        self._url = config.url or self._provider.url
        self._reader = reader or PageReader(config.reader)
        self._asker = Asker(config.http, transport=transport)
        if config.provider == "serpapi":  # its key is part of the address, which httpx logs
            logging.getLogger("httpx").setLevel(logging.WARNING)

    def info(self) -> BackendInfo:
        digest = hashlib.blake2b(f"live\0{self.config.provider}\0{self._url}".encode(), digest_size=16)
        return BackendInfo(f"live:{self.config.provider}", 0, f"live-{digest.hexdigest()}", ("live",))

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Hits by url, scored 1/rank. Raises BadQuery, Overloaded, DeadlineExceeded, RetrievalError."""
        for query in queries:
            if query.k < 1 or query.filters:
                raise BadQuery("live search takes no filters, and k of at least 1")
        return list(await asyncio.gather(*(self._search(q) for q in queries)))

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Pages by url, None for what cannot be read."""
        self._asker.check_open()
        return list(await asyncio.gather(*(self._page(i) for i in ids)))

    async def close(self) -> None:
        await self._asker.close()

    async def _page(self, url: str) -> Document | None:
        if not url.lower().startswith(("http://", "https://")):
            return None
        try:
            return await self._reader.read(url)
        except Refused:
            return None

    async def _search(self, query: Query) -> list[Hit]:
        count, name = min(query.k, _MOST_RESULTS), self.config.provider
        if name == "serper":
            body = {"q": query.text, "num": count}
            reply = await self._asker.ask(name, "POST", self._url, json=body, headers={"X-API-KEY": self._key})
        else:
            asked = {"engine": "google", "q": query.text, "num": str(count), "api_key": self._key}
            reply = await self._asker.ask(name, "GET", self._url, params=asked)
        if reply.status in (401, 403):
            raise RetrievalError(f"{name} refuses the key ({reply.status}); set it anew in {self._variable}")
        if not reply.good:
            raise RetrievalError(f"{name} refuses the search ({reply.status})")
        return self._hits(json_of(name, reply), query.k)

    def _hits(self, answer: Any, k: int) -> list[Hit]:
        results = answer.get(self._provider.results, []) if isinstance(answer, Mapping) else None
        if not isinstance(results, list):
            raise RetrievalError(f"{self.config.provider} answers with something that is no list of results")
        hits: dict[str, Hit] = {}
        for item in results:
            url = item.get("link") if isinstance(item, Mapping) else None
            if not isinstance(url, str) or url in hits or len(hits) == k:
                continue
            title, snippet, date = (str(item.get(n) or "") for n in ("title", "snippet", "date"))
            preview = Document(url, title, snippet, {"live": True, **({"date": date} if date else {})})
            hits[url] = Hit(url, 1.0 / (len(hits) + 1), preview=preview)
        return list(hits.values())
