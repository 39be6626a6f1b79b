"""Checkpoints behind a chat interface: actors that each serve one model (`cluster.hosted`) and answer for their workers.

Invariants: a question stays on one engine, so its prefix stays cached there; when that engine is gone, the question's next request goes to
another; while all are away, it waits until they had the time to start again. None of that time counts against the question, nor does a try that
came to nothing: engines try once, and whoever holds the question's watch tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agents.chat.reading import estimate
from agents.interfaces import ChatFailed, ChatReply
from cluster.errors import UserError, one_line
from cluster.evaluation.chat import ChatEndpoint, NoReply
from cluster.evaluation.config import ChatConfig, EvalConfig
from cluster.hosted import KEY, ModelServer
from cluster.sizes import served_kv_gib
from cluster.stopwatch import shown_s, standing, turn_back
from cluster.vllm.options import batched_tokens
from cluster.watchdog import Pulse, Waits
from rewards.judges.limits import Limits

FIRST_PAUSE_S, MOST_PAUSE_S = 0.5, 5.0
"""Between two rounds of asking engines that are all away."""
MOST_DEATHS = 3
"""So often an engine may die under one request that is asked alone."""
REPLY_TOKENS = 256
"""What a reply is taken for until it is there."""
_NO_LIMIT = 1 << 16


class EngineAway(ChatFailed):
    """The engine is starting."""


class EngineDied(ChatFailed):
    """Its actor is gone, or cannot be reached."""


class ChatEngine:
    """One served checkpoint. As an actor: `place`."""

    def __init__(self, config: EvalConfig, model: str, command: Sequence[str] = ()) -> None:
        on_cpu = not config.fleet.num_gpus
        variables = {"VLLM_CPU_KVCACHE_SPACE": str(served_kv_gib(config.engine)), "OMP_NUM_THREADS": str(config.engine.threads)} if on_cpu else {}  # fmt: skip
        self._server = ModelServer(
            model, [*engine_arguments(config), *config.policy.engine_args], num_gpus=config.fleet.num_gpus, start_s=config.policy.start_s,
            what="chat engine", mend="model.path, section engine or policy.engine_args", limit="policy.start_s", error=UserError,
            command=command, variables=variables,
        )  # fmt: skip
        # Workers keep within the limits, so that waiting for room is known as such.
        chat = replace(
            config.policy.chat, base_url=self._server.url, model=model, api_key_env=KEY, seeded=True, retries=0,
            concurrency=_NO_LIMIT, requests_per_minute=0, tokens_per_minute=0,
        )  # fmt: skip
        self._endpoint = ChatEndpoint(chat, config.policy.temperature)

    async def ready(self) -> int:
        """Pid, once the engine answers. Raises UserError, one line, when it does not come up."""
        await asyncio.shield(self._server.coming_up(self._endpoint.check))
        return os.getpid()

    async def pulse(self) -> Pulse:
        """For the watchdog."""
        return self._server.pulse()

    async def reply(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> ChatReply:
        """Raises ChatFailed."""
        if not self._server.must_answer(self._endpoint.check):
            raise EngineAway("the chat engine is starting again")
        return await self._endpoint.reply(messages, **options)

    async def close(self) -> None:
        """Ends the engine."""
        self._server.ready = False
        await self._endpoint.close()
        await self._server.close()


@dataclass
class Shared:
    """What all questions of one worker have in common."""

    limits: Limits
    start_s: float
    """How long engines may be away, all of them, before a request fails."""
    retries: int
    """Further tries of a request to which an engine that is there gave no reply."""
    suspects: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by a request under which an engine died: it is asked alone, so that others need not die with it."""


class EngineChat:
    """`agents.interfaces.Chat` of one question over the engines' actors."""

    def __init__(self, engines: Sequence[Any], session: str, seed: int, waits: Waits, shared: Shared) -> None:
        self._engines, self._seed, self._waits, self._session = list(engines), seed, waits, session
        self._shared = shared
        self._first = int(hashlib.sha256(session.encode()).hexdigest()[:8], 16) % len(self._engines)

    async def reply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatReply:
        """Raises ChatFailed."""
        expected = estimate(json.dumps(list(messages), ensure_ascii=False)) + REPLY_TOKENS
        limits = self._shared.limits
        async with contextlib.AsyncExitStack() as held:
            with standing():
                await held.enter_async_context(limits.room(expected))
            found = await self._asked(list(messages), options | {"seed": self._seed}, held)
            limits.correct(expected, found.usage.tokens_in + found.usage.tokens_out)
            return found

    async def _asked(
        self, messages: list[Mapping[str, Any]], options: Mapping[str, Any], held: contextlib.AsyncExitStack
    ) -> ChatReply:
        """The first reply that any engine gives. Those that are away are asked again until they have had the time to start."""
        gives_up, pause_s, silences = time.monotonic() + self._shared.start_s, FIRST_PAUSE_S, 0
        deaths, alone = 0, False
        gone: set[int] = set()
        while True:
            trouble, failed = "", False
            for number in [(self._first + n) % len(self._engines) for n in range(len(self._engines))]:
                begun_s = shown_s()
                try:
                    found = await self._ask(self._engines[number], messages, options)
                    self._first = number
                    return found
                except EngineAway as away:
                    trouble = str(away)
                    gone.discard(number)
                except EngineDied as died:
                    trouble = str(died)
                    deaths += number not in gone
                    gone.add(number)
                except NoReply as silence:
                    trouble = str(silence)
                    silences += 1
                except ChatFailed as failure:
                    trouble, failed = str(failure), True
                turn_back(begun_s)
            if deaths and not alone:
                began = time.monotonic()
                with standing(), self._waits(f"requests that engines may have died of, for {self._session}"):
                    await held.enter_async_context(self._shared.suspects)
                gives_up, deaths, alone = gives_up + time.monotonic() - began, 0, True
            dying = deaths >= MOST_DEATHS * len(self._engines)
            if failed or dying or silences > self._shared.retries or time.monotonic() >= gives_up:
                raise ChatFailed(f"no chat engine answers: {trouble[:300]}")
            with standing(), self._waits(f"a chat engine to start, for {self._session}"):
                await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)

    async def _ask(self, engine: Any, messages: list[Mapping[str, Any]], options: Mapping[str, Any]) -> ChatReply:
        """Raises EngineAway, EngineDied, or ChatFailed of an engine that is there."""
        import ray

        asked = engine.reply.remote(messages, options)
        try:
            with self._waits(f"a chat engine, about {self._session}"):
                found: ChatReply = await asked
            return found
        except asyncio.CancelledError:
            ray.cancel(asked)
            raise
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, ChatFailed):
                raise
            raise type(error.cause)(one_line(error.cause)) from None
        except ray.exceptions.RayError as error:
            raise EngineDied(one_line(error)) from None


def served(config: EvalConfig) -> ChatConfig:
    """What agents know of the endpoint: a checkpoint's window is what its engine takes, since a reply that is cut there would look like theirs."""
    chat, most = config.policy.chat, config.engine.max_model_len
    if config.policy.kind != "checkpoint" or config.hosted:
        return chat
    return replace(chat, context_window=min(chat.context_window or most, most))


def limits_of(chat: ChatConfig, engines: int, workers: int) -> Limits:
    """What one of several workers may ask of all engines together: the configured limits are those of one engine."""
    share = engines / workers
    return Limits(
        max(1, int(chat.concurrency * share)), chat.requests_per_minute * share, chat.tokens_per_minute * share
    )


def engine_arguments(config: EvalConfig) -> list[str]:
    """The section `engine` as arguments of `vllm serve`."""
    engine, on_cpu = config.engine, not config.fleet.num_gpus
    given: dict[str, Any] = {
        "max-model-len": engine.max_model_len, "max-num-seqs": engine.max_num_seqs, "tensor-parallel-size": engine.tensor_parallel,
        "seed": config.seed, "dtype": "float32" if on_cpu and engine.dtype == "auto" else engine.dtype, "generation-config": "vllm",
    }  # fmt: skip
    if tokens := batched_tokens(engine, on_cpu):
        given["max-num-batched-tokens"] = tokens
    if not on_cpu:
        given["gpu-memory-utilization"] = engine.gpu_memory_utilization
    flags = ["--enforce-eager"] if engine.enforce_eager else []
    return [text for name, value in given.items() for text in (f"--{name}", str(value))] + flags


def place(config: EvalConfig, model: str) -> list[Any]:
    """Starts the engines of a checkpoint with a chat agent as actors."""
    from cluster.runtime import actor

    made = actor(
        ChatEngine, num_gpus=config.fleet.num_gpus, num_cpus=config.fleet.num_cpus, max_restarts=-1, max_task_retries=0
    )
    return [made.remote(config, model) for _ in range(config.fleet.num_engines)]
