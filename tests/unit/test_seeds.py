from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.advantages import AdvantageConfig, group_rewards
from agents.interfaces import Services
from agents.types import (
    Document,
    Group,
    Member,
    Nugget,
    RecordError,
    Status,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Verdict,
)
from rewards.config import RewardConfig
from rewards.judges.templates import load_prompt, render
from rewards.registry import make_reward, make_shaper
from rewards.seeds.conduct import tool_efficiency
from rewards.seeds.config import R3RagConfig, StepSearchConfig, ToolRLConfig, UtilityConfig
from rewards.seeds.dcpo import dcpo_select
from rewards.seeds.grpo_lambda import efficient_groups, lambda_rewards
from rewards.seeds.hapo import Hapo, length_reward
from rewards.seeds.r3_rag import r3_rewards
from rewards.seeds.regularised import distinct_share, length_share
from rewards.seeds.shaping import ShaperConfig
from rewards.seeds.stepsearch import information_gains, redundancies
from rewards.seeds.toolrl import Call, call_score
from rewards.seeds.utility import marginal_utilities
from tests.support.reward_cases import ScriptedJudge, group, rollout
from tests.support.step_cases import MALFORMED, answer, calls, members, walk

TASK = Task("t", "Where was the painter of the fresco born?", ("Paris",))


async def score(
    name: str, *rollouts: Trajectory, task: Task = TASK, judge: object = None, **options: Any
) -> list[Verdict]:
    services = Services(judge)  # type: ignore[arg-type]
    return await make_reward(RewardConfig(name=name, **options))(group(task, *rollouts), services)


# --------------------------------------------------------------------------------------------------------- R3-RAG


def test_r3_rag_worked_example() -> None:
    config = R3RagConfig()
    assert r3_rewards([0.8, 0.5], "right", config) == pytest.approx([1.28, 0.8, 2.0])
    assert r3_rewards([0.8, 0.5], "wrong", config) == pytest.approx([0.64, 0.4, 0.0])
    assert r3_rewards([0.8, 0.5], "unanswered", config) == pytest.approx([0.72, 0.45])
    assert r3_rewards([0.8], "malformed", config) == pytest.approx([0.8, -0.9])


def by_query(values: Mapping[str, float]) -> ScriptedJudge:
    return ScriptedJudge(r3_relevance=lambda request: {"relevance": values[request.fields["query"]]})


TWO = (("who painted it", ["The fresco is by Ann."]), ("where was Ann born", ["Ann was born in Paris."]))


async def test_r3_rag_scores_every_turn_of_a_rollout() -> None:
    judge = by_query({"who painted it": 0.8, "where was Ann born": 0.5})
    right, wrong, cut, broken = await score(
        "r3_rag", walk(*TWO, answer("Paris")), walk(*TWO, answer("Rome")), walk(*TWO, stop=StopReason.turn_limit),
        walk(TWO[0], MALFORMED, stop=StopReason.malformed), judge=judge,
    )  # fmt: skip
    assert right.step_rewards == pytest.approx([1.28, 0.8, 2.0]) and right.reward == pytest.approx(4.08 / 3)
    assert wrong.step_rewards == pytest.approx([0.64, 0.4, 0.0])
    assert cut.step_rewards == pytest.approx([0.72, 0.45])
    assert broken.step_rewards == pytest.approx([0.8, -0.9])
    assert (
        right.parts["relevance"] == pytest.approx(0.65) and right.parts["outcome"] == 1.0 and right.parts["steps"] == 3
    )
    fields = judge.asked[1].fields
    assert fields["history"] == ["\nwho painted it"] and fields["documents"][0]["text"] == "Ann was born in Paris."


async def test_r3_rag_the_judge_reads_the_beginning_of_a_document() -> None:
    judge = ScriptedJudge(r3_relevance={"relevance": 1.0})
    await score("r3_rag", walk(("who", ["x" * 9000]), answer("Paris")), judge=judge)
    assert len(judge.asked[0].fields["documents"][0]["text"]) == 512


async def test_r3_rag_a_step_without_results_earns_nothing_and_a_broken_judge_never_pays() -> None:
    judge = ScriptedJudge(r3_relevance=Status.unjudgeable)
    (verdict,) = await score("r3_rag", walk(("q", []), ("who", ["text"]), answer("Paris")), judge=judge)
    assert verdict.step_rewards == (0.0, 0.0, 2.0) and len(judge.asked) == 1
    assert verdict.status == {"relevance": Status.unjudgeable} and not verdict.masked
    for reply in ({"relevance": 1.5}, {"relevance": True}, {"relevance": "1"}, [1]):
        (verdict,) = await score(
            "r3_rag", walk(("who", ["text"]), answer("Paris")), judge=ScriptedJudge(r3_relevance=reply)
        )
        assert verdict.step_rewards == (0.0, 2.0) and verdict.causes == {"relevance": "bad_reply"}


async def test_r3_rag_saying_nothing_pays_no_more_than_being_wrong() -> None:
    judge = by_query({"who painted it": 0.8})
    empty, keyed, wrong = await score(
        "r3_rag", walk(TWO[0], answer("")), walk(TWO[0], answer("Solution:")), walk(TWO[0], answer("Rome")), judge=judge
    )
    assert empty.step_rewards == keyed.step_rewards == wrong.step_rewards == pytest.approx((0.64, 0.0))


async def test_r3_rag_infrastructure_masks() -> None:
    dead = ScriptedJudge(r3_relevance=Status.unavailable)
    (verdict,) = await score("r3_rag", walk(TWO[0], answer("Paris")), judge=dead)
    assert verdict.masked and verdict.reward == 0.0 and not verdict.step_rewards
    (verdict,) = await score("r3_rag", walk(TWO[0], answer("Paris"), error="backend"), judge=dead)
    assert verdict.masked and verdict.causes == {"relevance": "backend"}
    (verdict,) = await score("r3_rag", walk(TWO[0], stop=StopReason.env_failed), judge=dead)
    assert verdict.masked


# ----------------------------------------------------------------------------------------------------- StepSearch


def test_stepsearch_worked_example() -> None:
    gains = information_gains([(0.6, 0.1), (0.5, 0.7)])
    assert gains == pytest.approx([0.35, 0.30])
    repeated = redundancies([["a", "b", "c"], ["a", "d", "e"]])
    assert repeated == pytest.approx([0.0, 1 / 3])
    steps = [StepSearchConfig().step_scale * (g - p) for g, p in zip(gains, repeated, strict=True)]
    assert steps == pytest.approx([0.21, -0.02])


GOLD = Task("t", "q?", ("Paris",), meta={"gold_texts": ["the fresco is by ann", "ann was born in paris"]})


async def test_stepsearch_pays_for_new_evidence_and_charges_for_repetition() -> None:
    first, second = "the fresco is by ann", "ann was born in paris"
    (verdict,) = await score(
        "stepsearch", walk(("who", [first]), ("who", [first]), ("where", [second, first]), answer("Paris")), task=GOLD
    )
    a, b, c, last = verdict.step_rewards
    assert a > 0 and b == pytest.approx(-0.6) and c < 0.3 and last == 1.0
    assert verdict.parts["gain"] == pytest.approx(1.0)  # both gold paragraphs were found word for word
    assert verdict.parts["redundancy"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert verdict.reward == pytest.approx(sum(verdict.step_rewards))


async def test_stepsearch_adds_keys_to_the_last_step_and_takes_the_best_match() -> None:
    task = Task(
        "t",
        "q?",
        ("Paris",),
        meta={"subquestion_keys": [["who painted the fresco"], ["birthplace of ann", "ann born"]]},
    )
    walked = walk(("who painted the fresco", ["x"]), ("ann born where", ["y"]), ("nothing", ["y"]), answer("Rome"))
    (verdict,) = await score("stepsearch", walked, task=task)
    assert verdict.parts["keys"] == pytest.approx((1.0 + 0.8) / 2)
    # no gold paragraphs: no scores of steps, only the global reward
    assert verdict.step_rewards == pytest.approx([0, 0, 0, 0.618 * 0.9])


async def test_stepsearch_unfinished_is_minus_one_and_earns_nothing_for_steps() -> None:
    for stop in (StopReason.malformed, StopReason.context_full, StopReason.turn_limit):
        (verdict,) = await score("stepsearch", walk(("who", ["ann"]), ("who", ["b"]), stop=stop), task=GOLD)
        assert verdict.reward == -1.0 and verdict.step_rewards == (0.0, -1.0) and verdict.parts["outcome"] == 0.0
    (verdict,) = await score("stepsearch", walk(("who", ["ann"]), answer("Paris"), error="backend"), task=GOLD)
    assert verdict.masked


async def test_stepsearch_gets_gold_texts_from_retrieval() -> None:
    task = Task("t", "q?", ("Paris",), gold_docs=("d1",))

    class Shelf:
        async def get(self, ids: tuple[str, ...]) -> list[Document | None]:
            return [Document(i, "", "ann was born in paris") for i in ids]

    class Broken:
        async def get(self, ids: tuple[str, ...]) -> list[Document | None]:
            raise RuntimeError("no shard answers")

    reward = make_reward(RewardConfig(name="stepsearch"))
    walked = group(task, walk(("where", ["ann was born in paris"]), answer("Paris")))
    (verdict,) = await reward(walked, Services(retrieval=Shelf()))  # type: ignore[arg-type]
    assert verdict.step_rewards == pytest.approx([0.6, 1.0])
    (verdict,) = await reward(walked, Services(retrieval=Broken()))  # type: ignore[arg-type]
    assert verdict.masked and verdict.causes == {"gain": "gold_texts_RuntimeError"}
    with pytest.raises(ValueError, match=r"meta\.gold_texts"):
        await reward(walked, Services())
    for docs in (("d1",), ()):  # nuggets stand for paragraphs that nobody has
        known = Task("t", "q?", ("Paris",), gold_docs=docs, nuggets=(Nugget("ann was born in paris"),))
        (verdict,) = await reward(group(known, *walked.trajectories), Services())
        assert verdict.step_rewards == pytest.approx([0.6, 1.0]) and verdict.parts["gain"] == pytest.approx(1.0)


async def test_stepsearch_the_outcome_may_be_judged_and_f1_is_what_pays() -> None:
    right = ScriptedJudge(outcome={"extracted_answer": "the French capital", "correct": True})
    walked = walk(("where", ["ann was born in paris"]), answer("the French capital"))
    (verdict,) = await score("stepsearch", walked, task=GOLD, judge=right, outcome="judge")
    assert verdict.parts["outcome"] == 1.0 and verdict.parts["f1"] == 0.0 == verdict.step_rewards[-1]
    dead = ScriptedJudge(outcome=Status.unavailable)
    (verdict,) = await score("stepsearch", walked, task=GOLD, judge=dead, outcome="judge")
    assert verdict.masked and verdict.step_rewards == ()


# --------------------------------------------------------------------------------------------------------- ToolRL


def search(query: str = "a", k: int = 5) -> Call:
    return Call.of("search", {"query": query, "k": k})


def test_toolrl_worked_example() -> None:
    gold = [search()]
    assert call_score(gold, [search(k=3)]) == pytest.approx(1.5)
    assert call_score(gold, [Call.of("open", {"query": "a", "k": 5})]) == -3
    assert call_score(gold, [search(), Call.of("open", {"id": 1})]) == pytest.approx(2.25)
    assert call_score(gold, [search()]) == 3 and call_score([], [search()]) == 0 and call_score(gold, []) == -3
    assert call_score([Call.of("stop", {})], [Call.of("stop", {})]) == 3


def test_toolrl_values_are_compared_as_json() -> None:
    gold = [Call.of("f", {"x": 1})]
    assert call_score(gold, [Call.of("f", {"x": True})]) < 3 and call_score(gold, [Call.of("f", {"x": "1"})]) < 3
    assert call_score([Call.of("f", {"x": {"a": 1, "b": 2}})], [Call.of("f", {"x": {"b": 2, "a": 1}})]) == 3


async def test_toolrl_scores_the_calls_of_a_rollout() -> None:
    task = Task("t", "q?", ("x",), meta={"calls": [{"name": "search", "arguments": {"query": "a", "k": 5}}]})
    exact, half = ToolCall("search", {"k": 5, "query": "a"}), ToolCall("search", {"k": 3, "query": "a"})
    good, fair, bad = await score(
        "toolrl", calls(exact), calls(half), calls(exact, stop=StopReason.malformed), task=task
    )
    assert (good.reward, fair.reward, bad.reward) == pytest.approx((4.0, 2.5, -3.0))
    (coarse,) = await score("toolrl", calls(half), task=task, toolrl=ToolRLConfig(coarse=True))
    assert coarse.parts["calls"] == -3.0
    (lost,) = await score("toolrl", calls(exact, stop=StopReason.env_failed), task=task)
    assert lost.masked
    with pytest.raises(ValueError, match=r"meta\.calls"):
        await score("toolrl", calls(exact), task=Task("t", "q?", meta={"calls": ["search"]}))


# ---------------------------------------------------------------------------------------------------- regularised


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=30), st.integers(2, 4), st.integers(1, 40))
def test_saying_it_again_never_pays(said: list[str], times: int, target: int) -> None:
    once, more = " ".join(said), " ".join(said * times)
    assert distinct_share(more) <= distinct_share(once) + 1e-12
    assert (
        distinct_share(more) * length_share(more, target) <= distinct_share(once) * length_share(once, target) + 1e-12
    )


async def test_regularised_relevance() -> None:
    def judge(request: Any) -> dict[str, float]:
        return {"relevance": 0.9 if "Ann" in request.fields["text"] else 0.1}

    scripted = ScriptedJudge(relevance=judge)
    open_ended = Task("o", "Who was she?", meta={})
    short, twice, off = await score(
        "regularised", rollout("Ann painted frescoes"), rollout("Ann painted frescoes " * 2), rollout(" ".join(map(str, range(300)))),
        task=open_ended, judge=scripted,
    )  # fmt: skip
    assert short.reward == pytest.approx(0.9 * 0.03)
    assert off.reward == pytest.approx(0.1)
    assert twice.reward <= short.reward
    (closed,) = await score("regularised", rollout("Ann painted [[1](u)]\n\n## References\n1. u"), judge=scripted)
    assert closed.reward == pytest.approx(0.9) and scripted.asked[-1].fields == {
        "to": {"reference": ["Paris"]},
        "text": "Ann painted",
    }
    (masked,) = await score("regularised", rollout("Ann"), judge=ScriptedJudge(relevance=Status.unavailable))
    assert masked.masked


# -------------------------------------------------------------------------------------------------------- utility


def reader(request: Any) -> dict[str, str | None]:
    """Right only from a passage with the key; misled by a passage that lies."""
    text = " ".join(p["text"] for p in request.fields["passages"])
    return {
        "answer": "Rome"
        if "lie" in text
        else "Paris"
        if "key" in text or "known" in request.fields["question"]
        else None
    }


async def test_utility_worked_example() -> None:
    judge = ScriptedJudge(reader=reader)
    helped, useless = await score(
        "utility",
        walk(("a", ["noise"]), ("b", ["the key"]), answer("x")),
        walk(("a", ["noise"]), answer("x")),
        judge=judge,
        utility=UtilityConfig(per_step=True),
    )
    assert helped.reward == 1.0 and helped.step_rewards == (0.0, 1.0, 0.0)
    assert useless.reward == 0.0
    known = Task("k", "known?", ("Paris",))
    already, misled = await score(
        "utility", walk(("b", ["the key"]), answer("x")), walk(("b", ["a lie"]), answer("x")), task=known, judge=judge
    )
    assert already.reward == 0.0 and misled.reward == -1.0
    assert marginal_utilities([0, 0.5, 1]) == [0.5, 0.5]


async def test_utility_of_a_rollout_without_a_message_is_0_and_nobody_is_asked() -> None:
    judge, found = ScriptedJudge(reader=reader), ("b", ["the key"])
    for walked in (
        walk(found, MALFORMED, stop=StopReason.malformed),
        walk(found, answer("Solution")),
        walk(found, answer("")),
    ):
        (verdict,) = await score("utility", walked, judge=judge)
        assert verdict.reward == 0.0 and not verdict.masked and not judge.asked


async def test_utility_asks_for_each_set_once_and_masks_without_a_reader() -> None:
    judge = ScriptedJudge(reader=reader)
    walked = walk(("a", []), ("b", ["the key"]), ("c", []), answer("x"))
    (verdict,) = await score("utility", walked, judge=judge, utility=UtilityConfig(per_step=True))
    assert len(judge.asked) == 2 and sum(verdict.step_rewards) == verdict.reward == 1.0
    judge = ScriptedJudge(reader=reader)
    (whole,) = await score(
        "utility",
        walk(("a", ["x"]), ("b", ["the key"]), answer("x")),
        judge=judge,
        utility=UtilityConfig(samples=3),
    )
    assert len(judge.asked) == 6 and whole.reward == 1.0 and whole.step_rewards == ()
    for status, masked in ((Status.unavailable, True), (Status.unjudgeable, False)):
        (verdict,) = await score("utility", walk(("b", ["the key"]), answer("x")), judge=ScriptedJudge(reader=status))
        assert verdict.masked is masked and verdict.reward == 0.0


# --------------------------------------------------------------------------------------------------------- conduct


async def test_conduct() -> None:
    from rewards.seeds.config import ConductConfig

    assert tool_efficiency(5, 20) == 0.75 and tool_efficiency(30, 20) == 0.0
    limits = ConductConfig(max_calls=4, max_words=10)
    good, long, cut = await score(
        "conduct",
        walk(("q", ["t"]), answer("a b c")),
        walk(answer("w " * 20)),
        walk(stop=StopReason.turn_limit),
        conduct=limits,
    )
    assert good.parts == {"format": 1.0, "length": 1.0, "distinct": 1.0, "efficiency": 0.75}
    assert long.parts["length"] == 0.0 and long.parts["distinct"] < 0.5 and long.reward == 0.0
    assert cut.reward == cut.parts["format"] == 0.0


# --------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", ["r3_relevance", "relevance", "reader"])
async def test_prompts_take_the_fields_that_the_rewards_send(name: str) -> None:
    asked: list[Any] = []

    class Spy(ScriptedJudge):
        async def ask(self, request: Any) -> Any:
            asked.append(request)
            return await super().ask(request)

    judge = Spy(r3_relevance={"relevance": 1.0}, relevance={"relevance": 1.0}, reader={"answer": "Paris"})
    for reward in ("r3_rag", "regularised", "utility"):
        await score(reward, walk(("where", ["Ann was born in Paris."]), answer("Paris")), judge=judge)
    request = [r for r in asked if r.prompt == name][-1]
    assert "Paris" in render(load_prompt(name), request.fields)


# --------------------------------------------------------------------------------------------------------- shapers


def member(correct: float, tokens: int, **verdict: Any) -> Member:
    walked = walk(answer("x"), tokens=tokens)
    return Member(walked.with_verdict(Verdict(correct, {"outcome": correct}, **verdict)))


def batch(*groups: list[tuple[float, int]]) -> list[Group]:
    return [
        Group(f"g{n}", Task(f"t{n}", "q?", ("x",)), tuple(member(c, tokens) for c, tokens in made))
        for n, made in enumerate(groups)
    ]


def rewards_of(group: Group) -> list[float]:
    return [v.reward for v in group.verdicts]


def test_grpo_lambda_worked_example() -> None:
    assert lambda_rewards([True] * 3, [100, 200, 300], 0.6) == pytest.approx([0.8637, 0.7, 0.5363], abs=5e-5)
    assert lambda_rewards([True, False], [100, 5], 0.6) == pytest.approx([0.7, 0.0])
    assert lambda_rewards([False, False], [1, 2], 0.6) == [0.0, 0.0]
    accuracies = {"a": 0.5, "b": 1.0, "c": 1.0, "d": 0.0, "e": 0.2}
    assert efficient_groups(accuracies, 0.2) == {"b"} and efficient_groups(accuracies, 0.21) == {"b", "c"}
    assert efficient_groups({"a": 0.4}, 0.2, min_accuracy=0.5) == set()


def test_grpo_lambda_shapes_only_the_best_groups_of_a_batch() -> None:
    shaper = make_shaper(ShaperConfig("grpo_lambda", share=0.5))
    assert shaper
    easy, hard = shaper.shape(batch([(1, 10), (1, 20), (1, 30)], [(1, 10), (0, 99)]))
    assert rewards_of(easy) == pytest.approx([0.8637, 0.7, 0.5363], abs=5e-5) and rewards_of(hard) == [1, 0]
    assert easy.verdicts[0].parts["shaping"] == pytest.approx(-0.1363, abs=5e-5)
    # the advantage reads what was shaped
    assert group_rewards(easy, AdvantageConfig()) == pytest.approx(rewards_of(easy))


def test_hapo_worked_example() -> None:
    lengths = (500, 1000, 1500, 2500)
    right = [length_reward(n, 1000, True) for n in lengths]
    wrong = [length_reward(n, 1000, False) for n in lengths]
    assert right == pytest.approx([0.7071, 0, -0.7, -0.7], abs=5e-5)
    assert wrong == pytest.approx([0, 0, -0.7071, -1], abs=5e-5)
    assert length_reward(500, None, True) == 0.0
    linear = [length_reward(n, 1000, True, "linear") for n in (500, 1000, 1100, 1300, 5000)]
    assert linear == pytest.approx([0.5, 0, 0, -0.2, -0.7])
    assert [length_reward(n, 1000, False, "linear") for n in (500, 1300, 5000)] == pytest.approx([0, -0.2, -1])


def test_hapo_learns_from_a_batch_after_it_is_trained_and_comes_back_from_a_checkpoint() -> None:
    first, second = batch([(1, 40), (1, 60), (0, 5)]), batch([(1, 20), (0, 80)])
    shaper = Hapo(ShaperConfig("hapo"))
    assert rewards_of(shaper.shape(first)[0]) == [1, 1, 0]  # no history yet
    assert shaper.shape(first) == shaper.shape(first)  # asking twice changes nothing
    shaper.update(first)
    assert shaper.history("t0") == 40
    assert rewards_of(shaper.shape(second)[0]) == pytest.approx([1 + 0.7071, -1], abs=5e-5)
    restored = Hapo(ShaperConfig("hapo"))
    restored.load_state(json.loads(json.dumps(shaper.state())))
    assert rewards_of(restored.shape(second)[0]) == rewards_of(shaper.shape(second)[0])
    shaper.update(second)
    assert shaper.history("t0") == 20 and restored.history("t0") == 40
    mean = Hapo(ShaperConfig("hapo", history="mean"))
    mean.update(first)
    mean.update(second)
    assert mean.history("t0") == pytest.approx((40 + 60 + 20) / 3) and mean.history("t9") is None


def test_dcpo_worked_example() -> None:
    rewards = [1.0] * 6 + [0.5] * 4 + [0.0] * 6
    lengths = [9, 3, 5, 1, 7, 8, 1, 1, 1, 1, 4, 9, 6, 8, 5, 7]
    kept = dcpo_select(rewards, lengths)
    assert len(kept) == 8 and kept == [1, 2, 3, 4, 11, 12, 13, 15]  # the shortest winners, the longest losers
    assert dcpo_select([1.0], [5]) == [0] and dcpo_select([1.0, 0.0], [5, 5]) == [0, 1] and dcpo_select([], []) == []
    shaper = make_shaper(ShaperConfig("dcpo"))
    assert shaper
    (group,) = shaper.shape(batch([(1, 5), (1, 9), (0, 5), (0, 9)]))
    assert [(v.reward, len(t.token_ids)) for v, t in zip(group.verdicts, group.trajectories, strict=True)] == [
        (1, 6),
        (0, 10),
    ]


@pytest.mark.parametrize("name", ["grpo_lambda", "hapo", "dcpo"])
def test_a_masked_member_is_neither_counted_nor_changed(name: str) -> None:
    task = Task("t", "q?", ("x",))
    dead = Member(walk(answer("x"), tokens=1).with_verdict(Verdict.unavailable("outcome", "timeout")))
    with_dead = Group("g", task, (member(1, 10), dead, member(1, 30), member(0, 20), member(1, 20), member(0, 9)))
    alone = Group("g", task, tuple(m for m in with_dead.members if m is not dead))
    a, b = make_shaper(ShaperConfig(name)), make_shaper(ShaperConfig(name))
    assert a and b
    a.update([with_dead])
    b.update([alone])
    (shaped,), (plain,) = a.shape([with_dead]), b.shape([alone])
    assert dead in shaped.members
    assert [m for m in shaped.members if m != dead] == list(plain.members) and a.state() == b.state()


def test_shapers_need_an_outcome_and_a_config_that_fits() -> None:
    bare = Group("g", TASK, (Member(walk(answer("x")).with_verdict(Verdict(1.0))),))
    for name in ("grpo_lambda", "hapo"):
        shaper = make_shaper(ShaperConfig(name))
        assert shaper
        with pytest.raises(RecordError, match="part outcome"):
            shaper.shape([bare])
    assert make_shaper(ShaperConfig()) is None
    for bad in (
        {"name": "x"}, {"share": 0.0}, {"alpha": 1.0}, {"weight": 1.5}, {"form": "round"}, {"history": "max"}, {"tolerance": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"shaper\."):
            ShaperConfig(**bad).check()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 60)), min_size=1, max_size=8),
    st.sampled_from(["grpo_lambda", "hapo"]),
    st.sampled_from(["cosine", "linear"]),
    st.integers(1, 60),
)
def test_right_always_earns_more_than_wrong(made: list[tuple[bool, int]], name: str, form: str, history: int) -> None:
    shaper = make_shaper(ShaperConfig(name, form=form, weight=1.4))
    assert shaper
    shaper.update(batch([(1, history)]))
    (group,) = shaper.shape(batch([(float(c), n) for c, n in made]))
    right = [r for r, (c, _) in zip(rewards_of(group), made, strict=True) if c]
    wrong = [r for r, (c, _) in zip(rewards_of(group), made, strict=True) if not c]
    assert not right or not wrong or min(right) > max(wrong)


def test_members_helper_keeps_order() -> None:
    assert [m.trajectory.answer for m in members(walk(answer("a")), walk(answer("b")))] == ["a", "b"]
