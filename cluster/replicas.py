"""Calls of retrieval across processes: any of several equal actors answers, and errors arrive as what they are.

Invariants:
- A result is whole: every shard has answered for it, or there is a typed error instead.
- A replica that died or is slow is passed over for another as long as the request's time lasts (`retrieval.deadline`), also while all
  are dead and come back.
- Arrays cross as arrays. Errors of `retrieval.errors` arrive as themselves; a dead process is `Unavailable`, a silent one
  `DeadlineExceeded`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from agents.types import BackendInfo, Document, Hit, Query
from cluster.errors import one_line
from cluster.watchdog import Waits
from retrieval.batching import AGAIN, Batcher, Item
from retrieval.deadline import seconds_left
from retrieval.engine import Found, Queries
from retrieval.errors import DeadlineExceeded, RetrievalError, Unavailable
from retrieval.meter import Meter
from retrieval.service import query_key

_AGAIN_S = 0.1
"""Between two calls of an actor that is dead."""
_NO_LIMIT_S = 3600.0
_CALLS = 4
"""Calls of one client that are under way at once; what comes meanwhile shares the next."""

Packed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""int64 [Q] how many each query found; int64 rows and float64 scores of all, one query after another."""
PlainHits = list[tuple[str, float, tuple[int, int] | None, Document | None]]
"""Hits as their values: pickling the records takes ten times as long."""


def pack(found: Sequence[Found]) -> Packed:
    """Three arrays cross a process boundary faster than hundreds."""
    rows, scores = [f.rows_K for f in found], [f.scores_K for f in found]
    counts_Q = np.array([len(r) for r in rows], dtype=np.int64)
    return counts_Q, np.concatenate(rows or [np.zeros(0, np.int64)]), np.concatenate(scores or [np.zeros(0)])


def unpack(packed: Packed) -> list[Found]:
    counts_Q, rows, scores = packed
    cuts = np.cumsum(counts_Q)[:-1]
    return (
        [Found(r, s) for r, s in zip(np.split(rows, cuts), np.split(scores, cuts), strict=True)]
        if len(counts_Q)
        else []
    )


def as_retrieval_error(error: BaseException) -> RetrievalError:
    """An error of another process as one a caller of retrieval can act on, and that crosses the next process boundary."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause  # what the actor raised
    elif isinstance(error, ray.exceptions.RayError):
        return Unavailable(one_line(error)[:300])
    return (
        error
        if isinstance(error, RetrievalError)
        else RetrievalError(f"{type(error).__name__}: {one_line(error)[:300]}")
    )


class Replicas:
    """Equal actors as one shard, one encoder or one document store of an index (`retrieval.backend.LocalParts`).

    The one with the least to do is asked; after `slow_s` another is asked as well, and the first answer counts.
    """

    def __init__(self, name: str, handles: Sequence[Any], slow_s: float) -> None:
        self._name, self._handles, self._slow_s = name, list(handles), slow_s
        self._busy = [0] * len(self._handles)
        self._down = [0.0] * len(self._handles)
        """Until when each is asked last, because it was dead or slow a moment ago."""
        self._turn = 0

    async def search(self, queries: Queries, k: int) -> list[Found]:
        return unpack(await self.call("search", queries.texts, queries.vectors_QD, k))

    async def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim]"""
        vectors_ND: np.ndarray = await self.call("encode", list(texts))
        return vectors_ND

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        pages: list[Document | None] = await self.call("get", list(ids))
        return pages

    async def close(self) -> None:
        """The actors outlive their router."""

    async def call(self, method: str, *args: Any) -> Any:
        """What `method` of some replica answers; it gets the seconds left as its last argument.

        Raises what the method raised; Unavailable or DeadlineExceeded when nobody answered within the request's time.
        """
        asked: dict[asyncio.Future[Any], int] = {}
        trouble = ""
        try:
            while (left_s := seconds_left(_NO_LIMIT_S)) > 0:
                free = [n for n in range(len(self._handles)) if n not in asked.values()]
                if free:
                    number = min(free, key=self._rank)
                    asked[self._ask(number, method, *args, left_s)] = number
                done, _ = await asyncio.wait(
                    asked, timeout=min(left_s, self._slow_s), return_when=asyncio.FIRST_COMPLETED
                )
                for number in () if done else asked.values():
                    self._down[number] = time.monotonic() + self._slow_s
                for future in done:
                    number, error = asked.pop(future), future.exception()
                    if error is None:
                        return future.result()
                    failure = as_retrieval_error(error)
                    if isinstance(error, ray.exceptions.RayTaskError) or not isinstance(error, ray.exceptions.RayError):
                        raise failure from None  # the process lives, and says so
                    trouble, self._down[number] = str(failure), time.monotonic() + 1
                if done and not asked and all(down > time.monotonic() for down in self._down):
                    await asyncio.sleep(min(_AGAIN_S, seconds_left()))
        finally:
            for future in asked:
                future.cancel()
        if trouble and not asked:
            raise Unavailable(f"{self._name}: none of {len(self._handles)} processes could be reached: {trouble}")
        raise DeadlineExceeded(f"{self._name} did not answer in time")

    def _rank(self, number: int) -> tuple[bool, int, int]:
        """Those that live first, then those with little to do, then in turn."""
        turn = (number - self._turn) % len(self._handles)
        return self._down[number] > time.monotonic(), self._busy[number], turn

    def _ask(self, number: int, method: str, *args: Any) -> asyncio.Future[Any]:
        self._turn = number + 1
        self._busy[number] += 1
        future: asyncio.Future[Any] = asyncio.ensure_future(getattr(self._handles[number], method).remote(*args))

        def over(done: asyncio.Future[Any]) -> None:
            self._busy[number] -= 1
            _ = done.cancelled() or done.exception()

        future.add_done_callback(over)
        return future


class RouterClient:
    """`interfaces.Backend` over the retrieval actor, as a rollout worker sees it.

    What many episodes ask at the same time shares a call, since a call costs more than a query. Every query has its own deadline, which
    the router is told, and its own outcome; what has none yet when others of its call have is asked for again.
    """

    def __init__(self, handle: Any, info: BackendInfo, timeout_s: float, waits: Waits) -> None:
        self._handle, self._info = handle, info
        self._timeout_s, self._waits = timeout_s, waits
        limits: dict[str, Any] = {
            "max_wait_s": 0.0,
            "max_queue": 1 << 20,
            "concurrency": _CALLS,
            "batch_timeout_s": timeout_s,
        }
        self._searches: Batcher[Query, tuple[Hit, ...]] = Batcher(self._ask, max_batch=64, meter=Meter(), **limits)
        self._pages: Batcher[str, Document | None] = Batcher(self._fetch, max_batch=16, meter=Meter(), **limits)

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Raises RetrievalError: BadQuery for the query's own fault, anything else for trouble of the backend."""
        keys = [query_key(q, self._info) for q in queries]
        with self._waits("retrieval, for a search"):
            found = await self._answers(self._searches, dict(zip(keys, queries, strict=True)))
        return [list(found[key]) for key in keys]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        with self._waits("retrieval, for a document"):
            found = await self._answers(self._pages, {i: i for i in ids})
        return [found[i] for i in ids]

    def info(self) -> BackendInfo:
        return self._info

    async def close(self) -> None:
        """Ends what waits. The actor outlives its clients."""
        await self._searches.close()
        await self._pages.close()

    async def _answers(self, batcher: Batcher[Any, Any], questions: Mapping[Any, Any]) -> dict[Any, Any]:
        return await batcher.answers(questions, seconds_left(self._timeout_s)) if questions else {}

    async def _ask(self, batch: Sequence[Item[Query, tuple[Hit, ...]]]) -> Sequence[tuple[Hit, ...] | Exception]:
        now = time.monotonic()
        answers = await self._call("ask", [(item.question, item.until - now) for item in batch])
        return [
            AGAIN if a is None else a if isinstance(a, Exception) else tuple(Hit(*hit) for hit in a) for a in answers
        ]

    async def _fetch(self, batch: Sequence[Item[str, Document | None]]) -> Sequence[Document | Exception | None]:
        return await self._call("get", [item.question for item in batch], seconds_left(self._timeout_s))

    async def _call(self, method: str, *args: Any) -> Sequence[Any]:
        asked = getattr(self._handle, method).remote(*args)
        try:
            answers: Sequence[Any] = await asked
        except asyncio.CancelledError:
            ray.cancel(asked)  # nobody wants it any more
            raise
        except Exception as error:
            raise as_retrieval_error(error) from None
        return answers
