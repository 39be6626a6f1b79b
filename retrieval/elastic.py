"""Elasticsearch as a `Backend`, and the only file that knows its client. What is said stands in `retrieval.elastic_index`.

`open_backend` serves what `retrieval.elastic_load` loaded. Invariants:
- An open backend asks the very index it was opened on, whatever the alias points to later.
- Hits are sorted by (-score, document id). BM25 and `flat` vectors are exact; other vectors are as near as their index is, and their ties
  are broken by id among the candidates. With several shards, BM25 statistics are those of all shards together.
- Errors are one line that names the address and what to do.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agents.types import BackendInfo, Document, Hit, Query
from retrieval import elastic_index as form
from retrieval.chunks import ChunkConfig
from retrieval.elastic_index import ElasticConfig, Layout
from retrieval.engine import check_k
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, IndexMismatch, Overloaded, RetrievalError
from retrieval.hybrid import fuse

try:
    from elastic_transport import TlsError
    from elasticsearch import ApiError, AsyncElasticsearch, Elasticsearch, TransportError, UnsupportedProductError
    from elasticsearch import ConnectionTimeout as TimedOut
except ImportError as missing:
    raise RetrievalError(
        f"the Elasticsearch backend lacks a package ({missing}); install 'elasticsearch[async]>=8.19,<9'"
    ) from None

_PAGES = 256


class AsyncEncoder(Protocol):
    """What a dense search asks of one."""

    async def encode(self, texts: Sequence[str]) -> np.ndarray: ...

    async def close(self) -> None: ...


class ElasticBackend:
    """`agents.interfaces.Backend` over an index that `load` filled. Follows the event loop it is called from."""

    def __init__(self, config: ElasticConfig, index: str, layout: Layout, encoder: AsyncEncoder | None = None) -> None:
        self._config, self._index, self._layout, self._encoder = config, index, layout, encoder
        self._info = form.about(config, layout)
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def info(self) -> BackendInfo:
        return self._info

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Hits of each query, best first, ties by document id. Raises BadQuery, Overloaded, DeadlineExceeded, RetrievalError."""
        if self._closed:
            raise Closed("the retrieval backend is closed")
        most = min(self._info.num_docs, form.WINDOW)
        check_k(queries)
        for query in queries:
            if query.k > most < self._info.num_docs:
                raise BadQuery(f"k is {query.k}; Elasticsearch gives at most {form.WINDOW} results")
            if query.filters:
                raise BadQuery(f"backend {self._info.name} knows no filters, got {', '.join(map(str, query.filters))}")
        if not queries:
            return []
        legs = await self._legs([replace(q, k=min(q.k, most)) for q in queries])
        bodies = [body for of_query in legs for body in of_query if body is not None]
        replies = iter(await self._ask_all(bodies))
        results = []
        for query, of_query in zip(queries, legs, strict=True):
            found = [
                form.hits(next(replies), self._layout, vectors="knn" in body) if body is not None else []
                for body in of_query
            ]
            results.append(found[0][: query.k] if len(found) == 1 else fuse(found, query.k, self._config.rrf_k))
        return results

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None where an id is unknown."""
        if self._closed:
            raise Closed("the retrieval backend is closed")
        pages: dict[str, Document | None] = {}
        # an empty id is an error there, one that is not UTF-8 cannot be sent; both are unknown here
        wanted = [i for i in dict.fromkeys(ids) if i.encode("utf-8", "ignore").decode() == i != ""]
        for first in range(0, len(wanted), _PAGES):
            part = wanted[first : first + _PAGES]
            reply = await self._ask(
                "mget", index=self._index, ids=list(map(form.row_id, part)), source_includes=["page"]
            )
            pages |= {i: form.page(i, entry) for i, entry in zip(part, reply["docs"], strict=True)}
        return [pages.get(i) for i in ids]

    async def close(self) -> None:
        """Closes connections and encoder. May be called twice."""
        parts = self._client, self._encoder
        self._client, self._encoder, self._closed = None, None, True
        for part in parts:
            if part is not None:
                await part.close()

    async def _legs(self, queries: Sequence[Query]) -> list[list[dict[str, Any] | None]]:
        """The searches that each query takes; None where there is nothing to search for."""
        config, legs = self._config, [list[dict[str, Any] | None]() for _ in queries]
        sizes = [q.k if config.mode != "hybrid" else min(form.WINDOW, max(q.k, config.depth)) for q in queries]
        if config.mode != "dense":
            for leg, query, size in zip(legs, queries, sizes, strict=True):
                leg.append(form.text_search(self._layout, query.text, size))
        if config.dense:
            assert self._encoder is not None
            vectors_QD = await self._encoder.encode([q.text for q in queries])
            for leg, vector, size in zip(legs, vectors_QD, sizes, strict=True):
                leg.append(form.vector_search(config, self._layout, vector, size))
        return legs

    async def _ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        if not bodies:
            return []
        # half an answer (a shard that is down) would look like a worse index
        head = {"index": self._index, "allow_partial_search_results": False}
        if self._layout.shards > 1:
            head["search_type"] = "dfs_query_then_fetch"
        searches = [part for body in bodies for part in (head, body)]
        replies: list[Mapping[str, Any]] = (await self._ask("msearch", searches=searches))["responses"]
        for reply in replies:
            if "error" in reply:
                raise _refusal(self._config, *form.errors_of(reply))
            if reply["timed_out"] or reply["_shards"]["failed"]:
                raise _refusal(self._config, 503, "", "a shard gave no answer")
        return replies

    async def _ask(self, what: str, **arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # connections die with their loop
            self._client, self._loop = AsyncElasticsearch(**_connection(self._config)), loop
        try:
            return await getattr(self._client, what)(**arguments)
        except (ApiError, TransportError) as error:
            raise _ours(self._config, error) from None


def open_backend(
    config: ElasticConfig, *, title_weight: int = 2, chunk: ChunkConfig | None = None, corpus: str | None = None,
    encoder: AsyncEncoder | None = None, encoder_spec: Mapping[str, Any] | None = None, dims: int | None = None,
) -> ElasticBackend:  # fmt: skip
    """The backend over what the alias (or an index of ours, by name) holds. Calls block.

    `corpus`: a fingerprint that the index must have been loaded from; None takes any. `encoder_spec` and `dims` are those of
    `encoder`. Raises IndexMismatch, which names both values, and RetrievalError.
    """
    if config.dense and (encoder is None or encoder_spec is None):
        raise RetrievalError(f"mode {config.mode} of Elasticsearch needs an encoder; name one, or use mode bm25")
    where = f"index {config.index!r} at {address(config)}"
    with calls(config) as client:
        found = client.indices.get_mapping(index=config.index)
        if len(found) != 1:
            raise IndexMismatch(
                f"{where} stands for {len(found)} indexes ({', '.join(sorted(found))}); name one of them"
            )
        (index, described), *_ = found.items()
        mappings = described["mappings"]
        stored = form.read_meta(mappings)
        if stored is None:
            raise IndexMismatch(f"{where} was not loaded by Gumshoe (its mapping has no _meta.gumshoe); load a corpus")
        layout, num_passages = stored
        if num_passages is None:
            raise IndexMismatch(f"{where} is not loaded to its end; start the same load again")
        used = layout.text["analyzer"] if layout.text["analyzer"] == config.analyzer_fallback else config.analyzer
        asked = form.layout(
            config, corpus=layout.corpus if corpus is None else corpus,
            documents=layout.documents, title_weight=title_weight, chunk=chunk or ChunkConfig(),
            encoder=encoder_spec, dims=(layout.vectors or {}).get("dims") if dims is None else dims, used_analyzer=used,
        )  # fmt: skip
        wrong = layout.differences(asked, dense=config.dense)
        expected = form.creation(layout)["mappings"]["properties"]
        for name in ("doc", "body", "vector") if config.dense else ("doc", "body"):
            here, there = expected.get(name, {}), mappings.get("properties", {}).get(name, {})
            # a search in a field that is not there finds nothing and says nothing
            wrong += [
                f"field {name}.{key}: expected {here[key]!r}, found {there.get(key)!r}"
                for key in here.keys() & {"type", "dims", "similarity"}
                if here[key] != there.get(key)
            ]
        if wrong:
            raise IndexMismatch(f"{where} does not fit: {'; '.join(wrong)}; load it again or mend the config")
        counted = client.count(index=index)["count"]
        if counted != num_passages:
            raise IndexMismatch(f"{where} holds {counted} passages, was loaded with {num_passages}; load it again")
    return ElasticBackend(config, index, layout, encoder)


# --------------------------------------------------------------------------------------- connections and errors

_URL = re.compile(r"https?://([^/@:\[\]]+|\[[0-9a-fA-F:.]+\]):\d{1,5}(/[^@]*)?")


def _connection(config: ElasticConfig) -> dict[str, Any]:
    """Keyword arguments of a client. Raises RetrievalError for an address or a secret that cannot be used."""
    wrong = [re.sub("//.*@", "//...@", url) for url in config.urls if not _URL.fullmatch(url)]
    if wrong or not config.urls:
        what = f"holds {wrong[0]!r}" if wrong else "is empty"
        how = "write scheme, host and port, such as https://es1:9200, and keep credentials in the environment"
        raise RetrievalError(f"retrieval.elasticsearch.urls {what}; {how}")
    if bool(config.user_env) != bool(config.password_env) or (config.user_env and config.api_key_env):
        raise RetrievalError("retrieval.elasticsearch wants either api_key_env, or user_env and password_env, or none")
    options: dict[str, Any] = {
        "hosts": list(config.urls), "request_timeout": config.timeout_s, "max_retries": config.retries, "retry_on_timeout": False,
        "connections_per_node": config.connections,
    }  # fmt: skip
    if config.api_key_env:
        options["api_key"] = _secret("api_key_env", config.api_key_env)
    if config.user_env:
        pair = f"{_secret('user_env', config.user_env)}:{_secret('password_env', config.password_env)}"
        # the client's own basic_auth knows ASCII only
        options["headers"] = {"authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    if any(url.startswith("https:") for url in config.urls):
        options |= {"verify_certs": config.verify, "ssl_show_warn": config.verify}
        if config.ca_certs and not Path(config.ca_certs).is_file():
            raise RetrievalError(f"retrieval.elasticsearch.ca_certs names {config.ca_certs}, which is not a file")
        if config.ca_certs:
            options["ca_certs"] = config.ca_certs
    return options


def _secret(setting: str, variable: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise RetrievalError(f"retrieval.elasticsearch.{setting} names ${variable}, which is not set; export it")
    return value


@contextlib.contextmanager
def calls(config: ElasticConfig) -> Iterator[Any]:
    """A blocking client whose errors come out as ours."""
    client = Elasticsearch(**_connection(config))
    try:
        yield client
    except (ApiError, TransportError) as error:
        raise _ours(config, error) from None
    finally:
        client.close()


def _ours(config: ElasticConfig, error: Exception) -> RetrievalError:
    """Our error for one of the client's."""
    where = f"Elasticsearch at {address(config)}"
    if isinstance(error, UnsupportedProductError):
        old = "is not Elasticsearch 7.14 or newer (OpenSearch is not supported)"
        return RetrievalError(f"what answers at {address(config)} {old}; use 8.x or 9.x")
    if isinstance(error, ApiError):
        return _refusal(config, *said(error))
    if isinstance(error, TimedOut):
        return DeadlineExceeded(f"{where} gave no answer in {config.timeout_s:g} s")
    if isinstance(error, TlsError):
        how = "name its authority as retrieval.elasticsearch.ca_certs, and write http:// if it speaks no TLS"
        return RetrievalError(f"no secure connection to {where} ({one_line(error)}); {how}")
    how = "start it, or mend retrieval.elasticsearch.urls (https:// if it speaks TLS)"
    return RetrievalError(f"no {where.replace(' at', ' answers at', 1)} ({one_line(error)}); {how}")


def _refusal(config: ElasticConfig, status: int, kind: str, reason: str) -> RetrievalError:
    """Our error for what a server says, of a whole request or of one search in it."""
    where, index = f"Elasticsearch at {address(config)}", repr(config.index)
    cause = f"{status} {one_line(f'{kind}: {reason}' if kind else reason)}".strip()
    named = " and ".join(f"${n}" for n in (config.api_key_env, config.user_env, config.password_env) if n)
    if status == 401:
        how = (
            f"check {named}"
            if named
            else "name the variables that hold them: api_key_env, or user_env and password_env"
        )
        return RetrievalError(f"{where} wants valid credentials ({cause}); {how}")
    if status == 403:
        return RetrievalError(
            f"{where} forbids this to the user of {named or 'no credentials'} ({cause}); grant it there"
        )
    if kind == "index_not_found_exception":
        return RetrievalError(f"{where} has no index {index} ({cause}); load a corpus into it first")
    if status == 406 or kind == "media_type_header_exception":
        old = "it is OpenSearch, or older than Elasticsearch 8"
        return RetrievalError(
            f"what answers at {address(config)} does not speak with an 8.x client ({cause}): {old}; use 8.x or 9.x"
        )
    if status == 429:
        return Overloaded(f"{where} pushes back ({cause}); try again later")
    if status in (408, 502, 503, 504):
        return RetrievalError(f"{where} cannot serve index {index} now ({cause}); see GET /_cluster/health there")
    if "maxClauseCount" in reason or kind == "too_many_clauses":
        return BadQuery(f"the query has more words than {where} takes ({one_line(reason)}); shorten it")
    if "different number of dimensions" in reason:
        return IndexMismatch(
            f"the encoder does not fit index {index} at {address(config)}: {one_line(reason)}; load it again"
        )
    return RetrievalError(f"{where} refused a request ({cause})")


def said(error: Any) -> tuple[int, str, str]:
    """(status, type, reason) of what a server refused."""
    body = error.body.get("error") if isinstance(error.body, Mapping) else error.body
    return form.errors_of({"status": error.meta.status, "error": body})


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def address(config: ElasticConfig) -> str:
    return ", ".join(config.urls)
