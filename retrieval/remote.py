"""Another server's corpus as a backend: any `/retrieve` of Search-R1's form, and `/access` where it is offered.

Documents come with the hits, so `get` serves them from what was seen. Of a passage the page is asked for at once, by `/access`: only
then is it a span of a page, else a document of its own. Invariants: whatever a server sends, the outcome is hits or a one-line error;
the server's order is kept, since it alone knows what its scores mean; a span is one of the page that `get` gives; one id has one text.
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
from retrieval.engine import check_k
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
        if "@" in config.url:  # the address stands in errors and logs
            raise RetrievalError(
                "retrieval.remote.url may hold no user or password; name a variable by retrieval.remote.token_env"
            )
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
        self._seen: OrderedDict[str, Document] = OrderedDict()
        self._access = True

    def info(self) -> BackendInfo:
        """Size and fingerprint are the server's own once it has told them, else 0 and its address: what it serves may change."""
        digest = hashlib.blake2b(f"{self._base}\0{self._index}".encode(), digest_size=16)
        return BackendInfo("remote", self._num_docs, digest.hexdigest(), ("remote",))

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Raises BadQuery, Overloaded, DeadlineExceeded, RetrievalError."""
        check_k(queries)
        for query in queries:
            if query.filters:
                raise BadQuery(f"a remote server knows no filters, got {', '.join(map(str, query.filters))}")
        found = await asyncio.gather(*(self._search(piece) for piece in self._pieces(queries)))
        return [hits for piece in found for hits in piece]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents by id, None where neither the hits so far nor the server's pages have it."""
        self._asker.check_open()
        known = {i: self._seen[i] for i in ids if i in self._seen}
        known |= await self._whole([i for i in dict.fromkeys(ids) if i not in known])
        return [known.get(i) for i in ids]

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
        results = [self._read_hits(items, query.k) for items, query in zip(found, queries, strict=True)]
        passages = [f for result in results for f, _ in result if f.span is not None]
        whole = {i: self._seen[i] for f in passages if (i := f.document.id) in self._seen}
        whole |= await self._whole([i for i in dict.fromkeys(f.document.id for f in passages) if i not in whole])
        hits = [[self._hit(f, score, whole.get(f.document.id)) for f, score in result] for result in results]
        while len(self._seen) > self.config.seen_documents:
            self._seen.popitem(last=False)
        return hits

    def _read_hits(self, items: Any, k: int) -> list[tuple[_Found, float]]:
        """Found documents of one query with their scores; they come with scores or bare."""
        if not isinstance(items, list):
            raise RetrievalError(f"{self._base}/retrieve gave no list of documents for a query")
        result = []
        for rank, item in enumerate(items[:k]):
            scored = isinstance(item, Mapping) and "document" in item
            found = _read(item["document"] if scored else item)
            if found is None:
                raise RetrievalError(f"{self._base}/retrieve gave something that is no document")
            score = item.get("score") if scored else None
            if not isinstance(score, (int, float)) or not abs(score) < 1e300:  # none, or no number to sort by
                score = 1.0 / (rank + 1)
            result.append((found, float(score)))
        return result

    def _hit(self, found: _Found, score: float, page: Document | None) -> Hit:
        """The hit, whose document is remembered: the page if there is one that has the passage where it says."""
        document, span = found.document, found.span
        if span and page is not None and page.text[slice(*span)] == document.text:
            document = page
        else:
            span, id_ = None, document.id
            if (known := self._seen.get(id_)) and known.text != document.text:  # several passages by one id
                id_ = f"{id_}#{_digest(document.text)}"
            document = Document(id_, document.title, document.text)
        self._seen[document.id] = document
        self._seen.move_to_end(document.id)
        return Hit(document.id, score, span)

    async def _whole(self, ids: Sequence[str]) -> dict[str, Document]:
        """Those of the pages that `/access` gives, by id."""
        pages: dict[str, Document] = {}
        pieces = self._pieces(ids) if self._access else []
        replies = await asyncio.gather(*(self._ask("/access", {"urls": list(p)}, len(p)) for p in pieces))
        for piece, answers in zip(pieces, replies, strict=True):
            self._access = self._access and answers is not None
            for id_, item in zip(piece, answers or (), strict=False):
                page = _read(item)
                if page is not None:
                    pages[id_] = Document(id_, page.document.title, page.document.text)
        return pages

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
        index = reply.headers.get("x-index-fingerprint", self._index)[:200]
        if index != self._index:  # the same id may mean another text now
            self._seen.clear()
        self._index = index
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
    key = str(id_) or _digest(f"{title}\0{text}")
    span = item.get("span")
    if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int and x >= 0 for x in span)):
        return _Found(Document(key, title, text), None)
    return _Found(Document(key, title, text), (span[0], span[1]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()
