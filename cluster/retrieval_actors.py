"""The processes of retrieval: the router, which serves one corpus to every rollout worker, and what it leans on.

Everything may stand inside the router, or query encoders, index shards and document stores are actors of their own
(`retrieval.service.Topology`). None holds more than open files, so Ray starts them again whenever they die. Invariants: whoever comes
back opens the index that its run began with, or refuses; `ready` answers after a query of its own; on several nodes each that serves an
index has one copy of it (`cluster.nodecache`), which its processes map together.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from agents.types import BackendInfo, Document, Query
from cluster.nodecache import at_hand
from cluster.placement import Seats
from cluster.replicas import Packed, PlainHits, Replicas, as_retrieval_error, pack
from cluster.runtime import actor, sealed, unsealed
from cluster.watchdog import Pulse, pulse_of
from retrieval.backend import (
    ENGINES,
    AsyncEncoder,
    BackendConfig,
    IndexFolder,
    LocalEncoder,
    LocalPages,
    LocalParts,
    Pages,
    open_backend,
)
from retrieval.batching import Batcher, Item
from retrieval.config import legs_of
from retrieval.deadline import time_limit
from retrieval.engine import LocalShard, Queries, Shard
from retrieval.errors import IndexMismatch, RetrievalError
from retrieval.manifest import digest
from retrieval.meter import Meter, metered, stage
from retrieval.service import SearchService, ServiceConfig

LASTING: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
"""Ray starts the actor again as often as it dies, and calls under way are made again."""
REPLICA: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
"""The same, but a call under way fails at once, since somebody else can be asked."""
SELF_QUERY = "self check"
_PATIENCE_S, _COMPANY_S = 1.0, 0.05
"""A call waits so long for its first answer, and then so long for the others."""
_LOAD_S = 1.0
"""Whose figures have not come by then is left out of them."""


def opened(config: BackendConfig, directory: str, index: str) -> IndexFolder:
    """The index folder, which must be `index` still: with another one under half of the actors, hits would be nonsense."""
    folder = IndexFolder(config, at_hand(directory))
    found = digest(asdict(folder.manifest))
    if index and found != index:
        raise IndexMismatch(
            f"index {directory} was {index} when this run began and is {found} now; give each run a folder that stays"
        )
    return folder


class Part:
    """What all but the router have in common."""

    def __init__(self) -> None:
        self._meter = Meter()

    async def pulse(self) -> Pulse:
        """For the watchdog: it waits for nobody."""
        return pulse_of()

    async def load(self) -> dict[str, float]:
        """What it did since its start, and how long it took."""
        return self._meter.figures()


class IndexShard(Part):
    """One shard of one leg of an index."""

    def __init__(self, config: BackendConfig, directory: str, index: str, leg: str, number: int, threads: int) -> None:
        super().__init__()
        folder = opened(config, directory, index)
        engine = folder.engine(leg, number)
        self._shard = LocalShard(engine, threads)
        self._dim = int((folder.manifest.encoder or {}).get("dim", 0)) if engine.wants_vectors else 0

    async def ready(self) -> int:
        """Pid, once it has searched."""
        vectors_QD = np.full((1, self._dim), self._dim**-0.5, dtype=np.float32) if self._dim else None
        await self._shard.search(Queries((SELF_QUERY,), vectors_QD), 1)
        return os.getpid()

    async def search(self, texts: tuple[str, ...], vectors_QD: np.ndarray | None, k: int, left_s: float) -> Packed:
        with time_limit(left_s), metered(self._meter), stage("search"):
            return pack(await self._shard.search(Queries(texts, vectors_QD), k))


class QueryEncoder(Part):
    """Encodes queries; those that come at the same time are one batch."""

    def __init__(self, config: BackendConfig, directory: str, index: str, service: ServiceConfig) -> None:
        super().__init__()
        self._encoder = LocalEncoder(opened(config, directory, index).encoder())
        self._batcher: Batcher[str, np.ndarray] = Batcher(
            self._encode, max_batch=service.max_batch, max_wait_s=service.max_wait_ms / 1000, max_queue=service.max_queue,
            concurrency=self._encoder.at_once, batch_timeout_s=service.batch_timeout_s, meter=self._meter,
        )  # fmt: skip

    async def load(self) -> dict[str, float]:
        return await super().load() | {"queue_depth": float(self._batcher.depth)}

    async def ready(self) -> int:
        """Pid, once it has encoded."""
        await self._encoder.encode([SELF_QUERY])
        return os.getpid()

    async def encode(self, texts: Sequence[str], left_s: float) -> np.ndarray:
        """float32 [N, dim]"""
        found = await self._batcher.answers({text: text for text in texts}, left_s)
        return np.stack([found[text] for text in texts])

    async def _encode(self, batch: Sequence[Item[str, np.ndarray]]) -> Sequence[np.ndarray]:
        return list(await self._encoder.encode([item.question for item in batch]))


class PageStore(Part):
    """Serves documents."""

    def __init__(self, config: BackendConfig, directory: str, index: str) -> None:
        super().__init__()
        self._pages = LocalPages(opened(config, directory, index).store())

    async def ready(self) -> int:
        """Pid, once it has looked for a document."""
        await self._pages.get([SELF_QUERY])
        return os.getpid()

    async def get(self, ids: Sequence[str], left_s: float) -> list[Document | None]:
        with time_limit(left_s), metered(self._meter), stage("get"):
            return await self._pages.get(ids)


class Parts:
    """`retrieval.backend.LocalParts`, with the parts that are actors where they are."""

    def __init__(self, folder: IndexFolder, handles: Mapping[str, Sequence[Any]], slow_s: float) -> None:
        self._local = LocalParts(folder)
        self._replicas = {name: Replicas(name, found, slow_s) for name, found in handles.items()}

    def pages(self) -> Pages:
        return self._replicas.get("store") or self._local.pages()

    def encoder(self) -> AsyncEncoder:
        return self._replicas.get("encoder") or self._local.encoder()

    def shard(self, leg: str, number: int) -> Shard:
        return self._replicas.get(shard_name(leg, number)) or self._local.shard(leg, number)


class Retrieval:
    """The router: batches, caches, deadlines, shedding in front of the index."""

    def __init__(
        self, backend: BackendConfig, service: ServiceConfig, directory: str, index: str = "",
        handles: Mapping[str, Sequence[Any]] | bytes | None = None,
    ) -> None:  # fmt: skip
        leans_on: Mapping[str, Sequence[Any]] = unsealed(handles) or {}
        parts = Parts(opened(backend, directory, index), leans_on, service.topology.slow_s) if index else None
        self._service = SearchService(open_backend(backend, at_hand(directory), parts), service)
        self._parts = {f"{name}.{i}": h for name, found in leans_on.items() for i, h in enumerate(found)}
        self._born = time.time()
        self._well = False
        self._trial: asyncio.Task[None] | None = None

    async def ready(self) -> tuple[int, BackendInfo]:
        """Pid and what is served, once a search of its own has succeeded."""
        await self._service.check(SELF_QUERY)
        self._well = True
        return os.getpid(), self._service.info()

    async def pulse(self) -> Pulse:
        """For the watchdog: after a restart it waits for a search of its own, then for nobody."""
        if not self._well and (self._trial is None or self._trial.done()):
            self._trial = asyncio.create_task(self._try())
        return pulse_of() if self._well else pulse_of("a search of its own", self._born)

    async def ask(self, batch: Sequence[tuple[Query, float]]) -> list[PlainHits | RetrievalError | None]:
        """The hits of each (query, seconds it is wanted for), or why there are none: one's error is not another's.

        None where there is no answer yet, since what is ready does not wait for what takes long: ask again, which joins the work.
        """
        tasks = [asyncio.ensure_future(self._answer(query, left_s)) for query, left_s in batch]
        try:
            ready, late = await asyncio.wait(tasks, timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if ready and late:
                await asyncio.wait(late, timeout=_COMPANY_S)
            return [task.result() if task.done() else None for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    async def get(self, ids: Sequence[str], left_s: float | None = None) -> list[Document | None]:
        return await self._service.get(ids, left_s)

    async def stats(self) -> dict[str, float]:
        return self._service.stats()

    async def load(self) -> dict[str, float]:
        """`stats` as a run's log names them, and those of the processes that it leans on, by name."""
        stats = self._service.stats()
        asked = {asyncio.ensure_future(handle.load.remote()): name for name, handle in self._parts.items()}
        for future in (await asyncio.wait(asked, timeout=_LOAD_S))[0] if asked else ():
            if future.exception() is None:
                stats |= {f"{asked[future]}/{name}": value for name, value in future.result().items()}
        for future in asked:
            future.cancel()
        return {f"retrieval/{name}": value for name, value in stats.items()}

    async def _answer(self, query: Query, left_s: float) -> PlainHits | RetrievalError:
        try:
            return [(h.doc_id, h.score, h.span, h.preview) for h in (await self._service.search([query], left_s))[0]]
        except Exception as error:
            return as_retrieval_error(error)

    async def _try(self) -> None:
        try:
            await self._service.check(SELF_QUERY)
        except Exception:  # told by the pulse, and tried again with the next
            return
        self._well = True


def shard_name(leg: str, number: int) -> str:
    return f"{leg}-{number}"


def place(backend: BackendConfig, service: ServiceConfig, directory: str) -> tuple[Any, dict[str, Any]]:
    """Starts the router, and before it what it leans on; returns its handle and those of the others by name."""
    new_router, others = arrange(backend, service, directory)
    return new_router(), others


def num_shards(backend: BackendConfig, service: ServiceConfig, directory: str) -> int:
    """How many shards of an index would be actors of their own, were there one replica of each."""
    if not service.topology.shard_replicas or not (backend.kind == "auto" or legs_of(backend)):
        return 0
    folder = IndexFolder(backend, at_hand(directory))
    return sum(len(folder.manifest.legs[leg].shards) for leg in folder.legs if leg in ENGINES)


def arrange(
    backend: BackendConfig, service: ServiceConfig, directory: str, seats: Seats | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Starts what routers lean on; returns a way to start a router, with options for its actor, and the handles of the others by name."""
    t = service.topology
    if backend.kind != "auto" and not legs_of(backend):  # a server elsewhere
        return lambda **options: actor(Retrieval, **LASTING, **options).remote(backend, service, directory), {}
    sitting = {name: iter(seats.of(name) if seats else ()) for name in ("encoder", "store", "shard")}

    def started(name: str, cls: type, *arguments: Any, **options: Any) -> Any:
        seat = next(sitting[name], None)
        return actor(cls, **{**REPLICA, **options, **(seat.options if seat else {})}).remote(*arguments)

    folder = IndexFolder(backend, at_hand(directory))
    index = digest(asdict(folder.manifest))
    threads: dict[str, Any] = {}
    if t.threads > 1:  # all actors have 1
        variables = {name: str(t.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        threads = {"runtime_env": {"env_vars": variables}}
    handles: dict[str, list[Any]] = {}
    if t.encoders and folder.manifest.encoder:
        handles["encoder"] = [
            started("encoder", QueryEncoder, backend, directory, index, service, num_gpus=t.encoder_gpus, **threads)
            for _ in range(t.encoders)
        ]
    if t.stores:
        handles["store"] = [started("store", PageStore, backend, directory, index) for _ in range(t.stores)]
    for leg in [leg for leg in folder.legs if t.shard_replicas and leg in ENGINES]:
        for number in range(len(folder.manifest.legs[leg].shards)):
            part = (backend, directory, index, leg, number, service.concurrency)
            handles[shard_name(leg, number)] = [
                started("shard", IndexShard, *part, num_gpus=t.shard_gpus, **threads) for _ in range(t.shard_replicas)
            ]
    others = {f"{name}.{i}": handle for name, found in handles.items() for i, handle in enumerate(found)}
    arguments = (backend, service, directory, index, sealed(handles))
    return lambda **options: actor(Retrieval, **LASTING, **options).remote(*arguments), others
