"""Encodes texts by an OpenAI-compatible `/embeddings` server.

Invariants: a reply is used only when it holds one finite vector of the known length for each text; what may pass (429, 5xx, no
answer in time, no connection) is tried again with growing pauses, or after the server's `Retry-After`, as long as the time of the
request lasts, and what will not pass is one line at once; the key is read from the environment when it is needed, and stands in no
error, log or spec. The spec knows the model by its name alone: a server that changes the weights under a name is not noticed.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from retrieval.asking import Asker, HttpConfig, Reply
from retrieval.encoders import EncoderConfig, family_of, unit
from retrieval.errors import RetrievalError

_CHARS_PER_TOKEN = 4
_BACKOFF_S, _LONGEST_PAUSE_S = 0.5, 60.0
_MOST_BYTES = 2**28
_MEND = {
    401: "check the key in the variable that encoder.api_key_env names",
    403: "the key may not use this model",
    404: "check encoder.url and encoder.model",
}


class EndpointEncoder:
    """A client. Several threads may encode at once; queries are asked on one event loop."""

    def __init__(self, config: EncoderConfig) -> None:
        if not config.url.startswith(("http://", "https://")):
            raise RetrievalError(f"encoder.url is {config.url!r}; give one such as http://localhost:8000/v1")
        self.config = config
        self._url = config.url.rstrip("/").removesuffix("/embeddings") + "/embeddings"
        self._where = f"embeddings server {self._url}"
        family = family_of(config.model)
        self.query_prefix = family.query_prefix if config.query_prefix is None else config.query_prefix
        self.document_prefix = family.document_prefix if config.document_prefix is None else config.document_prefix
        self.normalize = config.normalize is not False
        self._dim = config.dim
        self._lock = threading.Lock()
        self._asker = self._new_asker()

    @property
    def dim(self) -> int:
        """As configured, else the length of a first vector that is asked for. Raises RetrievalError."""
        if not self._dim:
            self._encode(["dimension"], "")
        return self._dim

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "endpoint", "version": 1, "model": self.config.model, "normalize": self.normalize,
            "query_prefix": self.query_prefix, "document_prefix": self.document_prefix, "dim": self.dim,
            "max_length": self.config.max_length, "repeatable": False,
        }  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim]; blank texts give 0 and are not sent. Raises RetrievalError."""
        return self._encode(texts, self.document_prefix)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `encode_documents`."""
        return self._encode(texts, self.query_prefix)

    async def ask_queries(self, texts: Sequence[str]) -> np.ndarray:
        """`encode_queries` without a thread: it ends with the time of the request, and when it is cancelled."""
        return await self._ask(self._asker, texts, self.query_prefix)

    async def close(self) -> None:
        """Ends the connections of `ask_queries`. May be called twice."""
        await self._asker.close()

    def _new_asker(self) -> Asker:
        c = self.config
        longest_s = c.attempts * (c.timeout_s + _LONGEST_PAUSE_S)
        patience = HttpConfig(c.timeout_s, longest_s, c.attempts - 1, _BACKOFF_S, c.concurrency, _MOST_BYTES)
        return Asker(patience, local=urlsplit(c.url).hostname in ("127.0.0.1", "localhost", "::1"))

    def _encode(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        async def ask() -> np.ndarray:
            asker = self._new_asker()
            try:
                return await self._ask(asker, texts, prefix)
            finally:
                await asker.close()

        with ThreadPoolExecutor(1, thread_name_prefix="embeddings") as pool:  # this one may have an event loop
            return pool.submit(asyncio.run, ask()).result()

    async def _ask(self, asker: Asker, texts: Sequence[str], prefix: str) -> np.ndarray:
        most = self.config.max_length * _CHARS_PER_TOKEN or None
        rows = [i for i, text in enumerate(texts) if text.strip()]
        sent = [(prefix + texts[i])[:most] for i in rows]
        size = self.config.batch_size
        batches = [sent[i : i + size] for i in range(0, len(sent), size)]
        replies = await asyncio.gather(*(self._request(asker, batch) for batch in batches))
        vectors_ND = np.zeros((len(texts), self.dim), dtype=np.float32)
        if rows:
            vectors_ND[rows] = list(chain.from_iterable(replies))
        return unit(vectors_ND) if self.normalize else vectors_ND

    async def _request(self, asker: Asker, batch: list[str]) -> np.ndarray:
        """float32 [B, dim] of one request, tried as often as configured."""
        body: dict[str, Any] = {"model": self.config.model, "input": batch, "encoding_format": "float"}
        try:
            reply = await asker.ask(self._where, "POST", self._url, json=body, headers=self._headers())
        except RetrievalError as error:
            raise type(error)(self._clean(str(error))) from None
        if not reply.good:
            mend = _MEND.get(reply.status, "check encoder.model and encoder.max_length")
            raise RetrievalError(f"{self._where} answers {reply.status} {self._said(reply)}; {mend}")
        return self._vectors(reply, len(batch))

    def _vectors(self, reply: Reply, count: int) -> np.ndarray:
        try:
            data = sorted(json.loads(reply.content)["data"], key=lambda entry: entry["index"])
            places = [entry["index"] for entry in data]
            vectors_BD = np.asarray([entry["embedding"] for entry in data], dtype=np.float32)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise RetrievalError(
                f"{self._where} sent no embeddings ({self._said(reply)}); is it OpenAI-compatible?"
            ) from None
        if places != list(range(count)) or vectors_BD.ndim != 2 or not np.isfinite(vectors_BD).all():
            raise RetrievalError(
                f"{self._where} sent {len(data)} embeddings of shape {vectors_BD.shape} for {count} texts, "
                "or numbers that are not finite"
            )
        with self._lock:
            width = vectors_BD.shape[1]
            self._dim = self._dim or width
            if width < self._dim or (width > self._dim and not self.config.dim):
                raise RetrievalError(
                    f"{self._where} sent vectors of {width} dimensions, expected {self._dim}; mend encoder.dim"
                )
            return vectors_BD[:, : self._dim]

    def _headers(self) -> dict[str, str]:
        name = self.config.api_key_env
        if not name:
            return {}
        key = os.environ.get(name, "").strip()
        if not key:
            raise RetrievalError(f"the environment variable {name} holds no key; set it, or empty encoder.api_key_env")
        if not key.isascii() or not key.isprintable():
            raise RetrievalError(f"the key in the environment variable {name} has characters that no header can carry")
        return {"Authorization": f"Bearer {key}"}

    def _said(self, reply: Reply) -> str:
        """A server's words in one short line."""
        return self._clean(" ".join(reply.content[:4096].decode("utf-8", "replace").split()))[:200]

    def _clean(self, text: str) -> str:
        """Without the key, should the server echo it."""
        key = os.environ.get(self.config.api_key_env, "").strip() if self.config.api_key_env else ""
        return text.replace(key, "***") if key else text
