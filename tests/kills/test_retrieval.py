"""Retrieval whose processes are killed under load: no wrong result, errors with a type, and soon all is well again.

Clients ask all the time, past every cache, and compare each answer with what one process finds in the same index.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.types import Document, Query
from cluster.replicas import RouterClient
from cluster.retrieval_actors import place
from cluster.runtime import RayConfig, ray_session
from cluster.watchdog import Waits
from retrieval.backend import BackendConfig, build_backend
from retrieval.deadline import time_limit
from retrieval.errors import DeadlineExceeded, Overloaded, Unavailable
from retrieval.service import ServiceConfig, Topology

DOCUMENTS = [Document(f"d{i:04}", f"title {i}", f"colour {i % 90} thing{i % 37} word{i}") for i in range(800)]
QUERIES = [Query(f"colour {i} thing{i % 37}", k=5) for i in range(60)]
CLIENTS = 6
AGAIN_WITHIN_S = 60.0
"""A loaded machine takes its time to start a process."""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with ray_session(RayConfig(object_store_mb=128)) as started:
        yield started


class Clients:
    """Ask without a pause. What they saw since the last `reset`."""

    def __init__(self, router: Any, info: Any, expected: list[Any], timeout_s: float) -> None:
        self._client = RouterClient(router, info, 120.0, Waits())
        self._expected, self._timeout_s = expected, timeout_s
        self.reset()

    def reset(self) -> None:
        self.right = self.wrong = 0
        self.errors: Counter[type] = Counter()
        self.last_error = 0.0

    async def ask(self, number: int) -> None:
        while True:
            number = (number + 7) % len(QUERIES)
            try:
                with time_limit(self._timeout_s):
                    (hits,) = await self._client.search([QUERIES[number]])
                    pages = await self._client.get([hits[0].doc_id])
                well = hits == self._expected[number] and pages == [DOCUMENTS[int(hits[0].doc_id[1:])]]
                self.right += well
                self.wrong += not well
            except Exception as error:
                self.errors[type(error)] += 1
                self.last_error = time.monotonic()
                await asyncio.sleep(0.02)

    async def see(self, answers: int) -> None:
        """Waits for so many right answers from now on."""
        target, deadline = self.right + answers, time.monotonic() + AGAIN_WITHIN_S
        while self.right < target:
            assert time.monotonic() < deadline, f"{self.right} of {target} answers; errors {self.errors}"
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def served(
    ray: Any, folder: Path, topology: Topology, shards: int, timeout_s: float
) -> AsyncIterator[tuple[Clients, dict[str, int], Callable[[str], Awaitable[int]]]]:
    """Clients at work, the processes by name, and a way to ask for a process's id again."""
    config = BackendConfig(kind="faiss", shards=shards)
    whole = build_backend(config, DOCUMENTS, folder)
    expected = await whole.search(QUERIES)
    await whole.close()
    service = ServiceConfig(cache_size=0, page_cache_mb=0, topology=topology)
    router, others = place(config, service, str(folder))

    async def pid(name: str) -> int:
        """Asked until it answers: it may be coming back."""
        handle, deadline = router if name == "router" else others[name], time.monotonic() + AGAIN_WITHIN_S
        while True:
            try:
                answer = await handle.ready.remote()
                return int(answer[0] if name == "router" else answer)
            except ray.exceptions.RayActorError:
                assert time.monotonic() < deadline, f"{name} does not come back"
                await asyncio.sleep(0.1)

    pids = {name: await pid(name) for name in [*others, "router"]}
    clients = Clients(router, (await router.ready.remote())[1], expected, timeout_s)
    tasks = [asyncio.create_task(clients.ask(i)) for i in range(CLIENTS)]
    try:
        await clients.see(20)
        yield clients, pids, pid
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for handle in (router, *others.values()):
            ray.kill(handle)


def test_whoever_is_killed_nothing_wrong_is_answered_and_all_is_soon_well(ray: Any, tmp_path: Path) -> None:
    """One process of each kind, and short deadlines, so that clients do see errors."""

    async def story() -> None:
        topology = Topology(encoders=1, shard_replicas=1, stores=1)
        async with served(ray, tmp_path / "index", topology, shards=2, timeout_s=0.5) as (clients, pids, _):
            for name in ("faiss-1.0", "encoder.0", "store.0", "router"):
                clients.reset()
                os.kill(pids[name], signal.SIGKILL)
                killed = time.monotonic()
                while not clients.errors and time.monotonic() < killed + 10:
                    await asyncio.sleep(0.01)
                assert clients.errors, f"nobody noticed that {name} was killed"
                await clients.see(100)
                print(
                    f"{name} was killed: answers again after {clients.last_error - killed:.1f} s, {dict(clients.errors)}"
                )
                assert clients.wrong == 0
                assert clients.errors.keys() <= {Unavailable, DeadlineExceeded, Overloaded}

    asyncio.run(story())


def test_with_two_of_each_a_death_and_a_stop_go_unnoticed(ray: Any, tmp_path: Path) -> None:
    async def story() -> None:
        topology = Topology(encoders=2, shard_replicas=2, slow_s=0.5)
        async with served(ray, tmp_path / "index", topology, shards=1, timeout_s=30) as (clients, pids, pid):
            clients.reset()
            for name in ("faiss-0.0", "encoder.1"):
                os.kill(pids[name], signal.SIGKILL)
                await clients.see(50)
            assert await pid("faiss-0.0") != pids["faiss-0.0"], "it has come back"
            os.kill(pids["faiss-0.1"], signal.SIGSTOP)  # silent, not dead: its successor takes over
            try:
                await clients.see(50)
            finally:
                os.kill(pids["faiss-0.1"], signal.SIGCONT)
            assert clients.wrong == 0 and not clients.errors

    asyncio.run(story())
