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
from cluster.evaluation.engines import ChatEngine, EngineAway, EngineChat, Shared, Turns, limits_of
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


class Alive:
    """`pulse` of an engine's actor: it is there unless it is `dead`."""

    def __init__(self, dead: Callable[[], bool] = lambda: False) -> None:
        self._dead = dead

    def remote(self) -> Any:
        async def body() -> None:
            if self._dead():
                raise ray.exceptions.ActorUnavailableError("restarting", None)

        return body()


class Engine:
    """The handle of an engine's actor: `says(seconds since the beginning)` is its reply, or what is raised."""

    def __init__(self, says: Callable[[float], Any]) -> None:
        self._says, self.asked, self.reply, self.pulse = says, list[float](), self, Alive()

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

    engine = Engine(says)
    engine.pulse = Alive(lambda: time.monotonic() < until_s / 2)
    return engine


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


class Fragile:
    """An engine that whatever says `poison` kills, and all that it is asked beside; then it is gone for a moment, and starts for a while."""

    def __init__(self) -> None:
        self._gone_until = self._up_at = 0.0
        self._falls = asyncio.Event()
        self.killed: list[str] = []
        self.reply, self.pulse = self, Alive(lambda: time.monotonic() < self._gone_until)

    def remote(self, messages: Any, options: Any) -> Any:
        async def body() -> ChatReply:
            now, said = time.monotonic(), messages[0]["content"]
            if now < self._gone_until:
                raise ray.exceptions.ActorUnavailableError("restarting", None)
            if now < self._up_at:
                raise ray.exceptions.RayTaskError("reply", "", EngineAway("starting"))
            if said == "poison":
                await asyncio.sleep(0.3)
                self._gone_until, self._up_at = time.monotonic() + 4, time.monotonic() + 40
                self._falls.set()
                self._falls = asyncio.Event()
                raise ray.exceptions.ActorDiedError()
            try:
                await asyncio.wait_for(self._falls.wait(), 0.5)
            except TimeoutError:
                return ChatReply("well", usage=Usage(5, 1))
            self.killed.append(said)
            raise ray.exceptions.ActorDiedError()

        return body()


class Remote:
    """An actor's handle around an object of this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return mock.Mock(remote=lambda *given: asyncio.ensure_future(getattr(self._actor, name)(*given)))


def put_to(engines: Sequence[Any], *workers: Sequence[str], turns: Any = None) -> list[list[str]]:
    """How questions of one request end that several workers put to the same engines."""

    async def one(shared: Shared, content: str) -> str:
        chat = EngineChat(engines, content, 0, Waits(), shared)
        budgeted = BudgetedChat(chat, Purse(BudgetConfig(seconds=1.0), time.monotonic), 100)
        return (await budgeted.reply([{"role": "user", "content": content}])).text

    async def all_of_them() -> list[list[str]]:
        found = []
        for number, contents in enumerate(workers):
            shared = Shared(limits_of(chat_config(), 1, 1), 900.0, 4, f"player-{number}", turns)
            found.append(asyncio.gather(*(one(shared, content) for content in contents), return_exceptions=True))
        return [
            [type(f).__name__ if isinstance(f, BaseException) else f for f in ended]
            for ended in await asyncio.gather(*found)
        ]

    return virtual_time.run(all_of_them())


def test_a_request_that_kills_engines_fails_alone() -> None:
    """Those that shared the engine with it wait, are asked one by one, and lose nothing."""
    assert put_to([Fragile()], ["a", "b", "poison", "c", "d"]) == [["well", "well", "ChatFailed", "well", "well"]]


def test_what_kills_engines_costs_the_questions_of_other_workers_nothing() -> None:
    """A suspect of one worker is not charged with what a suspect of another did, though both are asked anew."""
    engine, turns = Fragile(), Turns()
    others = [[f"{worker}{number}" for number in range(5)] for worker in "bcd"]
    found = put_to([engine], ["a", "poison"], *others, turns=Remote(turns))
    assert found == [["well", "ChatFailed"], *[["well"] * 5] * 3]
    assert not turns._waiting and max(map(engine.killed.count, engine.killed)) == 2, (
        "together, then with other workers' suspects, then alone"
    )


def test_an_engine_that_was_dead_before_has_not_died_of_a_suspect() -> None:
    """Its actor is gone for a long time in short pieces: nobody crashed it, so nobody pays."""
    down = [True]
    engine = Engine(lambda now: ray.exceptions.ActorDiedError() if len(engine.asked) == 1 else "well")
    engine.pulse = Alive(lambda: down[0] and time.monotonic() < 300.0)
    assert asked([engine]) == "well" and len(engine.asked) == 2


def test_a_server_that_refuses_while_it_dies_is_dead_and_not_silent() -> None:
    """What a dying server says to all that was under way would count as their silence, five of which cost a try."""
    engine = ChatEngine.__new__(ChatEngine)
    engine._server = mock.Mock()
    engine._endpoint = mock.Mock(reply=mock.AsyncMock(side_effect=NoReply("HTTP 500")))

    async def body() -> None:
        asked = asyncio.ensure_future(engine.reply(USER, {}))
        await asyncio.sleep(8)  # its actor is gone by then
        assert not asked.done()
        with pytest.raises(NoReply, match="HTTP 500"):  # it goes on
            await asked

    virtual_time.run(body())


def test_turns_of_a_worker_that_died_are_over() -> None:
    async def body() -> list[bool]:
        turns = Turns()
        found = [await turns.comes("a", "1"), await turns.comes("b", "2"), await turns.comes("c", "3")]
        await turns.worker_lost("a")
        found.append(await turns.comes("b", "2"))
        await turns.over("b", "2")
        return [*found, await turns.comes("c", "3")]

    assert asyncio.run(body()) == [True, False, False, True, True]
