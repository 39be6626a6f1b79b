"""Publishing when the sender is another process: what the fleet and the learner's first rank tell each other.

The fleet walks the engines through the phases; the learner holds the weights. At UPDATE the fleet clears the learner to
send, and waits until it says that everything went out.

Invariants:
- Nothing is sent before every engine stands at UPDATE: if one fails before, nobody was touched.
- Whoever waits here is released: when the other side is done, when an engine fails, or when the publish ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.membership import Epoch
from cluster.vllm.transfer import EngineClient, Phase

__all__ = ["Chunks", "Collective", "Exchange", "Guest"]


class Guest:
    """An engine's client that tells the exchange when the engine could not come to the meeting."""

    def __init__(self, client: EngineClient, exchange: Exchange) -> None:
        self._client, self._exchange = client, exchange

    def __getattr__(self, method: str) -> Any:
        return getattr(self._client, method)

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        try:
            await self._client.init_weight_transfer(init_info)
        except BaseException:
            self._exchange.missed = True
            raise


class Exchange:
    """One publish. Lives on the fleet's event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._cleared: asyncio.Future[bool] = loop.create_future()
        self._sent: asyncio.Future[str] = loop.create_future()
        self.checksum = ""
        """Of what the learner sent."""
        self.missed = False
        """Whether an engine could not come to the meeting: the others need not wait for it."""

    async def cleared(self) -> bool:
        """For the learner: True when it is to send, False when this publish has ended without."""
        return await asyncio.shield(self._cleared)

    def sent(self, checksum: str, reason: str = "") -> None:
        """From the learner: everything went out, or why not."""
        self.checksum = checksum
        if not self._sent.done():
            self._sent.set_result(reason)

    async def send(self) -> None:
        """For the state machine, as the trainer's part of UPDATE."""
        if not self._cleared.done():
            self._cleared.set_result(True)
        reason = await asyncio.shield(self._sent)
        if reason:
            raise RuntimeError(f"the learner could not send: {reason}")

    def close(self) -> None:
        """The publish has ended, whatever became of it."""
        if not self._cleared.done():
            self._cleared.set_result(False)
        self.sent(self.checksum, "the publish has ended")


@dataclass(frozen=True)
class Collective:
    """A transport whose bytes the learner broadcasts to all workers at once (gloo, NCCL)."""

    kind: str
    epoch: Epoch
    endpoint: Mapping[str, Any]
    """Where the epoch meets, and what else its backend needs to join."""
    layout: Mapping[str, Any]
    """`buckets.to_wire` of what will be sent, in the order of sending."""
    bucket_bytes: int
    limit_s: float
    """Deadline of each wait inside the workers; shorter than the phase's, so that a worker answers before it is given up."""
    exchange: Exchange
    collective: bool = True
    resendable: bool = True
    unsafe_from: Phase = Phase.UPDATE

    def init_info(self, index: int, num_engines: int) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "epoch": self.epoch.number,
            "rank_offset": self.epoch.rank_offset(index),
            "world_size": self.epoch.world_size,
            "bucket_bytes": self.bucket_bytes,
            "limit_s": self.limit_s,
            **self.endpoint,
        }

    def stage_info(self, index: int) -> Mapping[str, Any]:
        return {"epoch": self.epoch.number, "layout": self.layout}

    async def updates(self, index: int) -> AsyncGenerator[Mapping[str, Any], None]:
        yield self.stage_info(index)

    async def send(self) -> None:
        await self.exchange.send()


@dataclass(frozen=True)
class Chunks:
    """A transport whose bytes stay where the learner put them: it hands out piece after piece (CUDA IPC).

    A piece is handed out when every engine has taken the one before, since the learner fills the same buffer again.
    """

    epoch: Epoch
    layout: Mapping[str, Any]
    exchange: Exchange
    num_engines: int
    kind: str = "ipc"
    collective: bool = True
    resendable: bool = True
    unsafe_from: Phase = Phase.UPDATE
    _queues: list[asyncio.Queue[Mapping[str, Any] | None]] = field(default_factory=list)
    _broken: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._queues.extend(asyncio.Queue() for _ in range(self.num_engines))

    def init_info(self, index: int, num_engines: int) -> Mapping[str, Any]:
        return {"kind": self.kind, "epoch": self.epoch.number, "packed": True}

    def stage_info(self, index: int) -> Mapping[str, Any]:
        return {"epoch": self.epoch.number, "layout": self.layout}

    async def hand_out(self, piece: Mapping[str, Any]) -> None:
        """From the learner: one piece for all engines. Returns when all have taken it; raises when one cannot."""
        for queue in self._queues:
            queue.put_nowait({"epoch": self.epoch.number, **piece})
        taken = asyncio.gather(*(queue.join() for queue in self._queues))
        await self._or_broken(taken)

    async def updates(self, index: int) -> AsyncGenerator[Mapping[str, Any], None]:
        queue, whole = self._queues[index], False
        try:
            while (piece := await self._or_broken(queue.get())) is not None:
                yield piece
                queue.task_done()
            whole = True
        finally:
            if not whole:
                self._broken.set()

    async def send(self) -> None:
        try:
            await self._or_broken(self.exchange.send())
        except BaseException:
            self._broken.set()
            raise
        for queue in self._queues:
            queue.put_nowait(None)

    async def _or_broken(self, work: Any) -> Any:
        """`work`, unless an engine or the learner failed meanwhile."""
        task, broken = asyncio.ensure_future(work), asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait({task, broken}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise RuntimeError("another engine, or the learner, gave the update up")
            return task.result()
        finally:
            for future in (task, broken):
                if not future.done():
                    future.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await future
