"""Thin actors around what the rooms hold: retrieval and reward. They know processes, the rooms know the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from agents.interfaces import Services
from agents.types import BackendInfo, Document, Group, Hit, Query, Verdict
from cluster.watchdog import Pulse, Waits, pulse_of
from retrieval.backend import BackendConfig, build_backend
from retrieval.service import SearchService, ServiceConfig
from rewards.config import RewardConfig
from rewards.judges.base import JudgeConfig, make_judge
from rewards.registry import make_reward


class Retrieval:
    """Serves one corpus to every rollout worker: batched, cached, with deadlines."""

    def __init__(self, backend: BackendConfig, service: ServiceConfig, directory: str) -> None:
        self._service = SearchService(build_backend(backend, directory=directory), service)

    async def ready(self) -> tuple[int, BackendInfo]:
        """Pid and what is served, once a search of its own has succeeded."""
        await self._service.search([Query("self check", k=1)])
        return os.getpid(), self._service.info()

    async def pulse(self) -> Pulse:
        """For the watchdog: it waits for nobody."""
        return pulse_of()

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        return await self._service.search(queries)

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        return await self._service.get(ids)

    async def stats(self) -> dict[str, Any]:
        return self._service.stats()


class RewardServer:
    """Scores groups with one reward and one judge."""

    def __init__(self, reward: RewardConfig, judge: JudgeConfig) -> None:
        self._judge = make_judge(judge)
        self._reward = make_reward(reward)
        self._waits = Waits()

    async def pulse(self) -> Pulse:
        """For the watchdog: the group it has judged for the longest time."""
        return pulse_of(*self._waits.oldest())

    async def ready(self) -> int:
        """Pid, once the judge has answered. Raises JudgeError for an endpoint that does not."""
        await self._judge.check()
        return os.getpid()

    async def stats(self) -> dict[str, float]:
        """Counters of the judge."""
        return self._judge.stats()

    async def score(self, group: Group) -> list[Verdict]:
        with self._waits(f"the judge, about group {group.id}"):
            return await self._reward(group, Services(judge=self._judge))
