"""Search-R1's `/retrieve` and ASearcher's `/access`, as their clients call them.

A found document is `{"id", "url", "title", "contents"}` and, in a corpus of passages, `"span"`: `contents` is the title in quotes,
a line end, and the passage; `url` is the id, which `/access` takes to give the whole page. Invariants: as many lists as queries,
in their order; a blank query finds nothing rather than fail a batch of others; a big batch is searched in pieces, so it never
fills the queue by itself; the size of an answer is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.types import Document, Hit, Query
from envs.passages import one_line
from envs.serve.config import ServeConfig
from envs.serve.wire import Endpoint, Schema
from retrieval.errors import BadQuery
from retrieval.service import SearchService

_PIECE = 128
DOCUMENT: Schema = {
    "type": "object",
    "required": ["id", "url", "title", "contents"],
    "properties": {
        "id": {"type": "string"},
        "url": {"type": "string", "description": "The id again; `/access` takes it."},
        "title": {"type": "string"},
        "contents": {"type": "string", "description": "The title in quotes, a line end, and the text of the passage."},
        "span": {
            "type": "array",
            "items": {"type": "integer"},
            "minItems": 2,
            "maxItems": 2,
            "description": "Where the passage stands in the page, in characters; absent when `contents` is the whole page.",
        },
    },
}
_SCORED: Schema = {
    "type": "object",
    "required": ["document", "score"],
    "properties": {"document": DOCUMENT, "score": {"type": "number", "description": "Higher is better."}},
}


def endpoints(service: SearchService, config: ServeConfig) -> list[Endpoint]:
    """The two routes over a service."""

    async def retrieve(body: dict[str, Any]) -> dict[str, Any]:
        k = int(body.get("topk") or config.topk)
        texts: list[str] = body["queries"]
        found = await _search(service, texts, k)
        documents = await _fetch(service, [h.doc_id for hits in found for h in hits if h.preview is None], config)
        scored = bool(body.get("return_scores"))
        left = config.max_answer_chars
        result: list[list[dict[str, Any]]] = []
        for hits in found:
            result.append([])
            for hit in hits:
                document = hit.preview or documents.get(hit.doc_id)
                if document is None:
                    continue
                shown = as_document(document, hit.span)
                left -= len(shown["contents"])
                result[-1].append({"document": shown, "score": hit.score} if scored else shown)
            if left < 0:
                raise _too_much(config)
        return {"result": result}

    async def access(body: dict[str, Any]) -> dict[str, Any]:
        urls: list[str] = body["urls"]
        pages = await _fetch(service, urls, config)
        return {"result": [as_document(pages[u]) if u in pages else None for u in urls]}

    query: Schema = {"type": "string", "maxLength": service.config.max_query_chars}
    return [
        Endpoint(
            "/retrieve", "retrieve", "Search: the best documents of each query (Search-R1's protocol).",
            takes={
                "type": "object", "required": ["queries"],
                "properties": {
                    "queries": {"type": "array", "items": query, "maxItems": config.max_queries},
                    "topk": {"type": ["integer", "null"], "minimum": 0, "maximum": config.max_topk,
                             "description": f"Documents per query; null, 0 or absent: {config.topk}."},
                    "return_scores": {"type": ["boolean", "null"],
                                      "description": "Wrap each document as {document, score}."},
                },
            },
            gives={
                "type": "object", "required": ["result"],
                "properties": {"result": {"type": "array", "items": {
                    "type": "array", "items": {"anyOf": [_SCORED, DOCUMENT]}}}},
            },
            answer=retrieve,
        ),
        Endpoint(
            "/access", "access", "Whole pages by url or id, null where there is none (ASearcher's protocol).",
            takes={
                "type": "object", "required": ["urls"],
                "properties": {"urls": {"type": "array", "items": {"type": "string", "maxLength": 8192},
                                        "maxItems": config.max_urls}},
            },
            gives={
                "type": "object", "required": ["result"],
                "properties": {"result": {"type": "array", "items": {"anyOf": [DOCUMENT, {"type": "null"}]}}},
            },
            answer=access,
        ),
    ]  # fmt: skip


def as_document(document: Document, span: tuple[int, int] | None = None) -> dict[str, Any]:
    """A document, or a passage of it, as it goes over the wire."""
    title = one_line(document.title)
    text = document.text if span is None else document.text[span[0] : span[1]]
    shown: dict[str, Any] = {"id": document.id, "url": document.id, "title": title, "contents": f'"{title}"\n{text}'}
    if span is not None:
        shown["span"] = [int(span[0]), int(span[1])]
    return shown


async def _search(service: SearchService, texts: Sequence[str], k: int) -> list[list[Hit]]:
    asked = [Query(text, k) for text in texts if text.split()]
    found: list[list[Hit]] = []
    for start in range(0, len(asked), _PIECE):
        found += await service.search(asked[start : start + _PIECE])
    answers = iter(found)
    return [next(answers) if text.split() else [] for text in texts]


async def _fetch(service: SearchService, ids: Sequence[str], config: ServeConfig) -> dict[str, Document]:
    wanted = list(dict.fromkeys(ids))
    found: dict[str, Document] = {}
    size = 0
    for start in range(0, len(wanted), _PIECE):
        for document in await service.get(wanted[start : start + _PIECE]):
            if document is not None:
                found[document.id] = document
                size += len(document.text)
        if (
            size > 4 * config.max_answer_chars
        ):  # passages may be small parts of pages, but pages are what is held meanwhile
            raise _too_much(config)
    return found


def _too_much(config: ServeConfig) -> BadQuery:
    return BadQuery(
        f"the answer would hold more than {config.max_answer_chars} characters; ask for fewer documents at once"
    )
