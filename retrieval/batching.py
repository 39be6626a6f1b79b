"""Batches: what is asked at about the same time is done together, and what is asked twice is done once. Plain asyncio.

Invariants:
- A question equal to one that waits or runs shares its work; callers that time out or are cancelled do not disturb others.
- At most `max_queue` distinct questions wait. A call that would exceed that is refused whole with Overloaded.
- Every call ends within its time, by an answer or by an error; a question nobody waits for is not worked on, and takes nobody's place.
- A lone question waits for nobody: batches grow while others are at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from retrieval.deadline import time_limit
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, Overloaded, RetrievalError, Unavailable
from retrieval.meter import Meter, metered

Q = TypeVar("Q")
A = TypeVar("A")
AGAIN = Unavailable("there is no answer yet")
"""As an outcome: the question waits again, for the next batch."""


class Item(Generic[Q, A]):
    """One distinct question on its way."""

    def __init__(self, key: Hashable, question: Q) -> None:
        self.key, self.question = key, question
        self.future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        # an error nobody waits for any more is not worth a log line
        self.future.add_done_callback(lambda f: f.cancelled() or f.exception())
        self.since = time.monotonic()
        self.until = 0.0
        """When the last of its callers gives up."""
        self.waiters = 0

    def settle(self, outcome: A | Exception) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Batcher(Generic[Q, A]):
    """Answers questions by `work`, which gets a batch and returns one outcome per item: an answer, an error as a value, or `AGAIN`.

    What `work` raises is the outcome of its whole batch. Belongs to one event loop; starts with the first call.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item[Q, A]]], Awaitable[Sequence[A | Exception]]],
        *,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        concurrency: int,
        batch_timeout_s: float,
        meter: Meter,
    ) -> None:
        self._work = work
        self._max_batch, self._max_wait_s, self._max_queue = max_batch, max_wait_s, max_queue
        self._batch_timeout_s = batch_timeout_s
        self._meter = meter
        self._items: dict[Hashable, Item[Q, A]] = {}
        self._queue: deque[Item[Q, A]] = deque()
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(concurrency)
        self._batcher: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def depth(self) -> int:
        """Distinct questions that wait."""
        return len(self._queue)

    async def answers(self, questions: Mapping[Hashable, Q], timeout_s: float) -> dict[Hashable, A]:
        """The answer to each, by key. Raises Overloaded, DeadlineExceeded, Closed, or the first question's error."""
        if self._closed:
            raise Closed("the search service is closed")
        fresh = sum(key not in self._items for key in questions)
        if len(self._queue) + fresh > self._max_queue:
            self._queue = deque([i for i in self._queue if i.key in questions or not self._abandoned(i)])
        if len(self._queue) + fresh > self._max_queue:
            self._meter.counts["shed"] += len(questions)
            raise Overloaded(
                f"the queue is full ({len(self._queue)} wait, {self._max_queue} are allowed, {fresh} more were asked); "
                "ask later, or fewer at once"
            )
        self._meter.counts["coalesced"] += len(questions) - fresh
        items = [self._items.get(key) or self._enqueue(key, question) for key, question in questions.items()]
        until = time.monotonic() + timeout_s
        for item in items:
            item.waiters += 1
            item.until = max(item.until, until)
        try:
            # not `wait_for(gather())`: a caller that gives up must not cancel work that others share
            _, late = await asyncio.wait([item.future for item in items], timeout=max(0.0, timeout_s))
        finally:
            for item in items:
                item.waiters -= 1
        if late:
            self._meter.counts["expired"] += len(late)
            raise DeadlineExceeded(f"{len(late)} of {len(items)} had no answer after {timeout_s:.3g} s")
        return {item.key: item.future.result() for item in items}

    async def close(self) -> None:
        """Fails what still waits with Closed. May be called twice."""
        self._closed = True
        tasks = [t for t in (self._batcher, *self._running) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for item in self._items.values():
            item.settle(Closed("the search service is closed"))
        self._items.clear()
        self._queue.clear()

    def _enqueue(self, key: Hashable, question: Q) -> Item[Q, A]:
        item: Item[Q, A] = Item(key, question)
        self._items[key] = item
        self._queue.append(item)
        self._arrived.set()
        if len(self._queue) >= self._max_batch:
            self._full.set()
        if self._batcher is None:  # in a context of its own: the first caller's limit is nobody else's
            self._batcher = asyncio.get_running_loop().create_task(self._batch_forever(), context=Context())
        return item

    async def _batch_forever(self) -> None:
        while True:
            await self._slots.acquire()  # first: while all are busy, the next batch grows
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            patience = self._queue[0].since + self._max_wait_s - time.monotonic() if self._running else 0.0
            if len(self._queue) < self._max_batch and patience > 0:
                self._full.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), patience)
            batch: list[Item[Q, A]] = []
            while self._queue and len(batch) < self._max_batch:
                item = self._queue.popleft()
                if not self._abandoned(item):
                    batch.append(item)
            if not batch:
                self._slots.release()
                continue
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: list[Item[Q, A]]) -> None:
        began = time.monotonic()
        for item in batch:
            self._meter.took("wait", item.since)
        try:
            await self._attempt(batch, began + self._batch_timeout_s)
        finally:
            self._slots.release()

    async def _attempt(self, batch: list[Item[Q, A]], end: float) -> None:
        """Works on a batch until `end`, past which not even patient callers are served: nothing may hold a slot for ever."""
        began = time.monotonic()
        limit_s = min(end, max(item.until for item in batch)) - began
        self._meter.batch(len(batch))
        try:
            with time_limit(limit_s), metered(self._meter):
                outcomes = await asyncio.wait_for(self._work(batch), limit_s)
            if len(outcomes) != len(batch):
                raise RetrievalError(f"{len(outcomes)} results came for {len(batch)} questions")
        except BadQuery as error:
            if len(batch) > 1:  # the fault of one of them, which is not the others'
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    if wanted := [item for item in half if not self._abandoned(item)]:
                        await self._attempt(wanted, end)
            else:
                self._settle(batch[0], error)
        except (TimeoutError, DeadlineExceeded) as error:
            now = time.monotonic()
            # somebody with more time may have joined meanwhile
            again = [i for i in batch if i.waiters and now < min(i.until, end) and now > began + limit_s - 0.01]
            late = DeadlineExceeded(str(error) or f"the backend gave no answer in {now - began:.3g} s")
            for item in batch:
                if item not in again:
                    self._settle(item, late)
            if again:
                await self._attempt(again, end)
        except Exception as error:  # any failure of the work belongs to its callers, not to the batcher
            for item in batch:
                self._settle(item, error)
        else:
            self._meter.took("batch", began)
            for item, outcome in zip(batch, outcomes, strict=True):
                if outcome is AGAIN:
                    self._queue.append(item)
                    self._arrived.set()
                else:
                    self._settle(item, outcome)

    def _abandoned(self, item: Item[Q, A]) -> bool:
        """Whether nobody waits for it any more, which ends it."""
        if not item.waiters:
            self._settle(item, DeadlineExceeded("nobody waits for this any more"))
        return not item.waiters

    def _settle(self, item: Item[Q, A], outcome: A | Exception) -> None:
        self._items.pop(item.key, None)
        if isinstance(outcome, Exception) and item.waiters:
            self._meter.failed(outcome)
        item.settle(outcome)
