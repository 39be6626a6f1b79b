"""Which task comes next: `sample(n)` draws tasks, `update(results)` learns from how they went, `state()` resumes.

Invariant: the order is a pure function of the seed, the tasks and the updates, so a resumed run draws what the
uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from agents.types import Task


class Curriculum(Protocol):
    """Chooses training tasks."""

    def sample(self, n: int) -> list[Task]: ...

    def task(self, task_id: str) -> Task: ...

    def update(self, results: Mapping[str, float]) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Uniform:
    """Every task once per epoch, in a new seeded order each epoch."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        if not tasks:
            raise ValueError("there are no training tasks: the task file or world is empty")
        self._tasks = list(tasks)
        self._by_id = {task.id: task for task in self._tasks}
        self._seed = seed
        self._cursor = 0
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def sample(self, n: int) -> list[Task]:
        return [self._next() for _ in range(n)]

    def task(self, task_id: str) -> Task:
        """The task of that id. Raises ValueError when there is none."""
        if task_id not in self._by_id:
            raise ValueError(
                f"task {task_id!r} is not among the {len(self._tasks)} training tasks: were they changed since?"
            )
        return self._by_id[task_id]

    def update(self, results: Mapping[str, float]) -> None:
        """Uniform drawing does not depend on results."""

    def state(self) -> dict[str, Any]:
        return {"kind": "uniform", "cursor": self._cursor}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor = int(state["cursor"])

    def _next(self) -> Task:
        epoch, place = divmod(self._cursor, len(self._tasks))
        self._cursor += 1
        return self._tasks[int(self._order(epoch)[place])]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(len(self._tasks))
            self._epoch = epoch
        return self._permutation


CURRICULA: dict[str, Callable[[Sequence[Task], int], Curriculum]] = {"uniform": Uniform}
