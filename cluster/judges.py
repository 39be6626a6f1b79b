"""Judge engines of a run: actors that each serve a model (`cluster.hosted`), and ask it as any chat endpoint.

So a hosted judge goes the way of `rewards.judges.chat`, with its limits, cache and care about whose fault a failure is. A judge's folder is brought to
the node of its engine as the policy's is (`cluster.nodecache`); a name is looked up by each engine for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.types import JudgeReply, JudgeRequest, Status
from cluster.errors import UserError, one_line
from cluster.hosted import KEY as KEY
from cluster.hosted import ModelServer
from cluster.model import resolve
from cluster.nodecache import Place, at_hand, is_place
from cluster.placement import Seat
from rewards.judges.base import JudgeConfig, JudgeError, RunningJudge
from rewards.judges.chat import ChatJudge
from rewards.judges.pool import JudgePool


class JudgeEngine:
    """One engine and the judge that asks it. As an actor: `place`."""

    def __init__(self, config: JudgeConfig, command: Sequence[str] = (), source: str = "") -> None:
        """`source`: the checkpoint's place, for any node; empty: `judge.model` says it. Raises JudgeError where this node cannot have it."""
        self._server = ModelServer(
            config.model, config.engine_args, num_gpus=config.num_gpus, start_s=config.start_s, what="judge engine",
            mend="judge.model or judge.engine_args", limit="judge.start_s", error=JudgeError, command=command,
            folder=_folder(config.model, source),
        )  # fmt: skip
        # Cached replies are those of these weights, also where the folder of `judge.model` is not seen.
        told = [*config.engine_args, Place.parse(source).key] if is_place(source) else config.engine_args
        self._judge = ChatJudge(replace(config, base_url=self._server.url, api_key_env=KEY, engine_args=told))

    async def ready(self) -> int:
        """Pid, once the engine answers. Raises JudgeError, one line, when it does not come up."""
        await asyncio.shield(self._server.coming_up(self._judge.check))
        return os.getpid()

    async def pulse(self) -> tuple[str, float, int]:
        """For the watchdog."""
        return self._server.pulse()

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        if not self._server.must_answer(self._judge.check):  # meanwhile others can be asked
            return JudgeReply(Status.unavailable, cause="judge_engine_starting")
        return await self._judge.ask(request)

    async def stats(self) -> dict[str, float]:
        return self._judge.stats()

    async def close(self) -> None:
        """Ends the engine."""
        await self._judge.close()
        await self._server.close()


class RemoteJudge:
    """`rewards.judges.base.RunningJudge` over an engine's actor. A dead actor is an unavailable judge; of a silent one the pool tires."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._stats: dict[str, float] = {}
        self._asking: asyncio.Task[None] | None = None

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        import ray

        try:
            # Without the oracle, which a chat judge must not see and need not carry.
            return await self._handle.ask.remote(replace(request, oracle=None))
        except ray.exceptions.RayTaskError:
            raise  # a bug, and named as such
        except ray.exceptions.RayError:
            return JudgeReply(Status.unavailable, cause="judge_engine_lost")

    async def check(self) -> None:
        import ray

        try:
            await self._handle.ready.remote()
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, JudgeError) else JudgeError(str(error.cause))) from None
        except ray.exceptions.RayError as error:
            raise JudgeError(
                f"a judge engine died while it started: {one_line(error)[:300]}; see Ray's logs, or lower judge.num_gpus"
            ) from None

    def stats(self) -> dict[str, float]:
        """As of the last call: asking an actor takes a moment, so each call asks for the next."""
        if self._asking is None or self._asking.done():
            with contextlib.suppress(RuntimeError):  # no event loop: there is nobody to ask
                self._asking = asyncio.get_running_loop().create_task(self._ask_stats())
        return self._stats

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await self._handle.close.remote()

    async def _ask_stats(self) -> None:
        with contextlib.suppress(Exception):
            self._stats = await self._handle.stats.remote()


def checkpoint(config: JudgeConfig) -> str:
    """The folder that hosted engines serve; empty where there are none, or `judge.model` is a name."""
    if not is_hosted(config) or not (folder := resolve(config.model)).is_dir():
        return ""
    return str(folder)


def is_hosted(config: JudgeConfig) -> bool:
    """Whether a run starts engines for its judge."""
    return config.kind == "vllm" and not config.replay


def place(config: JudgeConfig, seats: Sequence[Seat] = (), source: str = "") -> list[Any]:
    """Starts the engines of `judge.kind vllm` as actors, each on a seat of its own where there are seats; none for other kinds. `source`: see
    `JudgeEngine`.

    They come up while others do.
    """
    if not is_hosted(config):
        return []
    from cluster.runtime import actor

    # A call under way fails at once when an actor dies, since another engine can be asked.
    lasting: dict[str, Any] = {"num_gpus": config.num_gpus, "max_restarts": -1, "max_task_retries": 0}
    options = [seat.options for seat in seats] or [{} for _ in range(config.engines)]
    return [actor(JudgeEngine, **lasting, **each).remote(config, (), source) for each in options]


def hosted(config: JudgeConfig, handles: Sequence[Any]) -> RunningJudge | None:
    """The engines as one judge, for `make_judge`; None without engines."""
    # Longer than the engine's own deadline, which knows better what went wrong.
    return JudgePool([RemoteJudge(h) for h in handles], config.deadline_s + 15) if handles else None


def _folder(model: str, source: str) -> str:
    """Where this node has a checkpoint; empty where `model` is a name. Raises JudgeError."""
    try:
        if source:
            return at_hand(source)
    except UserError as error:
        raise JudgeError(f"judge.model {model}: {error}") from None
    if Path(model).is_absolute() and not Path(model).is_dir():
        raise JudgeError(
            f"judge.model {model} is no folder of node {socket.gethostname()}; mount it there, or keep judges off that node "
            "(placement.judge.labels)"
        )
    return ""
