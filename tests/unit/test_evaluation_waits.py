"""What a question's seconds are: those of its agent, its policy and its tools, and none that the evaluation itself makes it wait."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import httpx
import pytest
import ray

from agents.chat.base import BudgetSpent
from agents.interfaces import ChatFailed, ChatReply
from agents.types import Generation, Sampling, Span, Usage, Version
from cluster.evaluation.budget import BudgetedChat, BudgetedPolicy, Purse
from cluster.evaluation.chat import ChatEndpoint, NoReply
from cluster.evaluation.config import BudgetConfig, ChatConfig
from cluster.evaluation.engines import EngineAway, EngineChat, Shared, limits_of
from cluster.rollout import RemotePolicy, RolloutConfig
from cluster.stopwatch import Stopwatch, TimeUp, shown_s, standing, turn_back
from cluster.watchdog import Waits
from tests.support import virtual_time

USER = [{"role": "user", "content": "Who?"}]


def chat_config(**more: Any) -> ChatConfig:
    return ChatConfig(base_url="http://127.0.0.1:9/v1", model="m", **more)


# ------------------------------------------------------------------------------------------------------ the watch


def test_a_watch_stands_still_and_goes_back_and_its_deadline_moves_with_it() -> None:
    async def body() -> list[float]:
        watch, shown = Stopwatch(time.monotonic), []
        with pytest.raises(TimeUp):
            async with watch.running(10.0):
                await asyncio.sleep(4)
                with standing():
                    await asyncio.sleep(100)
                    shown.append(watch.seconds)
                begun_s = shown_s()
                await asyncio.sleep(5)
                turn_back(begun_s)
                shown.append(watch.seconds)
                await asyncio.sleep(5)
                shown.append(watch.seconds)
                await asyncio.sleep(5)
        return [*shown, watch.seconds, time.monotonic()]

    assert virtual_time.run(body()) == pytest.approx([4, 4, 9, 10, 115], abs=0.01)


def test_several_waits_at_once_hold_a_watch_until_the_last_is_over() -> None:
    async def body() -> float:
        async def wait(seconds: float) -> None:
            with standing():
                await asyncio.sleep(seconds)

        watch = Stopwatch(time.monotonic)
        async with watch.running(1.0):
            await asyncio.gather(wait(3), wait(7))
        return watch.seconds

    assert virtual_time.run(body()) == pytest.approx(0, abs=0.01)


def test_without_a_watch_waiting_is_waiting_and_other_timeouts_stay_what_they_are() -> None:
    async def body() -> None:
        with standing():
            turn_back(shown_s())
        with pytest.raises(TimeoutError):
            async with Stopwatch(time.monotonic).running(9.0), asyncio.timeout(1):
                await asyncio.sleep(5)

    virtual_time.run(body())


# ---------------------------------------------------------------------------------------------------- an endpoint


def played(config: ChatConfig, questions: int, seconds: float, exchange: Callable[[int], Any]) -> list[str]:
    """How each of several questions of one request ends at an endpoint; `exchange(number)` answers the number-th request."""
    count = iter(range(10_000))
    good = {"choices": [{"message": {"content": "well"}}], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}

    async def exchanged(self: Any, body: Any) -> tuple[httpx.Response, bytes]:
        found = exchange(next(count))
        if isinstance(found, float):
            await asyncio.sleep(found)
            found = 200
        return httpx.Response(found), json.dumps(good).encode()

    async def one(endpoint: ChatEndpoint) -> str:
        chat = BudgetedChat(endpoint, Purse(BudgetConfig(seconds=seconds), time.monotonic), 100, 0, config.timeout_s)
        try:
            return (await chat.reply(USER)).text
        except (BudgetSpent, ChatFailed) as error:
            return type(error).__name__

    async def all_of_them() -> list[str]:
        endpoint = ChatEndpoint(config, 0.0)
        return list(await asyncio.gather(*(one(endpoint) for _ in range(questions))))

    with mock.patch.object(ChatEndpoint, "_exchange", exchanged), mock.patch("httpx.AsyncClient"):
        return virtual_time.run(all_of_them())


@pytest.mark.parametrize("limits", [{"concurrency": 8}, {"concurrency": 1}, {"requests_per_minute": 20}])
def test_scores_do_not_hang_on_how_many_questions_are_under_way(limits: dict[str, int]) -> None:
    assert played(chat_config(**limits), 8, 1.0, lambda number: 0.6) == ["well"] * 8


def test_pauses_and_tries_that_came_to_nothing_are_not_the_agents() -> None:
    assert played(chat_config(backoff_s=20.0), 1, 1.0, lambda n: 503 if n < 3 else 0.6) == ["well"]
    slow = chat_config(timeout_s=0.8, retries=3)
    assert played(slow, 1, 1.0, lambda n: 60.0 if n < 2 else 0.6) == ["well"]
    assert played(slow, 1, 1.0, lambda n: 60.0) == ["NoReply"], "nobody answered, which is no fault of the agent"
    assert played(chat_config(), 1, 1.0, lambda n: 1.5) == ["BudgetSpent"], "a slow reply is the policy's own"


# --------------------------------------------------------------------------------------------------- token engines


def test_finding_an_engine_and_engines_that_died_are_not_the_agents() -> None:
    made = Generation((1,), (-0.1,), (Span(0, 1, Version(0, 0)),), "stop", 0)

    class Remote:
        def __init__(self, answer: Callable[[int], tuple[float, Any]]) -> None:
            self._answer, self._count = answer, 0

        def remote(self, *_: Any) -> Any:
            self._count += 1
            delay_s, found = self._answer(self._count)

            async def body() -> Any:
                await asyncio.sleep(delay_s)
                if isinstance(found, Exception):
                    raise found
                return found

            return body()

    async def body() -> Generation:
        engine = mock.Mock(
            generate=Remote(lambda n: (30.0, ray.exceptions.ActorDiedError()) if n == 1 else (0.6, made))
        )
        fleet = mock.Mock(route=Remote(lambda n: (40.0, ("sampler-0", engine))), report=Remote(lambda n: (0.0, None)))
        policy = BudgetedPolicy(
            RemotePolicy(fleet, RolloutConfig(), "w"), Purse(BudgetConfig(seconds=35), time.monotonic)
        )
        return await policy.generate([1], session="s", sampling=Sampling(), stop_token_ids=())

    assert virtual_time.run(body()) == made


# ---------------------------------------------------------------------------------------------------- chat engines


class Engine:
    """The handle of an engine's actor: `says(seconds since the beginning)` is its reply, or what is raised."""

    def __init__(self, says: Callable[[float], Any]) -> None:
        self._says, self.asked, self.reply = says, list[float](), self

    def remote(self, messages: Any, options: Any) -> Any:
        self.asked.append(time.monotonic())

        async def body() -> ChatReply:
            await asyncio.sleep(0.5)
            found = self._says(time.monotonic())
            if isinstance(found, ChatFailed):
                raise ray.exceptions.RayTaskError("reply", "", found)
            if isinstance(found, Exception):
                raise found
            return ChatReply(found, usage=Usage(5, 1))

        return body()


def asked(
    engines: Sequence[Engine], *, start_s: float = 900.0, seconds: float = 1.0, workers: int = 1, retries: int = 4
) -> str:
    """What a question of so many seconds is told."""

    async def body() -> str:
        shared = Shared(limits_of(chat_config(), len(engines), workers), start_s, retries)
        chat = EngineChat(engines, "session", 0, Waits(), shared)
        budgeted = BudgetedChat(chat, Purse(BudgetConfig(seconds=seconds), time.monotonic), 100)
        return (await budgeted.reply(USER)).text

    return virtual_time.run(body())


def restarts(until_s: float) -> Engine:
    """An engine that died, and answers again when its time has come."""

    def says(now: float) -> Any:
        if now < until_s / 2:
            return ray.exceptions.ActorDiedError()
        return EngineAway("the chat engine is starting again") if now < until_s else "well"

    return Engine(says)


def test_a_question_waits_for_an_engine_that_starts_again() -> None:
    engine = restarts(300.0)
    assert asked([engine]) == "well" and len(engine.asked) < 100
    there = Engine(lambda now: "well")
    assert asked([restarts(300.0), there]) == "well" and len(there.asked) == 1
    with pytest.raises(ChatFailed, match="no chat engine answers: the chat engine is starting again"):
        asked([restarts(300.0)], start_s=200.0)


def test_tries_at_an_engine_that_come_to_nothing_are_not_the_agents() -> None:
    def silent(times: int) -> Engine:
        engine = Engine(lambda now: "well" if len(engine.asked) > times else NoReply("HTTP 503"))
        return engine

    assert asked([silent(4)]) == "well"
    gone = silent(99)
    with pytest.raises(ChatFailed, match="no chat engine answers: HTTP 503"):
        asked([gone])
    assert len(gone.asked) == 5


def test_what_an_engine_refuses_fails_at_once_and_a_request_that_kills_engines_soon() -> None:
    refuses = Engine(lambda now: ChatFailed("HTTP 400"))
    with pytest.raises(ChatFailed, match="HTTP 400"):
        asked([refuses])
    assert len(refuses.asked) == 1
    poison = Engine(lambda now: ray.exceptions.ActorDiedError() if len(poison.asked) % 2 else EngineAway("starting"))
    with pytest.raises(ChatFailed, match="no chat engine answers"):
        asked([poison], start_s=1e6)
    assert len(poison.asked) < 10


def test_a_request_that_kills_engines_fails_alone() -> None:
    """Those that shared the engine with it wait, are asked one by one, and lose nothing."""
    up_at, falls = 0.0, asyncio.Event()

    class Fragile:
        def remote(self, messages: Any, options: Any) -> Any:
            async def body() -> ChatReply:
                nonlocal up_at, falls
                if time.monotonic() < up_at:
                    raise ray.exceptions.RayTaskError("reply", "", EngineAway("starting"))
                if messages[0]["content"] == "poison":
                    await asyncio.sleep(0.3)
                    up_at = time.monotonic() + 40
                    falls.set()
                    falls = asyncio.Event()
                    raise ray.exceptions.ActorDiedError()
                try:
                    await asyncio.wait_for(falls.wait(), 0.5)
                except TimeoutError:
                    return ChatReply("well", usage=Usage(5, 1))
                raise ray.exceptions.ActorDiedError()

            return body()

    async def all_of_them() -> list[str]:
        engine, shared = mock.Mock(reply=Fragile()), Shared(limits_of(chat_config(), 1, 1), 900.0, 4)

        async def one(content: str) -> str:
            chat = EngineChat([engine], content, 0, Waits(), shared)
            budgeted = BudgetedChat(chat, Purse(BudgetConfig(seconds=1.0), time.monotonic), 100)
            return (await budgeted.reply([{"role": "user", "content": content}])).text

        found = await asyncio.gather(*map(one, ("a", "b", "poison", "c", "d")), return_exceptions=True)
        return [type(f).__name__ if isinstance(f, BaseException) else f for f in found]

    assert virtual_time.run(all_of_them()) == ["well", "well", "ChatFailed", "well", "well"]
