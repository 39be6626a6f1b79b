"""One question of an evaluation: the endpoint it is put to, the budgets it has, and what it comes to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.chat.base import BudgetSpent
from agents.interfaces import ChatFailed, ChatReply
from agents.sampling.config import SamplingConfig
from agents.types import (
    Generation,
    Query,
    Role,
    Sampling,
    Span,
    StopReason,
    Task,
    ToolCall,
    ToolEvent,
    Turn,
    Usage,
    Version,
)
from cluster.errors import UserError
from cluster.evaluation import workers
from cluster.evaluation.budget import BudgetedChat, BudgetedPolicy, BudgetedSandbox, Purse
from cluster.evaluation.chat import ChatEndpoint
from cluster.evaluation.config import BudgetConfig, ChatConfig, EvalConfig
from cluster.evaluation.journal import open_folder
from cluster.evaluation.plan import jobs, questions
from cluster.evaluation.records import Played, State, Unit
from cluster.evaluation.run import Teller, work
from cluster.evaluation.score import score_units
from cluster.evaluation.workers import Given, Kit, Player, Without, seed_of
from cluster.rollout import RolloutConfig
from envs.benchmarks.base import Benchmark, BenchmarkConfig
from envs.config import SandboxConfig
from tests.support import virtual_time
from tests.support.chat_agent_server import Fault, ScriptedChat
from tests.support.sandbox_play import backend, world

TASK = world().tasks[0]
USER = [{"role": "user", "content": "Who?"}]
CHAT = ChatConfig(base_url="http://127.0.0.1:9/v1", model="m", price_in=1.0, price_out=10.0, price_cached=0.1)


def kit(**more: Any) -> Kit:
    base = Kit(
        "run", "tools", more.pop("settings", None) or _settings(), 0.0, 0, BudgetConfig(), 60.0, SandboxConfig(), RolloutConfig(),
        SamplingConfig(), ChatConfig(max_tokens=1000),
    )  # fmt: skip
    return replace(base, **more)


def _settings(**more: Any) -> Any:
    from agents.chat.config import ChatAgentConfig

    return ChatAgentConfig(**more)


def play(made: Kit, chat: Any = None, task: Task = TASK, probe: str = "", corpus: Any = None) -> Played:
    async def one() -> Played:
        endpoint = chat or ScriptedChat()
        player = Player(made, corpus or backend(), chat_of=lambda session, seed: endpoint)
        return await player.play(task, Unit(task.id, 0, "c"), probe)

    return asyncio.run(one())


# ------------------------------------------------------------------------------------------------------- endpoint


def answer(message: Mapping[str, Any], reason: str = "stop", **usage: Any) -> tuple[int, dict[str, str], Any]:
    return 200, {}, {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}


def asked(
    replies: Sequence[tuple[int, dict[str, str], Any] | Exception], config: ChatConfig = CHAT, **options: Any
) -> tuple[ChatReply, list[dict[str, Any]]]:
    """What an endpoint that answers so makes of one request, and the bodies it was sent."""
    bodies: list[dict[str, Any]] = []

    async def exchange(self: Any, body: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        bodies.append(dict(body))
        found = replies[min(len(bodies), len(replies)) - 1]
        if isinstance(found, Exception):
            raise found
        status, headers, value = found
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        return httpx.Response(status, headers=headers), content

    async def one() -> ChatReply:
        endpoint = ChatEndpoint(config, 0.3)
        return await endpoint.reply(USER, **options)

    # without a client of httpx, which takes long to make
    with mock.patch.object(ChatEndpoint, "_exchange", exchange), mock.patch("httpx.AsyncClient"):
        return virtual_time.run(one()), bodies


def test_a_reply_is_read_with_its_calls_and_its_price() -> None:
    call = {"id": "c1", "function": {"name": "search", "arguments": '{"query": "x"}'}}
    message = {"content": None, "reasoning_content": "Hm.", "tool_calls": [call]}
    counted = {"prompt_tokens": 1000, "completion_tokens": 100, "prompt_tokens_details": {"cached_tokens": 400}}
    reply, [body] = asked(
        [answer(message, "tool_calls", **counted)], tools=[{"type": "function"}], max_tokens=50, seed=7
    )
    assert reply.calls == (ToolCall("search", {"query": "x"}, "c1"),) and reply.reasoning == "Hm." and not reply.text
    assert reply.usage == Usage(1000, 100, 400, pytest.approx(600e-6 + 40e-6 + 1000e-6), "tool_calls")  # type: ignore[arg-type]
    assert (body["temperature"], body["max_tokens"], body["tools"]) == (0.3, 50, [{"type": "function"}])
    assert (
        "seed" not in body and asked([answer({"content": "a"})], replace(CHAT, seeded=True), seed=7)[1][0]["seed"] == 7
    )


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        ([{"function": {"name": "open", "arguments": "{"}}], "the arguments of open are not valid JSON"),
        ([{"function": {"name": "open", "arguments": "[1]"}}], "the arguments of open are not a JSON object"),
        (["nonsense"], "a tool call names no function"),
        ([{"function": {"arguments": "{}"}}], "a tool call names no function"),
    ],
)
def test_calls_that_cannot_be_read_are_told_to_the_agent(calls: list[Any], error: str) -> None:
    reply, _ = asked([answer({"content": "", "tool_calls": calls})])
    assert reply.error == error and not reply.calls


def test_halves_of_characters_are_neither_read_nor_sent() -> None:
    call = {"id": "\ud83d", "function": {"name": "search", "arguments": '{"query": "foo \\ud83d"}'}}
    message = {"content": "a\ud83d", "reasoning_content": "b\ud83d", "tool_calls": [call]}
    reply, _ = asked([answer(message)])
    assert (reply.text, reply.reasoning, reply.calls) == ("a?", "b?", (ToolCall("search", {"query": "foo ?"}, "?"),))
    with mock.patch(f"{__name__}.USER", [{"role": "user", "content": "x \ud83d"}]):
        assert asked([answer({"content": "a"})])[1][0]["messages"] == [{"role": "user", "content": "x ?"}]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "request (9000 tokens) exceeds the available context size (4096 tokens), try increasing it"),
        (500, "the request exceeds the available context size"),
        (400, "This model's maximum prompt length is 8192"),
        (413, "Prompt is too long"),
    ],
)
def test_a_refusal_for_the_length_is_no_failure(status: int, said: str) -> None:
    reply, bodies = asked([(status, {}, {"error": {"message": said}})])
    assert reply.usage.finish_reason == "context" and len(bodies) == 1 and not reply.usage.estimated


@pytest.mark.parametrize(
    "said",
    [
        "max_tokens=3000 cannot be greater than max_model_len=2048. Please request fewer output tokens.",
        "This model's maximum context length is 2048 tokens. However, you requested 3100 tokens (100 in the messages, 3000 in the completion).",
        "Requested token count exceeds the model's maximum context length of 2,048 tokens. You requested a total of 3100 tokens.",
    ],
)
def test_a_reply_too_long_for_the_context_is_not_taken_for_too_long_a_request(said: str) -> None:
    refused = (400, {}, {"error": {"message": said}})
    reply, bodies = asked([refused, answer({"content": "well"})], replace(CHAT, max_tokens=3000))
    assert reply.text == "well" and [b["max_tokens"] for b in bodies] == [3000, 1024]
    reply, bodies = asked([refused], replace(CHAT, max_tokens=3000))
    assert reply.usage.finish_reason == "context" and len(bodies) == 2


def test_tokens_that_nobody_counted_are_estimated() -> None:
    reply, _ = asked([answer({"content": "x" * 400})])
    usage = reply.usage
    assert usage.estimated and usage.tokens_in > 0 and 100 <= usage.tokens_out < 120 and usage.cost > 0
    assert not asked([answer({"content": "x"}, prompt_tokens=5, completion_tokens=1)])[0].usage.estimated


def test_trouble_is_tried_again_and_then_fails() -> None:
    good = answer({"content": "well"})
    for trouble in (
        (500, {}, {}),
        (429, {"Retry-After": "3"}, {}),
        httpx.ReadError("gone"),
        (200, {}, b"<html>"),
        (200, {}, {"choices": []}),
    ):
        reply, bodies = asked([trouble, good])
        assert reply.text == "well" and len(bodies) == 2
    with pytest.raises(ChatFailed, match=r"gave no reply in 5 tries, the last with: HTTP 503"):
        asked([(503, {}, {})])
    with pytest.raises(ChatFailed, match=r"refuses the request \(HTTP 401; see policy.chat.api_key_env\)"):
        asked([(401, {}, {"error": "no"})])


def test_a_full_context_is_no_failure() -> None:
    said = {"error": {"message": "This model's maximum context length is 9000 tokens"}}
    reply, bodies = asked([(400, {}, said)])
    assert reply.usage.finish_reason == "context" and len(bodies) == 1
    with pytest.raises(ChatFailed, match="HTTP 400"):
        asked([(400, {}, {"error": {"message": "unknown field"}})])


@settings(deadline=None, max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["choices", "message", "content", "tool_calls", "function", "usage", "prompt_tokens"]), inner, max_size=3),
        max_leaves=12,
    )
)  # fmt: skip
def test_any_json_is_a_reply_or_a_failure(value: Any) -> None:
    for body in (
        value,
        {
            "choices": [{"message": value if isinstance(value, dict) else {"content": value, "tool_calls": value}}],
            "usage": value,
        },
    ):
        try:
            reply, _ = asked([(200, {}, body)], replace(CHAT, retries=0))
        except ChatFailed:
            continue
        assert isinstance(reply.text, str) and reply.usage.tokens_in >= 0


def test_a_key_is_read_from_the_environment_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CHAT, api_key_env="GS_TEST_KEY")
    with pytest.raises(UserError, match=r"policy.chat.api_key_env names GS_TEST_KEY, which is not set"):
        ChatEndpoint(config, 0.0)
    monkeypatch.setenv("GS_TEST_KEY", "sk-very-secret")
    with pytest.raises(ChatFailed) as failed:
        asked([(403, {}, {"error": "the key sk-very-secret is bad"})], config)
    assert "sk-very-secret" not in str(failed.value) and "[key]" in str(failed.value)


# -------------------------------------------------------------------------------------------------------- budgets


class Slow:
    """A chat and a sandbox of a constant price and delay."""

    def __init__(self, delay_s: float = 0.0, tokens: int = 10, cost: float = 0.0) -> None:
        self.delay_s, self.tokens, self.cost = delay_s, tokens, cost
        self.asked: list[int] = []

    async def reply(self, messages: Any, *, tools: Any = (), max_tokens: int = 0, who: str = "") -> ChatReply:
        self.asked.append(max_tokens)
        await asyncio.sleep(self.delay_s)
        return ChatReply("x", usage=Usage(self.tokens, self.tokens, 0, self.cost))

    async def call(self, call: ToolCall) -> ToolEvent:
        await asyncio.sleep(self.delay_s)
        return ToolEvent(call, "nothing")

    async def close(self) -> None: ...


async def until_spent(step: Callable[[], Any]) -> tuple[int, str]:
    """How often a step was taken before its budget was spent, and which."""
    for number in range(100):
        try:
            await step()
        except BudgetSpent as spent:
            return number, str(spent)
    raise AssertionError("the budget is never spent")


@pytest.mark.parametrize(
    ("config", "steps", "said"),
    [
        (BudgetConfig(tokens=50), 3, "budget.tokens=50 is spent (60)"),
        (BudgetConfig(money=0.4), 2, "budget.money=0.4 is spent (0.4)"),
        (BudgetConfig(seconds=2.5), 2, "budget.seconds=2.5 is spent"),
    ],
)
def test_requests_end_when_a_budget_is_spent(config: BudgetConfig, steps: int, said: str) -> None:
    async def body() -> tuple[int, str]:
        import time

        chat = BudgetedChat(Slow(1.0, 10, 0.2), Purse(config, time.monotonic), 100)
        return await until_spent(lambda: chat.reply(USER))

    assert virtual_time.run(body()) == (steps, said)


def test_calls_and_seconds_end_tools_too() -> None:
    async def body() -> list[tuple[int, str]]:
        import time

        found = []
        for config in (BudgetConfig(calls=3), BudgetConfig(seconds=1.5)):
            box = BudgetedSandbox(Slow(1.0), Purse(config, time.monotonic))
            found.append(await until_spent(lambda box=box: box.call(ToolCall("search"))))
        return found

    assert virtual_time.run(body()) == [(3, "budget.calls=3 is spent"), (1, "budget.seconds=1.5 is spent")]


def test_a_smaller_context_is_refused_before_it_is_sent() -> None:
    async def body() -> None:
        chat = Slow(tokens=30)
        budgeted = BudgetedChat(chat, Purse(BudgetConfig(context_tokens=100)), 4096)
        long = [{"role": "user", "content": "x" * 1000}]
        assert (await budgeted.reply(long)).usage.finish_reason == "context" and not chat.asked
        await budgeted.reply(
            [{"role": "user", "content": "x" * 100}]
        )  # counted as 30 tokens: under four characters each
        assert 0 < chat.asked[-1] < 100, "the reply has to fit as well"

    asyncio.run(body())


def test_a_token_policy_pays_for_what_it_reads_and_says() -> None:
    class Engine:
        async def generate(self, prompt_ids: Any, **_: Any) -> Generation:
            return Generation((1, 2), (-0.1, -0.1), (Span(0, 2, Version(0, 0)),), "stop", 3)

    async def body() -> list[Usage]:
        purse = Purse(BudgetConfig(tokens=20))
        policy = BudgetedPolicy(Engine(), purse)
        ask = lambda: policy.generate([0] * 8, session="s", sampling=Sampling(), stop_token_ids=())  # noqa: E731
        assert (await until_spent(ask))[0] == 2
        return policy.usages

    assert asyncio.run(body()) == [Usage(8, 2, 3, finish_reason="stop")] * 2


# ---------------------------------------------------------------------------------------------------------- units


def test_a_question_is_played_to_its_answer() -> None:
    played = play(kit())
    assert played.state is State.done and played.trajectory is not None and not played.error
    assert played.trajectory.answer in TASK.answers and played.trajectory.stop is StopReason.answered
    assert {e.call.name for e in played.trajectory.events} == {"search", "open"} and played.seconds["unit"] > 0
    assert all(t.usage and t.usage.tokens_in for t in played.trajectory.turns if t.role is Role.policy)
    assert played.trajectory.identity.sampling.max_tokens == 1000, "what the endpoint was asked for"


def test_who_spends_a_budget_is_scored_and_keeps_its_turns() -> None:
    played = play(kit(budget=BudgetConfig(calls=1)))
    assert played.state is State.done and played.trajectory is not None
    assert played.trajectory.stop is StopReason.budget and "budget.calls=1" in played.trajectory.error
    assert len(played.trajectory.events) == 1 and len(played.trajectory.turns) > 2


def test_seconds_of_a_token_policy_count_once_when_its_budget_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slept:
        leaf, events = 0, ()

        def __init__(self, *_: Any) -> None:
            self.turns, self.seconds = [Turn.given(0, -1, Role.prompt, (1,))], {"generate": 0.03, "tools": 0.0}

    async def spent(rollout: Any) -> Any:
        await asyncio.sleep(0.03)
        raise BudgetSpent("budget.tokens=1 is spent (2)")

    monkeypatch.setattr(workers, "Rollout", Slept)
    monkeypatch.setattr(workers, "finish", spent)
    speech = mock.Mock(tokenizer_fingerprint="t", template_fingerprint="t", decode=lambda ids: "")
    speech.name = "tools"

    async def one() -> Played:
        player = Player(kit(speech=lambda: speech), backend(), policy=mock.Mock())
        return await player.play(TASK, Unit(TASK.id, 0, "c"))

    played = asyncio.run(one())
    [scored] = score_units(Benchmark("b", (TASK,), ()), [played], [], [])
    assert scored.facts["stop"] == "budget" and 0.03 <= scored.facts["seconds"] <= played.seconds["unit"]


def test_infrastructure_fails_and_agents_do_not() -> None:
    dead = play(kit(), ScriptedChat([Fault("500", times=-1)]))
    assert dead.state is State.failed and "status 500" in dead.error
    confused = play(kit(), ScriptedChat([Fault("prose", times=-1)]))
    assert confused.state is State.done and confused.trajectory is not None
    assert confused.trajectory.stop in (StopReason.malformed, StopReason.turn_limit)

    class Broken:
        async def reply(self, *_: Any, **__: Any) -> ChatReply:
            raise KeyError("a bug of ours")

    bug = play(kit(), Broken())
    assert bug.state is State.failed and bug.error.startswith("KeyError")


def test_a_question_that_never_ends_is_a_failure_of_infrastructure() -> None:
    class Hung:
        async def reply(self, *_: Any, **__: Any) -> ChatReply:
            await asyncio.sleep(3600)
            raise AssertionError

    played = play(kit(deadline_s=0.05), Hung())
    assert played.state is State.failed and played.error == "no end within deadline_s=0.05"


def test_without_the_evidence_what_ranks_below_moves_up() -> None:
    async def body() -> None:
        whole, gold = backend(), TASK.gold_docs[0]
        query = Query(gold, 3)
        [before] = await whole.search([query])
        [after] = await Without(whole, {gold}).search([query])
        assert gold in [h.doc_id for h in before] and gold not in [h.doc_id for h in after] and len(after) == 3
        assert [h.doc_id for h in after][:2] == [h.doc_id for h in before if h.doc_id != gold][:2]
        assert (await Without(whole, {gold}).get([before[-1].doc_id, gold]))[1] is None

    asyncio.run(body())
    played = play(kit(without_gold=True))
    assert played.trajectory is not None and played.trajectory.stop is StopReason.refused
    assert not {s.doc_id for e in played.trajectory.events for s in e.seen} & set(TASK.gold_docs)


def test_probes_see_nothing_or_the_evidence_alone() -> None:
    closed, oracle = play(kit(), probe="closed_book"), play(kit(), probe="oracle")
    assert closed.probe == "closed_book" and closed.trajectory is not None and not closed.trajectory.events
    assert oracle.trajectory is not None and oracle.trajectory.answer in TASK.answers
    assert {s.doc_id for e in oracle.trajectory.events for s in e.seen} <= set(TASK.gold_docs)

    async def found() -> list[str]:
        pages = [d for d in await backend().get(TASK.gold_docs) if d is not None]
        given = Given(pages, backend().info())
        return [h.doc_id for h in (await given.search([Query(TASK.gold_docs[1], 9)]))[0]]

    ranked = asyncio.run(found())
    assert ranked[0] == TASK.gold_docs[1] and set(ranked) == set(TASK.gold_docs)


def test_seeds_differ_by_sample_and_stay_by_question() -> None:
    seeds = {seed_of(0, Unit(task, sample, "c"), "") for task in "ab" for sample in range(3)}
    assert len(seeds) == 6 and seed_of(0, Unit("a", 0, "x"), "") == seed_of(0, Unit("a", 0, "y"), "")


# ----------------------------------------------------------------------------------------------------- the runner


class Pretended:
    """Stands for Ray in `cluster.evaluation.run`: what a worker is asked is answered when somebody waits for it, four at a time."""

    import ray.exceptions as exceptions

    def __init__(self, answer: Callable[[Task, int], Played | Exception]) -> None:
        self._answer, self._tries = answer, dict[str, int]()
        self._answers: dict[str, Played | Exception] = {}
        self.most = self._under_way = 0
        self.play = self

    def remote(self, task: Task, unit: Unit, probe: str) -> str:
        self._tries[task.id] = self._tries.get(task.id, 0) + 1
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        reference = f"{task.id} {self._tries[task.id]}"
        self._answers[reference] = self._answer(task, self._tries[task.id])
        return reference

    def wait(self, references: list[Any], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Any], list[Any]]:
        return references[:4], references[4:]

    def get(self, reference: str) -> Played:
        self._under_way -= 1
        found = self._answers[reference]
        if isinstance(found, Exception):
            raise found
        return found


def worked(
    folder: Path, answer: Callable[[Task, int], Played | Exception], **more: Any
) -> tuple[list[Played], Pretended, Teller]:
    """What is written when workers answer so; 8 questions, one worker of 3 at a time."""
    config = EvalConfig(name="e", storage_path=str(folder), benchmark=BenchmarkConfig(kind="world"), **more)
    config.world, config.rollout.groups_in_flight = (
        replace(config.world, num_entities=30, num_tasks=8, hops={2: 1.0}),
        3,
    )
    staff, pretended = mock.Mock(config=config, tend=list, replace=lambda name, why: "replaced"), Pretended(answer)
    staff.workers = {"player-0": pretended}
    pretended_time = mock.patch.multiple("cluster.evaluation.run", ray=pretended, RETRY_S=0.0, POLL_S=0.0)
    with open_folder(config, questions(config), {}) as opened, pretended_time:
        teller = Teller(mock.Mock(), 8, "question")
        try:
            work(staff, opened, jobs(config, opened, retry_errors=False), teller)
        finally:
            found = list(opened.played())
    return found, pretended, teller


def ended(task: Task, error: str = "") -> Played:
    return Played(Unit(task.id, 0, "c"), State.failed if error else State.done, None, error)


def test_questions_are_under_way_as_there_is_room_and_written_once(tmp_path: Path) -> None:
    found, pretended, teller = worked(tmp_path, lambda task, tries: ended(task))
    assert len(found) == 8 and {p.tries for p in found} == {1} and pretended.most == 3 and teller.done == 8


def test_infrastructure_is_tried_again_and_then_counted(tmp_path: Path) -> None:
    import ray

    first: list[str] = []

    def answer(task: Task, tries: int) -> Played | Exception:
        first.append(task.id)
        if task.id == first[0] and tries < 3:
            return ray.exceptions.ActorDiedError() if tries == 1 else ended(task, "the endpoint is away")
        return ended(task, "away for good" if task.id == first[1] else "")

    found, _, _ = worked(tmp_path, answer)
    by_task = {p.unit.task: p for p in found}
    assert (by_task[first[0]].state, by_task[first[0]].tries) == (State.done, 2), (
        "a worker that others shared costs no try"
    )
    assert (by_task[first[1]].state, by_task[first[1]].error) == (State.failed, "away for good") and len(found) == 8


def test_a_question_that_kills_its_workers_fails_alone(tmp_path: Path) -> None:
    """Of five questions that a worker plays at a time one kills it, and with it what it is played with."""
    import ray

    config = EvalConfig(name="e", storage_path=str(tmp_path), benchmark=BenchmarkConfig(kind="world"), patience=2)
    config.world = replace(config.world, num_entities=30, num_tasks=12, hops={2: 1.0})
    config.rollout.groups_in_flight = 5
    workers: dict[str, Any] = {}
    beside: list[int] = []

    class Worker:
        """Answers are there, or the worker is dead, once somebody waits for them."""

        def __init__(self) -> None:
            self.playing: list[str] = []
            self.play, self.dead = self, False

        def remote(self, task: Task, unit: Unit, probe: str) -> Any:
            self.playing.append(task.id)
            self.dead = self.dead or task.id == poison
            return self, task.id

    class Ray(Pretended):
        def __init__(self) -> None:
            super().__init__(lambda task, tries: ended(task))

        def get(self, reference: Any) -> Played:
            worker, task = reference
            if worker.dead:
                beside.append(len(worker.playing))
                raise ray.exceptions.ActorDiedError
            worker.playing.remove(task)
            return ended(opened.tasks[task])

    def replaced(name: str, reason: str) -> str:
        workers.pop(name)
        workers[f"{name}'"] = Worker()
        return "replaced"

    staff = mock.Mock(config=config, tend=list, workers=workers, replace=replaced)
    workers["player"] = Worker()
    with (
        open_folder(config, questions(config), {}) as opened,
        mock.patch.multiple("cluster.evaluation.run", ray=Ray(), RETRY_S=0.0, POLL_S=0.0),
    ):
        poison = opened.benchmark.tasks[2].id
        work(staff, opened, jobs(config, opened, retry_errors=False), Teller(mock.Mock(), 12, "question"))
        found = {p.unit.task: p for p in opened.played()}
    assert len(found) == 12 and [t for t, p in found.items() if p.state is State.failed] == [poison]
    assert found[poison].tries == 3 and found[poison].error.startswith("its worker died")
    assert {p.tries for t, p in found.items() if t != poison} == {1}
    assert max(beside[5:]) == 1, "who shared a dead worker plays alone the next time, since they were few"


def test_when_nothing_works_the_evaluation_ends_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"3 questions failed one after the other, the last with: HTTP 500; .* --retry-errors"
    ):
        worked(tmp_path, lambda task, tries: ended(task, "HTTP 500"), patience=3, tries=1)


@pytest.mark.parametrize(("timeout_s", "fault"), [(0.5, ChatFailed), (5.0, BudgetSpent)])
def test_an_endpoint_that_lets_a_whole_try_pass_is_at_fault_and_a_slow_one_is_not(
    timeout_s: float, fault: type
) -> None:
    async def body() -> None:
        import time

        class Hung:
            async def reply(self, *_: Any, **__: Any) -> ChatReply:
                await asyncio.sleep(60)
                raise AssertionError

        chat = BudgetedChat(Hung(), Purse(BudgetConfig(seconds=1.0), time.monotonic), 100, timeout_s=timeout_s)
        with pytest.raises(fault):
            await chat.reply(USER)

    virtual_time.run(body())
