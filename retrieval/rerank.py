"""A second look at the first hits: a cross-encoder reads query and passage together and puts them in its own order.

The model is a Hugging Face one of this process (a classifier with one label, or a causal model that answers yes or no as
Qwen3-Reranker does), or a server's `/rerank`. Invariants: hits come by the cross-encoder's score of their passage, ties by id; a query's
scores do not depend on the queries it shares a batch with (a server's word is taken for it); nothing of a model is unpickled or run:
weights are safetensors, remote code is refused. Torch is imported when the first passage is scored.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from agents.interfaces import Backend
from agents.types import BackendInfo, Document, Hit, Query
from retrieval.asking import Asker, HttpConfig, Reply, json_of, said
from retrieval.deadline import seconds_left
from retrieval.engine import Threads, check_k
from retrieval.errors import DeadlineExceeded, RetrievalError
from retrieval.manifest import digest
from retrieval.snippets import snippet

_APIS = {"cohere": "documents", "tei": "texts"}
"""Form of the request -> its name for the passages."""
_CHARS_PER_TOKEN = 4
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# the words Qwen3-Reranker was trained with (its model card)
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@dataclass
class RerankConfig:
    """Whether and how the first hits are put in order again."""

    model: str = ""
    """A cross-encoder: a folder, `package:NAME`, or a model id; for a server, the name it knows the model by."""
    url: str = ""
    """A server with `/rerank`, such as http://localhost:8000; empty: the model runs here."""
    api: str = "cohere"
    """What the server speaks: `cohere` (also Jina's and vLLM's) or `tei` (text-embeddings-inference)."""
    api_key_env: str = ""
    """Environment variable that holds the server's key, if it wants one."""
    depth: int = 30
    """Hits that are looked at again; at least as many as a query asks for."""
    max_length: int = 512
    """Tokens of query and passage together."""
    batch_size: int = 32
    """Passages at once."""
    timeout_s: float = 30.0
    """Longest request to a server."""

    @property
    def active(self) -> bool:
        return bool(self.model or self.url)

    def __post_init__(self) -> None:
        if self.api not in _APIS:
            raise ValueError(f"rerank.api is {self.api!r}; known: {', '.join(_APIS)}")
        for name in ("depth", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"rerank.{name} is {getattr(self, name)}; it must be at least 1")


class Scorer(Protocol):
    """Says how well passages answer a query."""

    async def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """One finite number for each passage; higher is better."""
        ...

    async def close(self) -> None: ...

    def spec(self) -> dict[str, Any]:
        """All that changes the scores."""
        ...


def make_scorer(config: RerankConfig) -> Scorer:
    """The scorer of a configuration. Raises RetrievalError."""
    return EndpointScorer(config) if config.url else CrossEncoder(config)


class RerankedBackend:
    """`agents.interfaces.Backend` over another, which it owns: closing it closes both."""

    def __init__(self, backend: Backend, config: RerankConfig, scorer: Scorer | None = None) -> None:
        self._backend, self._config = backend, config
        self._scorer = make_scorer(config) if scorer is None else scorer
        self._threads = Threads(1)

    def info(self) -> BackendInfo:
        inner = self._backend.info()
        c = self._config
        how = {"rerank": self._scorer.spec(), "depth": c.depth, "max_length": c.max_length, "inner": inner.fingerprint}
        return BackendInfo(f"{inner.name}+rerank", inner.num_docs, digest(how))

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Hits of each query by the cross-encoder's score. Raises BadQuery, and what backend and scorer raise."""
        check_k(queries)
        if not queries:
            return []
        deep = [Query(q.text, max(q.k, self._config.depth), q.filters) for q in queries]
        found = await self._backend.search(deep)
        ids = list(dict.fromkeys(hit.doc_id for hits in found for hit in hits if hit.preview is None))
        pages = dict(zip(ids, await self._backend.get(ids) if ids else (), strict=True))
        return list(await asyncio.gather(*(self._order(q, h, pages) for q, h in zip(queries, found, strict=True))))

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None where an id is unknown."""
        return await self._backend.get(ids)

    def stats(self) -> dict[str, float]:
        """Those of the backend below: whoever keeps results must hear that it served without a part of itself."""
        stats = getattr(self._backend, "stats", None)
        return {} if stats is None else dict(stats())

    async def close(self) -> None:
        self._threads.close()
        await self._scorer.close()
        await self._backend.close()

    async def _order(self, query: Query, hits: Sequence[Hit], pages: dict[str, Document | None]) -> list[Hit]:
        known = [(hit, page) for hit in hits if (page := hit.preview or pages[hit.doc_id]) is not None]
        if not known:
            return []
        passages = await self._threads.run(lambda: self._passages(query, known))
        scores = await self._scorer.score(query.text, passages)
        scored = [replace(h, score=score) for (h, _), score in zip(known, scores, strict=True)]
        return sorted(scored, key=lambda h: (-h.score, h.doc_id))[: query.k]

    def _passages(self, query: Query, known: Sequence[tuple[Hit, Document]]) -> list[str]:
        most, passages = self._config.max_length * _CHARS_PER_TOKEN, []
        for hit, page in known:
            if not seconds_left():  # long pages take long, and a thread cannot be stopped from outside
                raise DeadlineExceeded("the request's time ran out while its pages were read")
            passages.append(f"{page.title}\n{snippet(page.text, query.text, most, span=hit.span)}".strip())
        return passages


class CrossEncoder:
    """A model of this process, in a thread of its own."""

    def __init__(self, config: RerankConfig) -> None:
        """Finds the model, without reading its weights. Raises RetrievalError."""
        from retrieval.encode_hf import find_model, weights_digest

        self._folder: Path = find_model(config.model, what="rerank")
        self._weights = weights_digest(self._folder, what="rerank")
        self._config = config
        self._threads = Threads(1)
        self._loaded: tuple[Any, Any, Any, tuple[int, int] | None] | None = None

    def spec(self) -> dict[str, Any]:
        name = self._config.model.rstrip("/").rpartition("/")[2]
        return {"kind": "hf", "version": 1, "model": name, "weights": self._weights}

    async def score(self, query: str, passages: Sequence[str]) -> list[float]:
        return await self._threads.run(lambda: self._score(query, passages))

    async def close(self) -> None:
        self._threads.close()

    def _score(self, query: str, passages: Sequence[str]) -> list[float]:
        self._loaded = self._loaded or self._read()  # by the one thread there is
        torch, tokenizer, model, answers = self._loaded
        c = self._config
        if answers is None:
            options = {"truncation": "longest_first", "max_length": c.max_length}
            tokens = [tokenizer(query, passage, **options) for passage in passages]
        else:
            head, tail = tokenizer.encode(_BEFORE), tokenizer.encode(_AFTER)
            asked = [f"<Instruct>: {_INSTRUCTION}\n<Query>: {query}\n<Document>: {passage}" for passage in passages]
            room = max(1, c.max_length - len(head) - len(tail))
            tokens = [{"input_ids": head + tokenizer.encode(text)[:room] + tail} for text in asked]
        # of like length together, so that little is padding
        order = sorted(range(len(passages)), key=lambda i: len(tokens[i]["input_ids"]))
        scores = [0.0] * len(passages)
        for first in range(0, len(order), c.batch_size):
            batch = order[first : first + c.batch_size]
            padded = tokenizer.pad([tokens[i] for i in batch], return_tensors="pt").to(model.device)
            with torch.inference_mode():
                if answers is None:
                    values = model(**padded).logits[:, 0]
                else:
                    last = model(**padded, logits_to_keep=1).logits[:, -1]
                    values = last[:, answers[0]] - last[:, answers[1]]
            for i, value in zip(batch, values.float().tolist(), strict=True):
                scores[i] = value
        return _finite(f"rerank.model {c.model}", scores, len(passages))

    def _read(self) -> tuple[Any, Any, Any, tuple[int, int] | None]:
        """(torch, tokenizer, model, ids of yes and no for a causal model)"""
        c = self._config
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise RetrievalError(f"rerank.model needs torch and transformers ({error}); install them") from None
        options = {"local_files_only": True, "trust_remote_code": False}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            shape = AutoConfig.from_pretrained(self._folder, **options)
            causal = any(name.endswith("ForCausalLM") for name in shape.architectures or [])
            tokenizer = AutoTokenizer.from_pretrained(
                self._folder, padding_side="left" if causal else "right", **options
            )
            family = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
            dtype = torch.float16 if device == "cuda" else torch.float32
            model = family.from_pretrained(self._folder, use_safetensors=True, dtype=dtype, **options).to(device).eval()
        except Exception as error:
            detail = " ".join(str(error).split())[:200]
            raise RetrievalError(f"rerank.model {c.model} cannot be loaded: {detail}") from None
        if not causal:
            if shape.num_labels != 1:
                raise RetrievalError(
                    f"rerank.model {c.model} has {shape.num_labels} labels; a cross-encoder that ranks has 1"
                )
            return torch, tokenizer, model, None
        yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        if None in (yes, no) or tokenizer.unk_token_id in (yes, no):
            raise RetrievalError(
                f"rerank.model {c.model} is a causal model without the tokens yes and no; give a reranker"
            )
        return torch, tokenizer, model, (yes, no)


class EndpointScorer:
    """A server's `/rerank`."""

    def __init__(self, config: RerankConfig, transport: Any = None) -> None:
        """Raises RetrievalError: an address that is none, or a key that is not set."""
        parts = urlsplit(config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RetrievalError(f"rerank.url is {config.url!r}; give one such as http://localhost:8000")
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not key:
            raise RetrievalError(
                f"the environment variable {config.api_key_env} holds no key; set it, or empty rerank.api_key_env"
            )
        self._config = config
        self._url = config.url.rstrip("/").removesuffix("/rerank") + "/rerank"
        self._where = f"the reranker at {self._url}"
        patience = HttpConfig(
            config.timeout_s, 3 * config.timeout_s, retries=2, backoff_s=0.25, concurrency=16, max_bytes=2**24
        )
        headers = {"authorization": f"Bearer {key}"} if key else {}
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._asker = Asker(patience, headers=headers, local=local, transport=transport)

    def spec(self) -> dict[str, Any]:
        return {"kind": "endpoint", "model": self._config.model or self._url}

    async def score(self, query: str, passages: Sequence[str]) -> list[float]:
        size = self._config.batch_size
        parts = [passages[i : i + size] for i in range(0, len(passages), size)]
        return [s for scores in await asyncio.gather(*(self._ask(query, part) for part in parts)) for s in scores]

    async def close(self) -> None:
        await self._asker.close()

    async def _ask(self, query: str, passages: Sequence[str]) -> list[float]:
        c = self._config
        body: dict[str, Any] = {"query": query, _APIS[c.api]: list(passages)}
        if c.api == "tei":
            body["truncate"] = True
        elif c.model:
            body["model"] = c.model
        return self._scores(await self._asker.ask(self._where, "POST", self._url, json=body), len(passages))

    def _scores(self, reply: Reply, count: int) -> list[float]:
        if not reply.good:
            raise RetrievalError(
                f"{self._where} answers {reply.status}{said(reply.content)}; check rerank.model and rerank.api"
            )
        content = json_of(self._where, reply)
        try:
            entries = content["results"] if isinstance(content, dict) else content
            by_index = {
                e["index"]: float(e["relevance_score"] if "relevance_score" in e else e["score"]) for e in entries
            }
            scores = [by_index[i] for i in range(count)]
        except (LookupError, TypeError, ValueError):
            raise RetrievalError(
                f"{self._where} sent no score for each of {count} passages; check rerank.api"
            ) from None
        return _finite(self._where, scores, count)


def _finite(where: str, scores: list[float], count: int) -> list[float]:
    if len(scores) != count or not all(math.isfinite(s) for s in scores):
        raise RetrievalError(f"{where} gives scores that are not finite numbers; it cannot rank")
    return scores
