"""Encodes texts by an OpenAI-compatible `/embeddings` server.

Invariants: a reply is used only when it holds one finite vector of the known length for each text; what may pass (429, 5xx, no
answer in time, no connection) is tried again with growing pauses, or after the server's `Retry-After`, and what will not pass
is one line at once; the key is read from the environment when it is needed, and stands in no error, log or spec. The spec knows
the model by its name alone: a server that changes the weights under a name is not noticed.
"""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from retrieval.encoders import EncoderConfig, family_of, unit
from retrieval.errors import RetrievalError, Unavailable

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_CHARS_PER_TOKEN = 4
_LONGEST_PAUSE_S = 60.0
_MEND = {
    401: "check the key in the variable that encoder.api_key_env names",
    403: "the key may not use this model",
    404: "check encoder.url and encoder.model",
}


class EndpointEncoder:
    """A client. Several threads may encode at once."""

    def __init__(self, config: EncoderConfig) -> None:
        if not config.url.startswith(("http://", "https://")):
            raise ValueError(f"encoder.url is {config.url!r}; give one such as http://localhost:8000/v1")
        self.config = config
        self._url = config.url.rstrip("/").removesuffix("/embeddings") + "/embeddings"
        family = family_of(config.model)
        self.query_prefix = family.query_prefix if config.query_prefix is None else config.query_prefix
        self.document_prefix = family.document_prefix if config.document_prefix is None else config.document_prefix
        self.normalize = config.normalize is not False
        self._dim = config.dim
        self._lock = threading.Lock()
        self._client: Any = None

    @property
    def dim(self) -> int:
        """As configured, else the length of a first vector that is asked for. Raises RetrievalError."""
        if not self._dim:
            self._request(["dimension"])
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
        """float32 [N, dim]; blank texts give 0 and are not sent. Raises RetrievalError; Unavailable is worth another try."""
        return self._encode(texts, self.document_prefix)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `encode_documents`."""
        return self._encode(texts, self.query_prefix)

    def _encode(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        most = self.config.max_length * _CHARS_PER_TOKEN or None
        rows = [i for i, text in enumerate(texts) if text.strip()]
        sent = [(prefix + texts[i])[:most] for i in rows]
        size = self.config.batch_size
        batches = [sent[i : i + size] for i in range(0, len(sent), size)]
        if len(batches) < 2:
            replies = [self._request(batch) for batch in batches]
        else:
            with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="embeddings") as pool:
                replies = list(pool.map(self._request, batches))
        vectors_ND = np.zeros((len(texts), self.dim), dtype=np.float32)
        if rows:
            vectors_ND[rows] = list(chain.from_iterable(replies))
        return unit(vectors_ND) if self.normalize else vectors_ND

    def _request(self, batch: list[str]) -> np.ndarray:
        """float32 [B, dim] of one request, tried as often as configured."""
        import httpx

        body: dict[str, Any] = {"model": self.config.model, "input": batch, "encoding_format": "float"}
        client, reason = self._open(), ""
        for attempt in range(self.config.attempts):
            pause_s = min(_LONGEST_PAUSE_S, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                reply = client.post(self._url, json=body, headers=self._headers())
            except httpx.TimeoutException:
                reason = f"no answer within {self.config.timeout_s:g} s"
            except httpx.TransportError as error:
                reason = f"cannot be reached ({type(error).__name__}: {self._clean(str(error))})"
            except httpx.InvalidURL as error:
                raise RetrievalError(f"encoder.url {self._url} is no address: {error}") from None
            else:
                if reply.status_code == 200:
                    return self._vectors(reply, len(batch))
                reason = f"answers {reply.status_code} {self._clean(reply.text)}".strip()
                if reply.status_code not in _RETRIED:
                    mend = _MEND.get(reply.status_code, "check encoder.model and encoder.max_length")
                    raise RetrievalError(f"embeddings server {self._url} {reason}; {mend}")
                pause_s = _retry_after(reply.headers.get("retry-after", "")) or pause_s
            if attempt + 1 < self.config.attempts:
                time.sleep(pause_s)
        raise Unavailable(f"embeddings server {self._url} {reason}; {self.config.attempts} tries failed")

    def _vectors(self, reply: Any, count: int) -> np.ndarray:
        try:
            data = sorted(reply.json()["data"], key=lambda entry: entry["index"])
            places = [entry["index"] for entry in data]
            vectors_BD = np.asarray([entry["embedding"] for entry in data], dtype=np.float32)
        except (ValueError, KeyError, TypeError):
            raise RetrievalError(
                f"embeddings server {self._url} sent no embeddings ({self._clean(reply.text)}); is it OpenAI-compatible?"
            ) from None
        if places != list(range(count)) or vectors_BD.ndim != 2 or not np.isfinite(vectors_BD).all():
            raise RetrievalError(
                f"embeddings server {self._url} sent {len(data)} embeddings of shape {vectors_BD.shape} for {count} texts, "
                "or numbers that are not finite"
            )
        with self._lock:
            width = vectors_BD.shape[1]
            self._dim = self._dim or width
            if width < self._dim or (width > self._dim and not self.config.dim):
                raise RetrievalError(
                    f"embeddings server {self._url} sent vectors of {width} dimensions, expected {self._dim}; mend encoder.dim"
                )
            return vectors_BD[:, : self._dim]

    def _open(self) -> Any:
        import httpx

        with self._lock:
            if self._client is None:
                self._client = httpx.Client(timeout=self.config.timeout_s)
            return self._client

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

    def _clean(self, text: str) -> str:
        """A server's words in one short line, without the key, should it echo it."""
        key = os.environ.get(self.config.api_key_env, "").strip() if self.config.api_key_env else ""
        text = " ".join(text.split())
        return (text.replace(key, "***") if key else text)[:200]


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for (a number or a date), 0 without one; at most a minute."""
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(wait_s, 0.0), _LONGEST_PAUSE_S) if np.isfinite(wait_s) else 0.0
