"""Limits, breaker, blame and the pause of a run: on a clock that the test turns."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import JudgeReply, JudgeRequest, Status, Task
from rewards.judges.base import JudgeConfig, make_judge
from rewards.judges.breaker import COINCIDENCE, CONTROLS, Breaker, Odds
from rewards.judges.chat import ChatJudge
from rewards.judges.health import MaskConfig, MaskMonitor
from rewards.judges.limits import MOST_PAUSE_S, Bucket, Limits
from rewards.judges.pool import JudgePool
from rewards.outcome import outcome_request
from tests.support import virtual_time
from tests.support.chat_double import (
    DROP,
    STALL,
    Answer,
    completion,
    failure,
    instead_of_http,
    is_control,
    serve,
    verdict,
)
from tests.support.reward_cases import rollout

RIGHT = {"extracted_answer": "Paris", "correct": True}


class Time:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def request(number: int) -> JudgeRequest:
    return outcome_request(Task("t", f"Question {number}?", ("Paris",)), rollout("## Exact Answer\nParis"))


# ------------------------------------------------------------------------------------------------------------ bucket


def test_bucket_by_hand() -> None:
    """60 a minute: 6 at once, then 54 a minute, so that no minute sees more than 60."""
    clock = Time()
    bucket = Bucket(60, clock)
    waits = []
    for _ in range(8):
        waits.append(bucket.wait_s(1))
        clock.now += waits[-1]
        bucket.take(1)
    assert waits == pytest.approx([0, 0, 0, 0, 0, 0, 1 / 0.9, 1 / 0.9])
    clock.now += 60
    assert bucket.wait_s(1) == 0
    bucket.take(1)
    bucket.take(10)  # the reply took 10 more than was thought
    assert bucket.wait_s(1) == pytest.approx((1 - (5 - 10)) / 0.9)


ASKS = st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 1), st.floats(0.1, 100), st.floats(0, 20)), min_size=1, max_size=40)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(1, 40), ASKS)
def test_no_minute_sees_more_than_the_limit(limit: int, concurrency: int, asks: list[tuple[float, float, float, float]]) -> None:  # fmt: skip
    """Whatever comes when and gives up when, as long as nobody alone asks for more than a tenth of a minute; first come, first served.

    An ask: seconds after the one before, share of a tenth of the limit, seconds until it gives up, seconds that its answer takes.
    """
    begun: list[tuple[float, float, int]] = []

    async def main() -> None:
        now = asyncio.get_running_loop().time
        limits = Limits(concurrency, 0, limit, now)

        async def one(number: int, amount: float, patience_s: float, takes_s: float) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s), limits.room(amount):
                    begun.append((now(), amount, number))
                    await asyncio.sleep(takes_s)

        async with asyncio.TaskGroup() as tasks:
            for number, (pause_s, share, patience_s, takes_s) in enumerate(asks):
                await asyncio.sleep(pause_s)
                tasks.create_task(one(number, share * max(1.0, limit / 10), patience_s, takes_s))

    virtual_time.run(main())
    assert [number for _, _, number in begun] == sorted(number for _, _, number in begun)
    for at, _, _ in begun:
        assert sum(amount for other, amount, _ in begun if at <= other < at + 59.999) <= limit * (1 + 1e-6)


@pytest.mark.parametrize(("rpm", "tpm", "tokens", "patience_s", "per_s"), [(60, 0, 1, 120, 3.0), (0, 200_000, 20_000, 300, 0.5), (20, 0, 1, 60, 2.0)])  # fmt: skip
def test_overload_keeps_to_the_limit_and_uses_it(rpm: int, tpm: int, tokens: int, patience_s: float, per_s: float) -> None:  # fmt: skip
    """Far more is asked for than may begin, and most of it gives up waiting: the limit holds in every minute, and is used."""
    begun: list[float] = []

    async def main() -> None:
        now = asyncio.get_running_loop().time
        limits = Limits(64, rpm, tpm, now)

        async def one() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s), limits.room(tokens):
                    begun.append(now())
                    await asyncio.sleep(2)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(int(600 * per_s)):
                tasks.create_task(one())
                await asyncio.sleep(1 / per_s)

    virtual_time.run(main())
    most, amount = (tpm, tokens) if tpm else (rpm, 1)
    assert max(sum(at <= other < at + 59.999 for other in begun) for at in begun) * amount <= most
    assert len(begun) * amount >= 0.85 * most * 10


async def test_a_control_request_waits_for_nobody() -> None:
    """Else a long queue would look like a dead judge."""
    limits = Limits(concurrency=1, requests_per_minute=10, tokens_per_minute=10)
    async with limits.room(1000), asyncio.timeout(1), limits.room(1000, urgent=True) as begins:
        assert begins
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), limits.room(1):
            pass
    async with asyncio.timeout(1), limits.room(1, barred=lambda: True) as begins:
        assert not begins, "nobody waits for what is barred"


def test_retry_after_holds_for_all_requests_and_not_for_ever() -> None:
    at: list[float] = []

    def handler(body: dict[str, Any], n: int) -> Answer:
        at.append(time.monotonic())
        return failure(429, retry_after="7200") if at[-1] < 50 else verdict(RIGHT)

    async def main() -> list[JudgeReply]:
        judge = ChatJudge(
            JudgeConfig(kind="chat", base_url="http://judge", model="judge", deadline_s=100, timeout_s=20)
        )
        first = [await judge.ask(request(0))]
        rest = await asyncio.gather(*(judge.ask(request(i)) for i in range(1, 30)))
        hasty = ChatJudge(JudgeConfig(kind="chat", base_url="http://judge", model="judge", deadline_s=40, timeout_s=10))
        return [*first, *rest, await hasty.ask(request(0))]

    with instead_of_http(handler):
        replies = virtual_time.run(main())
    assert (replies[0].status, replies[0].cause) == (Status.unavailable, "judge_overloaded")
    assert {r.status for r in replies[1:]} == {Status.ok}
    assert [at[0], min(at[1:])] == pytest.approx([0, MOST_PAUSE_S], abs=0.01)


async def test_tokens_are_estimated_then_corrected() -> None:
    """Replies that cost more than was thought slow the next requests down."""
    dear = completion('{"reasons": "r", "verdict": {"extracted_answer": "Paris", "correct": true}}', usage={"prompt_tokens": 900, "completion_tokens": 4100})  # fmt: skip
    async with serve(lambda body, n: dear) as endpoint:
        judge = ChatJudge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge", tokens_per_minute=6000, deadline_s=1.0, price_in=2.0, price_out=10.0))  # fmt: skip
        assert (await judge.ask(request(0))).status is Status.ok
        late = await judge.ask(request(1))
        assert (late.status, late.cause) == (Status.unavailable, "judge_deadline") and len(endpoint.requests) == 1
        stats = judge.stats()
        await judge.close()
    assert (stats["tokens_in"], stats["tokens_out"]) == (900, 4100)
    assert stats["cost"] == pytest.approx((900 * 2.0 + 4100 * 10.0) / 1e6)


async def test_requests_per_minute() -> None:
    async with serve(lambda body, n: verdict(RIGHT)) as endpoint:
        judge = ChatJudge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge", requests_per_minute=600))
        began = time.monotonic()
        await asyncio.gather(*(judge.ask(request(i)) for i in range(65)))
        took_s = time.monotonic() - began
        await judge.close()
    assert took_s >= 5 / 9  # 60 at once, then 9 a second


# ----------------------------------------------------------------------------------------------------------- breaker


def breaker(clock: Time, **options: Any) -> Breaker:
    return Breaker(JudgeConfig(**({"breaker_failures": 3, "breaker_s": 10.0} | options)), clock)


def test_breaker_opens_probes_and_closes() -> None:
    clock = Time()
    b = breaker(clock)
    for arrived in (False, False, True, False, False):
        b.note(arrived)
    assert not b.suspect, "an answer in between"
    b.note(False)
    assert b.suspect and not b.open, "a control request has to fail first"
    b.decide(control_answered=False)
    assert b.open and not b.due and b.num_opened == 1
    waits = []
    for _ in range(6):
        began = clock.now
        while not b.due:
            clock.now += 1
        waits.append(clock.now - began)
        b.decide(control_answered=False)
    assert waits == [10, 20, 40, 80, 80, 80] and b.num_opened == 1
    clock.now += 80
    b.decide(control_answered=True)
    assert not b.open and not b.suspect


def test_breaker_looks_at_the_share_too() -> None:
    b = breaker(Time(), breaker_failures=100, breaker_share=0.5)
    for i in range(40):
        b.note(i % 5 > 2)
    assert b.suspect
    good = breaker(Time(), breaker_failures=100, breaker_share=0.5)
    for i in range(40):
        good.note(i % 5 > 1)
    assert not good.suspect


def test_odds_by_hand() -> None:
    """Three failures against nine usable replies to others: (1 / 11) ** 3."""
    clock = Time()
    odds = Odds(clock)
    odds.note("text", False)
    for _ in range(9):
        odds.note("others", True)
    assert odds.coincidence(3, "text") == pytest.approx(1 / 11**3) and odds.coincidence(3, "others") > 0.1
    assert (
        odds.answered_since(999, "text")
        and not odds.answered_since(1001, "text")
        and not odds.answered_since(999, "others")
    )
    clock.now += 1000
    assert odds.coincidence(3, "text") == 0.125, "what is long ago says nothing"
    for i in range(100):
        odds.note("", True)
        assert odds.lacking() == max(0, CONTROLS - i - 1)
        assert (odds.coincidence(3, "text") < COINCIDENCE) == (i + 1 >= CONTROLS)
    for i in range(20):
        odds.note(f"{i // 2}", i % 2 == 1)
    assert odds.coincidence(3, "text") == pytest.approx((11 / 42) ** 3), "many easy questions hide nothing"
    assert odds.coincidence(3, "text", size=500) == 0.125 and not odds.answered_since(0, "text", size=500)
    odds.note("long", True, size=600)
    assert odds.coincidence(3, "text", size=500) == pytest.approx((1 / 3) ** 3), (
        "short questions say nothing of long ones"
    )
    assert odds.answered_since(0, "text", size=500) and odds.lacking(size=500) == CONTROLS


@given(st.floats(0, 0.5), st.integers(1, 10))
def test_a_text_is_not_blamed_for_what_happens_to_all(rate: float, failures: int) -> None:
    """By construction: whoever is blamed failed so often that it is a coincidence at under COINCIDENCE."""
    odds = Odds(Time())
    for i in range(200):
        odds.note("others", int((i + 1) * rate) == int(i * rate))
    seen = int(200 * rate) / 200
    assert odds.coincidence(failures, "text") >= COINCIDENCE or seen**failures < COINCIDENCE


async def test_an_open_breaker_fails_at_once_and_one_control_closes_it() -> None:
    dead = True

    def handler(body: dict[str, Any], n: int) -> Answer | str:
        return DROP if dead else verdict({"same": True} if is_control(body) else RIGHT)

    async with serve(handler) as endpoint:
        config = JudgeConfig(kind="chat", base_url=endpoint.url, model="judge", max_retries=1, backoff_s=0.01, breaker_failures=4, breaker_s=0.5)  # fmt: skip
        judge = make_judge(config)
        for i in range(3):
            assert (await judge.ask(request(i))).cause == ("judge_unreachable" if i < 2 else "judge_circuit_open")
        asked = len(endpoint.requests)
        replies = await asyncio.gather(*(judge.ask(request(10 + i)) for i in range(50)))
        assert {(r.status, r.cause) for r in replies} == {(Status.unavailable, "judge_circuit_open")}
        assert len(endpoint.requests) == asked, "nobody is asked while it is open"
        assert judge.stats()["breaker_opened"] == 1 and judge.stats()["judge_circuit_open"] == 51
        dead = False
        await asyncio.sleep(0.6)
        replies = await asyncio.gather(*(judge.ask(request(100 + i)) for i in range(10)))
        assert all(r.status is Status.ok for r in replies) and judge.stats()["breaker_open"] == 0
        assert sum(is_control(r) for r in endpoint.requests) == 2, "the one that opened it, the one that closed it"
        await judge.close()


async def test_texts_that_break_the_judge_do_not_close_it_to_others() -> None:
    def handler(body: dict[str, Any], n: int) -> Answer | str:
        text = body["messages"][1]["content"]
        return failure(500) if "Question 1" in text else verdict({"same": True} if is_control(body) else RIGHT)

    async with serve(handler) as endpoint:
        config = JudgeConfig(kind="chat", base_url=endpoint.url, model="judge", backoff_s=0.01, breaker_failures=4)
        judge = make_judge(config)
        bad = await asyncio.gather(*(judge.ask(request(i)) for i in range(10, 20)))
        good = await asyncio.gather(*(judge.ask(request(i)) for i in range(2, 9)))
        stats = judge.stats()
        await judge.close()
    assert {r.status for r in bad} == {Status.unjudgeable} and {r.status for r in good} == {Status.ok}
    assert stats["breaker_opened"] == 0


def poisoned(body: dict[str, Any], n: int) -> Answer | str:
    """Questions from 100 on stall the judge; all else is answered."""
    text = body["messages"][1]["content"]
    return verdict({"same": True}) if is_control(body) else STALL if "Question 1" in text else verdict(RIGHT)


async def asked(numbers: list[int], begin_s: float = 0.0, **options: Any) -> tuple[list[JudgeReply], dict[str, float]]:
    """The questions, one beginning every `begin_s`, asked of a judge with the default deadlines."""
    judge = make_judge(JudgeConfig(**({"kind": "chat", "base_url": "http://judge", "model": "judge"} | options)))
    tasks = []
    for number in numbers:
        tasks.append(asyncio.create_task(judge.ask(request(number))))
        await asyncio.sleep(begin_s)
    return list(await asyncio.gather(*tasks)), judge.stats()


@pytest.mark.parametrize("num_texts", [1, 8])
@pytest.mark.parametrize("concurrency", [1, 16])
def test_texts_that_stall_a_judge_that_is_idle_otherwise_do_not_pay(num_texts: int, concurrency: int) -> None:
    with instead_of_http(poisoned, lambda body: 2.0):
        config = {"concurrency": concurrency, "deadline_s": 300.0 * max(1, num_texts // concurrency)}
        replies, stats = virtual_time.run(asked([100 + i for i in range(num_texts)], **config))
    assert {(r.status, r.cause) for r in replies} == {(Status.unjudgeable, "judge_timeout")}
    assert max(r.latency_s for r in replies) < config["deadline_s"] and stats["breaker_opened"] == 0


def test_a_judge_that_is_slow_for_everybody_blames_nobody() -> None:
    with instead_of_http(lambda body, n: verdict({"same": True} if is_control(body) else RIGHT), lambda body: 61.0):
        replies, _ = virtual_time.run(asked(list(range(8))))
    assert {r.status for r in replies} == {Status.unavailable}


def test_a_judge_that_is_slow_at_random_blames_nobody() -> None:
    """Six tries in ten take too long, whatever is asked; control requests, being easy, are always answered."""
    rng = random.Random(7)
    with instead_of_http(
        lambda body, n: verdict({"same": True} if is_control(body) else RIGHT),
        lambda body: 61.0 if not is_control(body) and rng.random() < 0.6 else 5.0,
    ):
        replies, stats = virtual_time.run(asked(list(range(100)), 15.0))
    assert {r.status for r in replies} == {Status.ok, Status.unavailable} and stats["controls"] > 10


def test_a_slow_judge_is_not_cut_off_by_a_few_texts_that_stall_it() -> None:
    """It answers everything within 40 of 60 seconds, control requests too."""
    with instead_of_http(poisoned, lambda body: 40.0):
        replies, stats = virtual_time.run(asked([*range(100, 108), *range(2, 9)], 10.0, deadline_s=600.0))
    assert {r.status for r in replies[8:]} == {Status.ok} and stats["breaker_opened"] == 0
    assert {r.status for r in replies[:8]} == {Status.unjudgeable}


def size(body: dict[str, Any]) -> int:
    return sum(len(m["content"]) for m in body["messages"])


LONG_AT = 2500
"""Characters of a request; beyond them it is long. Control requests are short by themselves."""


def long_request(number: int) -> JudgeRequest:
    return outcome_request(
        Task("t", f"Question {number}?", ("Paris",)), rollout(f"{'It is said. ' * 700}\n## Exact Answer\nParis")
    )


async def asked_long(numbers: list[int], **options: Any) -> tuple[list[JudgeReply], dict[str, float]]:
    judge = make_judge(JudgeConfig(**({"kind": "chat", "base_url": "http://judge", "model": "judge"} | options)))
    return list(await asyncio.gather(*(judge.ask(long_request(n)) for n in numbers))), judge.stats()


@pytest.mark.parametrize("trouble", [STALL, failure(500), failure(504)])
def test_an_overload_that_only_short_requests_survive_blames_no_text(trouble: Answer | str) -> None:
    def handler(body: dict[str, Any], n: int) -> Answer | str:
        return trouble if size(body) > LONG_AT else verdict({"same": True} if is_control(body) else RIGHT)

    with instead_of_http(handler, lambda body: 2.0):
        replies, stats = virtual_time.run(asked_long(list(range(12))))
    assert {r.status for r in replies} == {Status.unavailable} and stats["controls"] > 0


def test_a_long_text_that_stalls_a_judge_which_reads_others_of_its_length_does_not_pay() -> None:
    longest = []

    def handler(body: dict[str, Any], n: int) -> Answer | str:
        longest.append(size(body) * is_control(body))
        return verdict({"same": True}) if is_control(body) else STALL

    with instead_of_http(handler, lambda body: 2.0):
        replies, _ = virtual_time.run(asked_long([1]))
    assert (replies[0].status, replies[0].cause) == (Status.unjudgeable, "judge_timeout")
    assert max(longest) > 0.8 * 700 * len("It is said. "), "it was compared with its like"


# -------------------------------------------------------------------------------------------------------------- pool


class Fixed:
    """A judge that always says the same."""

    def __init__(self, status: Status) -> None:
        self.status, self.asked = status, 0

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        self.asked += 1
        await asyncio.sleep(0)
        return JudgeReply(self.status, cause="" if self.status is Status.ok else "x")

    async def check(self) -> None: ...

    def stats(self) -> dict[str, float]:
        return {"asked": float(self.asked)}

    async def close(self) -> None: ...


async def test_pool_spreads_the_work_and_passes_over_the_dead() -> None:
    dead, well, more = Fixed(Status.unavailable), Fixed(Status.ok), Fixed(Status.ok)
    pool = JudgePool([dead, well, more], 60)
    replies = await asyncio.gather(*(pool.ask(request(i)) for i in range(30)))
    assert all(r.status is Status.ok for r in replies) and min(well.asked, more.asked) >= 10
    assert pool.stats() == {"asked": float(dead.asked + 30), "joined": 0}
    assert (await JudgePool([dead], 60).ask(request(0))).status is Status.unavailable
    broken = Fixed(Status.unjudgeable)
    await JudgePool([broken, broken], 60).ask(request(0))
    assert broken.asked == 1, "what one could not judge is not carried to the next"
    same = Fixed(Status.ok), Fixed(Status.ok)
    pool = JudgePool(same, 60)
    assert {r.status for r in await asyncio.gather(*(pool.ask(request(0)) for _ in range(8)))} == {Status.ok}
    assert pool.stats() == {"asked": 1.0, "joined": 7}, "equal requests at one time are one"


def test_one_deadline_bounds_all_judges_of_a_pool() -> None:
    class Stalled(Fixed):
        async def ask(self, request: JudgeRequest) -> JudgeReply:
            await asyncio.sleep(self.takes_s)
            return await super().ask(request)

        takes_s = 300.0

    async def main() -> tuple[JudgeReply, float]:
        reply = await JudgePool([Stalled(Status.unavailable) for _ in range(3)], 315).ask(request(0))
        return reply, time.monotonic()

    reply, took_s = virtual_time.run(main())
    assert (reply.status, reply.cause) == (Status.unavailable, "judge_deadline") and took_s == pytest.approx(315)


# ------------------------------------------------------------------------------------------------------------- pause


def test_masked_rollouts_pause_the_run_and_a_probe_ends_it() -> None:
    clock = Time()
    m = MaskMonitor(MaskConfig(probe_s=30), clock)
    for i in range(20):
        assert m.see(f"a{i}", [""] * 8) == "" and m.may_begin()
    line = m.see("b0", ["judge_timeout"] * 8) or m.see("b1", ["judge_timeout", *[""] * 7])
    assert line == (
        "the run pauses: 9 of the last 176 rollouts were masked by judge_timeout, more than 5%; a rollout every 30 s tries whether it is over"
    )
    assert not m.may_begin() and m.paused == "judge_timeout"
    assert m.see("in flight", [""] * 8) == "" and not m.may_begin(), "what began before says nothing about now"
    clock.now += 30
    assert m.may_begin()
    m.began("p0")
    assert not m.may_begin(), "one at a time"
    assert m.see("p0", ["judge_timeout"] * 8) == ""
    clock.now += 59
    assert not m.may_begin(), "the pause between probes has doubled"
    clock.now += 1
    m.began("p1")
    assert m.see("p1", [""] * 8, {"judge"}) == "the run goes on after 90 s: judge_timeout is over" and m.may_begin()
    assert m.row() == {"masked_total/judge_timeout": 17.0, "masked_total/paused_s": 90.0}


def test_only_what_the_judge_has_judged_ends_its_pause() -> None:
    clock = Time()
    m = MaskMonitor(MaskConfig(probe_s=30), clock)
    assert m.see("a", ["judge_unreachable"] * 8)
    clock.now += 30
    m.began("other cause")
    assert m.see("other cause", ["judge_circuit_open", *[""] * 7], {"judge"}) == "", "the same judge, and still gone"
    clock.now += 60
    m.began("malformed")
    assert m.see("malformed", [""] * 8, {"tools"}) == "", "nobody was asked"
    assert m.may_begin(), "nor would waiting spare anybody"
    m.began("tools")
    assert m.see("tools", ["env_failed"] * 8) == "" and not m.may_begin()
    clock.now += 60
    m.began("judged")
    assert m.see("judged", ["", "env_failed"], {"judge"}) == "the run goes on after 150 s: judge_unreachable is over"


def test_one_outage_with_many_causes_pauses() -> None:
    """An eighth of all rollouts is masked, by three causes of one judge; then by two of the tools."""
    for causes in (["judge_timeout", "judge_unreachable", "judge_deadline"], ["env_failed", "gold_texts_Unavailable"]):
        m = MaskMonitor(MaskConfig(), Time())
        lines = [m.see(f"l{i}", [causes[i % len(causes)], *[""] * 7]) for i in range(60)]
        (line,) = filter(None, lines)
        counts = ", ".join(f"{cause} ({6 // len(causes)})" for cause in causes)
        assert line.startswith(f"the run pauses: 6 of the last 48 rollouts were masked by {counts}, more than 5%")


def test_a_source_of_its_own_is_well_when_something_was_scored() -> None:
    m = MaskMonitor(MaskConfig(probe_s=30), clock := Time())
    assert m.see("a", ["reward_actor:TimeoutError", "reward_actor:ActorDiedError"] * 4)
    clock.now += 30
    m.began("p")
    assert m.see("p", [""] * 8).startswith("the run goes on")


def test_totals_and_pause_outlive_the_process() -> None:
    m = MaskMonitor(MaskConfig(probe_s=30), clock := Time())
    m.see("a", ["judge_unreachable"] * 8)
    clock.now += 10
    again = MaskMonitor(MaskConfig(probe_s=30), late := Time())
    again.restore(m.state())
    assert again.row() == m.row() == {"masked_total/judge_unreachable": 8.0, "masked_total/paused_s": 10.0}
    assert again.paused == "judge_unreachable" and again.may_begin()
    again.began("p")
    assert not again.may_begin()
    late.now += 5
    assert again.see("p", [""], {"judge"}) and again.row()["masked_total/paused_s"] == 15.0
    free = MaskMonitor(MaskConfig(max_share=1), Time())
    free.restore(m.state())
    assert not free.paused, "a run that is told never to pause goes on"


def test_a_mixed_trickle_does_not_pause() -> None:
    """Five per cent is of one cause; several causes that stay below are normal wear."""
    m = MaskMonitor(MaskConfig(), Time())
    for i in range(200):
        assert m.see(f"l{i}", ["a" if i % 4 == 0 else "b" if i % 4 == 1 else "", *[""] * 7]) == ""


@given(st.lists(st.lists(st.sampled_from(["", "", "", "a", "b"]), min_size=1, max_size=8), max_size=60))
def test_every_masked_rollout_is_counted_once(leases: list[list[str]]) -> None:
    m = MaskMonitor(MaskConfig(min_rollouts=10, window=40), Time())
    for i, causes in enumerate(leases):
        if m.may_begin():
            m.began(str(i))
        m.see(str(i), causes)
    flat = [cause for causes in leases for cause in causes]
    assert m.totals == {cause: flat.count(cause) for cause in ("a", "b") if cause in flat}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_share": 0}, "mask.max_share 0 is outside"),
        ({"min_rollouts": 500}, "mask.min_rollouts 500"),
        ({"probe_s": 0}, "mask.probe_s 0"),
    ],
)
def test_bad_mask_config_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        MaskConfig(**options).check()
