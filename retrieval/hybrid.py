"""Several backends as one: the same query goes to each, and what they find is fused by reciprocal rank (Cormack et al. 2009).

score(d) = sum over legs of weight / (rrf_k + rank of d in the leg), ranks from 1. Invariants: ties are broken by id; the order of the
legs changes nothing; one leg alone keeps its ranking. A leg that fails fails the search, unless `degrade` is on: then the others serve
without it, which is counted, logged, and never silent: `stats()["degraded"]` grows. Whoever caches results must not keep those of a
search during which it grew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agents.interfaces import Backend
from agents.types import BackendInfo, Document, Hit, Query
from retrieval.engine import check_k
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, RetrievalError
from retrieval.manifest import digest

_log = logging.getLogger(__name__)


@dataclass
class HybridConfig:
    """How rankings are fused."""

    legs: list[str] = field(default_factory=lambda: ["bm25", "faiss"])
    """Backends to fuse, by kind."""
    weights: list[float] = field(default_factory=list)
    """What a leg's ranks are worth, in the order of `legs`; empty: 1 each."""
    rrf_k: int = 60
    """The larger, the less the first ranks stand out."""
    depth: int = 100
    """Hits each leg is asked for; at least as many as the query asks for."""
    degrade: bool = False
    """Serve without a leg that fails, rather than fail."""
    timeout_s: float = 0.0
    """Longest wait for a leg; 0: no limit of its own."""

    def __post_init__(self) -> None:
        if not self.legs or len(set(self.legs)) < len(self.legs):
            raise ValueError(f"hybrid.legs is {list(self.legs)}; name each leg once, and at least one")
        if self.weights and (len(self.weights) != len(self.legs) or not all(0 < w < math.inf for w in self.weights)):
            raise ValueError(f"hybrid.weights is {list(self.weights)}; give one positive number per leg, or none")
        if self.rrf_k < 0 or self.depth < 1 or self.timeout_s < 0:
            raise ValueError("hybrid.rrf_k and hybrid.timeout_s must not be negative, hybrid.depth must be at least 1")


def fuse(rankings: Sequence[Sequence[Hit]], k: int, rrf_k: int = 60, weights: Sequence[float] = ()) -> list[Hit]:
    """The best k documents of several rankings by reciprocal rank, ties by id.

    The span is that of the ranking which has the document highest, among those that know one.
    """
    parts: dict[str, list[float]] = {}
    spans: dict[str, tuple[int, tuple[int, int]]] = {}
    previews: dict[str, Document] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        places = {hit.doc_id: (rank, hit) for rank, hit in reversed([*enumerate(ranking, start=1)])}
        for rank, hit in places.values():
            parts.setdefault(hit.doc_id, []).append(weight / (rrf_k + rank))
            if hit.span is not None:
                spans[hit.doc_id] = min(spans.get(hit.doc_id, (rank, hit.span)), (rank, hit.span))
            if hit.preview is not None:
                previews[hit.doc_id] = hit.preview
    # exactly rounded sums, which no order of legs can change
    scores = {doc_id: math.fsum(values) for doc_id, values in parts.items()}
    best = sorted(scores, key=lambda i: (-scores[i], i))[:k]
    return [Hit(i, scores[i], spans[i][1] if i in spans else None, previews.get(i)) for i in best]


class HybridBackend:
    """`agents.interfaces.Backend` over others, which it owns: closing it closes them."""

    def __init__(self, legs: Mapping[str, Backend], config: HybridConfig, pages: Backend | None = None) -> None:
        """`legs`: a backend for each name of `config.legs`. `pages`: who gives documents; the first leg if it is None."""
        missing = [name for name in config.legs if name not in legs]
        if missing:
            raise ValueError(f"hybrid.legs names {missing[0]!r}, which is not among the backends {', '.join(legs)}")
        self._config, self._pages = config, pages
        self._legs = {name: legs[name] for name in config.legs}
        self._weights = dict(zip(config.legs, config.weights or [1.0] * len(config.legs), strict=True))
        self._failures = dict.fromkeys(config.legs, 0)
        self._degraded = 0
        self._down: set[str] = set()

    def info(self) -> BackendInfo:
        infos = {name: leg.info() for name, leg in self._legs.items()}
        how = {"rrf_k": self._config.rrf_k, "depth": self._config.depth}
        legs = {name: [info.fingerprint, self._weights[name]] for name, info in infos.items()}
        common = set.intersection(*(set(info.capabilities) for info in infos.values()))
        num_docs = max(info.num_docs for info in infos.values())
        return BackendInfo("hybrid", num_docs, digest({"hybrid": how, "legs": legs}), tuple(sorted(common)))

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Hits of each query, best first. Raises what a leg raises, with its name; with `degrade`, only when none answers."""
        check_k(queries)
        if not queries:
            return []
        deep = [replace(query, k=max(query.k, self._config.depth)) for query in queries]
        names = list(self._legs)
        answers = await asyncio.gather(*(self._ask(name, deep) for name in names), return_exceptions=True)
        found: dict[str, list[list[Hit]]] = {}
        errors: list[BaseException] = []
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, BaseException):
                errors.append(self._failed(name, answer))
            else:
                found[name] = answer
                if name in self._down:
                    self._down.discard(name)
                    _log.warning("hybrid search: leg %s answers again", name)
        if errors and not found:
            raise errors[0]
        self._degraded += len(queries) if errors else 0
        weights = [self._weights[name] for name in found]
        rankings = list(found.values())
        return [fuse([r[i] for r in rankings], q.k, self._config.rrf_k, weights) for i, q in enumerate(queries)]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None where an id is unknown. With `degrade`, from the next leg when one fails."""
        sources: list[Backend] = [self._pages] if self._pages is not None else list(self._legs.values())
        for source in sources[:-1] if self._config.degrade else []:
            with contextlib.suppress(RetrievalError, TimeoutError, OSError):
                return await source.get(ids)
        return await sources[-1 if self._config.degrade else 0].get(ids)

    async def close(self) -> None:
        """Closes all legs. May be called twice."""
        for backend in (*self._legs.values(), self._pages):
            if backend is not None:
                await backend.close()

    def stats(self) -> dict[str, float]:
        """`degraded`: queries served without a leg; `failed/LEG`: searches a leg failed."""
        return {"degraded": float(self._degraded), **{f"failed/{n}": float(c) for n, c in self._failures.items()}}

    async def _ask(self, name: str, queries: Sequence[Query]) -> list[list[Hit]]:
        limit_s = self._config.timeout_s or None
        try:
            async with asyncio.timeout(limit_s):
                return await self._legs[name].search(queries)
        except TimeoutError as error:
            if limit_s is None:
                raise
            raise DeadlineExceeded(f"no answer within {limit_s:g} s") from error

    def _failed(self, name: str, error: BaseException) -> BaseException:
        """Counts a failure. Raises it unless the others may serve without this leg; a query's own fault is never passed over."""
        if not isinstance(error, Exception):
            raise error
        kind: Any = type(error) if isinstance(error, RetrievalError) else RetrievalError
        detail = " ".join(str(error).split()) or type(error).__name__
        named = kind(f"leg {name} of the hybrid search: {detail}")
        self._failures[name] += 1
        if not self._config.degrade or isinstance(error, BadQuery | Closed):
            raise named from error
        if name not in self._down:
            self._down.add(name)
            _log.warning("hybrid search: leg %s fails, results come without it (%s)", name, detail[:300])
        return named
