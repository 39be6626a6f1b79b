"""Another server's corpus as a backend: any `/retrieve` of Search-R1's form, and `/access` where it is offered.

Documents come with the hits, so `get` serves whole ones from what was seen, and asks `/access` for pages of which only a passage
came. Invariants: whatever a server sends, the outcome is hits or a one-line error; the server's order is kept, since it alone knows
what its scores mean; a span is only passed on while the page it belongs to can be had.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.asking import Asker, HttpConfig, json_of, said
from retrieval.errors import BadQuery, RetrievalError


@dataclass
class RemoteConfig:
    """Which server to ask, and how."""

    url: str = ""
    """Where the server is, such as http://10.0.0.5:8000; a trailing /retrieve is fine."""
    token_env: str = ""
    """Environment variable that holds the server's token, if it wants one."""
    batch: int = 64
    """Most queries, or pages, of one request."""
    seen_documents: int = 20_000
    """Documents kept from hits."""
    http: HttpConfig = field(default_factory=HttpConfig)
    """Times, retries and sizes."""


class _Found(NamedTuple):
    document: Document
    span: tuple[int, int] | None
    """Where the text stands in its page; None: the text is the page."""


class RemoteBackend:
    """`agents.interfaces.Backend` over a server."""

    def __init__(self, config: RemoteConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Raises RetrievalError for an address or a token that cannot be used."""
        base = config.url.strip().rstrip("/").removesuffix("/retrieve")
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RetrievalError(
                f"retrieval.remote.url {config.url!r} is no address; give one such as http://host:8000"
            )
        token = os.environ.get(config.token_env, "") if config.token_env else ""
        if config.token_env and not token:
            raise RetrievalError(f"retrieval.remote.token_env names {config.token_env}, which is not set")
        self.config, self._base = config, base
        headers = {"authorization": f"Bearer {token}"} if token else {}
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._asker = Asker(config.http, headers=headers, local=local, transport=transport)
        self._index, self._num_docs = "", 0
        self._seen: OrderedDict[str, _Found] = OrderedDict()
        self._access = True

    def info(self) -> BackendInfo:
        """Size and fingerprint are the server's own once it has told them, else 0 and its address: what it serves may change."""
        digest = hashlib.blake2b(f"{self._base}\0{self._index}".encode(), digest_size=16)
        return BackendInfo("remote", self._num_docs, digest.hexdigest(), ("remote",))

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Raises BadQuery, Overloaded, DeadlineExceeded, RetrievalError."""
        for query in queries:
            if query.k < 1:
                raise BadQuery(f"k is {query.k}; ask for at least 1 result")
            if query.filters:
                raise BadQuery(f"a remote server knows no filters, got {', '.join(map(str, query.filters))}")
        found = await asyncio.gather(*(self._search(piece) for piece in self._pieces(queries)))
        return [hits for piece in found for hits in piece]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents by id, None where neither the hits so far nor the server's pages have it."""
        self._asker.check_open()
        missing = [i for i in dict.fromkeys(ids) if i not in self._seen or self._seen[i].span is not None]
        pages: dict[str, Document] = {}
        for piece in self._pieces(missing) if self._access else ():
            answers = await self._ask("/access", {"urls": list(piece)}, len(piece))
            self._access = self._access and answers is not None
            for id_, item in zip(piece, answers or (), strict=False):
                page = _read(item)
                if page is not None:
                    pages[id_] = Document(id_, page.document.title, page.document.text)
        return [pages.get(i) or (self._seen[i].document if i in self._seen else None) for i in ids]

    async def close(self) -> None:
        await self._asker.close()

    def _pieces(self, whole: Sequence[Any]) -> list[Sequence[Any]]:
        return [whole[i : i + self.config.batch] for i in range(0, len(whole), self.config.batch)]

    async def _search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        k = max(q.k for q in queries)
        body = {"queries": [q.text for q in queries], "topk": k, "return_scores": True}
        found = await self._ask("/retrieve", body, len(queries))
        if found is None:
            raise RetrievalError(f"{self._base} has no route /retrieve; give the address of a retrieval server")
        return [self._hits(items, query.k) for items, query in zip(found, queries, strict=True)]

    def _hits(self, items: Any, k: int) -> list[Hit]:
        """Hits of one query, of documents with scores or bare; documents are remembered."""
        if not isinstance(items, list):
            raise RetrievalError(f"{self._base}/retrieve gave no list of documents for a query")
        hits: list[Hit] = []
        for rank, item in enumerate(items[:k]):
            scored = isinstance(item, Mapping) and "document" in item
            found = _read(item["document"] if scored else item)
            if found is None:
                raise RetrievalError(f"{self._base}/retrieve gave something that is no document")
            score = item.get("score") if scored else None
            if not isinstance(score, (int, float)) or not abs(score) < 1e300:  # none, or no number to sort by
                score = 1.0 / (rank + 1)
            key = found.document.id
            hits.append(Hit(key, float(score), found.span if self._access else None))
            self._seen[key] = found
            self._seen.move_to_end(key)
        while len(self._seen) > self.config.seen_documents:
            self._seen.popitem(last=False)
        return hits

    async def _ask(self, route: str, body: Mapping[str, Any], count: int) -> list[Any] | None:
        """The `result` of a route; None when there is no such route. Raises RetrievalError."""
        where = f"{self._base}{route}"
        reply = await self._asker.ask(where, "POST", where, json=body)
        if reply.status in (404, 405):
            return None
        if not reply.good:
            line = f"{where} answers {reply.status}{said(reply.content)}"
            if reply.status in (401, 403):
                raise RetrievalError(f"{line}; set retrieval.remote.token_env to the variable that holds its token")
            raise BadQuery(line) if reply.status in (400, 413, 422) else RetrievalError(line)
        self._index = reply.headers.get("x-index-fingerprint", self._index)[:200]
        told = reply.headers.get("x-index-documents", "")
        self._num_docs = int(told) if told.isascii() and told.isdigit() and len(told) < 16 else self._num_docs
        answer = json_of(where, reply)
        found = answer.get("result") if isinstance(answer, Mapping) else None
        if not isinstance(found, list) or len(found) != count:
            raise RetrievalError(f"{where} gave no `result` of {count} entries")
        return found


def _read(item: Any) -> _Found | None:
    """A document of a server: title and text apart, or `contents` with the title on its first line. None without text."""
    if not isinstance(item, Mapping):
        return None
    contents, title, text = item.get("contents"), item.get("title"), item.get("text")
    if isinstance(contents, str):
        head, _, text = contents.partition("\n")
        title = title if isinstance(title, str) else head.strip().removeprefix('"').removesuffix('"')
    if not isinstance(text, str):
        return None
    title = title if isinstance(title, str) else ""
    id_ = next((item[n] for n in ("id", "docid", "_id", "url") if isinstance(item.get(n), (str, int))), "")
    key = str(id_) or hashlib.blake2b(f"{title}\0{text}".encode("utf-8", "replace"), digest_size=12).hexdigest()
    span = item.get("span")
    if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int and x >= 0 for x in span)):
        return _Found(Document(key, title, text), None)
    return _Found(Document(key, title, text), (span[0], span[1]))
