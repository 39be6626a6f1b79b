"""A small world behind a real index, and random play in it, for tests of the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st

from agents.interfaces import Backend
from agents.types import Document, Hit, Identity, Query, Task, ToolCall, ToolEvent, Uid
from envs.sandbox import Session
from envs.world import WorldConfig, build_world
from envs.world.world import World
from retrieval.backend import BackendConfig, build_backend


@lru_cache(maxsize=1)
def world() -> World:
    return build_world(WorldConfig(num_entities=30, num_tasks=40, hops={3: 1.0}, shortcut=1.0))


@lru_cache(maxsize=1)
def backend() -> Backend:
    return build_backend(BackendConfig(kind="bm25"), world().documents)


def identity(task: str = "t", attempt: int = 0, group: str = "g") -> Identity:
    return Identity("run", Uid(task, group, attempt), "tools", "x", "y")


def play(session: Session, actions: Sequence[tuple[str, dict[str, Any]]]) -> list[ToolEvent]:
    async def all_of_them() -> list[ToolEvent]:
        return [await session.call(ToolCall(name, arguments)) for name, arguments in actions]

    return asyncio.run(all_of_them())


def actions(task: Task, max_size: int = 8) -> st.SearchStrategy[list[tuple[str, dict[str, Any]]]]:
    """Calls that an agent may make: names of the task's trail and others, indices of a search, mistakes."""
    named = [*task.gold_docs, *task.answers]
    names = st.sampled_from([*named, *(d.id for d in world().documents[:6])])
    return st.lists(
        st.one_of(
            st.builds(lambda n, w, k: ("search", {"query": f"{n} {w}", "k": k}), names, st.sampled_from(["", "mentor"]), st.integers(1, 6)),
            st.builds(lambda n: ("open", {"doc_id": n}), st.one_of(names, st.integers(0, 5), st.just("nowhere"))),
            st.builds(lambda n: ("find", {"pattern": n}), st.one_of(names, st.just("is"))),
        ),
        max_size=max_size,
    )  # fmt: skip


class Broken:
    """A backend that must not be asked."""

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        raise AssertionError("the backend was asked")

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        raise AssertionError("the backend was asked")

    def info(self) -> Any:
        return backend().info()

    async def close(self) -> None: ...
