from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.interfaces import Judge, Services
from agents.types import JudgeRequest, Nugget, Status, StopReason, Task, Verdict
from cluster.config import load_config
from cluster.schema import RunConfig
from envs.world import WorldConfig
from envs.world.world import build_world
from rewards.config import RewardConfig
from rewards.judges.base import JudgeConfig, make_judge
from rewards.judges.rule import RuleJudge
from rewards.judges.templates import load_prompt, render
from rewards.nugget import (
    CONTRADICTION,
    LABELS,
    MERGE_ORDER,
    NOT,
    PARTIAL,
    PARTS,
    SUPPORT,
    WORST_FIRST,
    assign_request,
    cut_blocks,
    label_values,
    merge_labels,
    nugget_reward,
    trec_scores,
)
from rewards.nuggets.config import NuggetConfig
from rewards.registry import make_reward
from tests.support.chat_double import serve
from tests.support.chat_double import verdict as verdict_of
from tests.support.reward_cases import ScriptedJudge, group, rollout

FACTS = {
    "The tower opened in 1889.": SUPPORT,
    "Its height is 330 m.": PARTIAL,
    "It stands in Paris.": NOT,
    "It is painted red.": CONTRADICTION,
}
LONG = Task(
    "long", "What about the tower?",
    nuggets=tuple(Nugget(text, "vital" if i < 2 else "okay", (f"d{i}",)) for i, text in enumerate(FACTS)),
)  # fmt: skip
SHORT = Task("short", "Which town?", ("Lyon", "Lyons"))
SAID = "The tower opened in 1889 and is about 330 m high. It is blue."
labels_ = st.sampled_from(LABELS)
marked = st.lists(st.tuples(labels_, st.floats(0.01, 100.0), st.booleans()), min_size=1, max_size=30)
DEFAULT = label_values(NuggetConfig())


async def score(task: Task, judge: Judge, *rollouts: Any, outcome: str = "rule", **options: Any) -> list[Verdict]:
    config = RewardConfig(name="nugget", outcome=outcome, nugget=NuggetConfig(**options))
    return await make_reward(config)(group(task, *rollouts), Services(judge))


def by_fact(request: JudgeRequest, facts: dict[str, str] = FACTS) -> dict[str, str]:
    return {key: facts[text] for key, text in request.fields["nuggets"].items()}


def rows_of(verdict: Verdict) -> list[dict[str, Any]]:
    return [dict(e) for e in verdict.evidence if "nugget" in e]


# ------------------------------------------------------------------------------------------------- the formulas


async def test_the_worked_example_by_hand() -> None:
    (verdict,) = await score(LONG, ScriptedJudge(nugget_assign=by_fact), rollout(SAID))
    # weights 1, 1, .5, .5; values 1, .5, 0, 0
    assert verdict.reward == verdict.parts["nugget"] == pytest.approx(1.5 / 3)
    assert {k: verdict.parts[k] for k in ("strict_all", "all", "strict_vital", "vital")} == {
        "strict_all": 1 / 4, "all": 1.5 / 4, "strict_vital": 1 / 2, "vital": 1.5 / 2,
    }  # fmt: skip
    assert {k: verdict.parts[k] for k in ("supported", "partial", "contradicted", "num_nuggets")} == {
        "supported": 1, "partial": 1, "contradicted": 1, "num_nuggets": 4,
    }  # fmt: skip
    assert verdict.prompts == {"nugget_assign": "1-abc"}
    assert [(r["label"], r["weight"], r["docs"]) for r in rows_of(verdict)] == [
        (SUPPORT, 1.0, ["d0"]), (PARTIAL, 1.0, ["d1"]), (NOT, 0.5, ["d2"]), (CONTRADICTION, 0.5, ["d3"]),
    ]  # fmt: skip
    assert set(verdict.parts) >= set(PARTS) - {"f1"}  # a question in long form has no answer to overlap with


@pytest.mark.parametrize(
    ("options", "reward"),
    [
        ({"partial": 0.0}, 1 / 3), ({"okay": 0.0}, 1.5 / 2), ({"contradiction": -1.0}, 1 / 3), ({"score": "strict_vital"}, 1 / 2),
        ({"score": "vital"}, 1.5 / 2), ({"score": "strict_all"}, 1 / 4), ({"score": "all"}, 1.5 / 4), ({"partial": 0.2, "vital": 3.0}, 3.6 / 7),
    ],
)  # fmt: skip
async def test_values_and_weights_are_configured(options: dict[str, Any], reward: float) -> None:
    (verdict,) = await score(LONG, ScriptedJudge(nugget_assign=by_fact), rollout(SAID), **options)
    assert verdict.reward == pytest.approx(reward)


def plain_scores(rows: list[tuple[str, float, bool]], values: dict[str, float]) -> tuple[float, ...]:
    """The formulas once more, from the text of the specification."""
    gained = possible = 0.0
    full = half = vital_full = vital_half = vitals = 0
    for label, weight, is_vital in rows:
        gained, possible = gained + weight * values[label], possible + weight
        full += label == "support"
        half += label == "partial_support"
        if is_vital:
            vitals += 1
            vital_full += label == "support"
            vital_half += label == "partial_support"
    n = len(rows)
    return (
        gained / possible if possible else 0.0, full / n if n else 0.0, (full + 0.5 * half) / n if n else 0.0,
        vital_full / vitals if vitals else 0.0, (vital_full + 0.5 * vital_half) / vitals if vitals else 0.0,
    )  # fmt: skip


def test_three_hundred_random_cases_agree_with_a_plain_implementation() -> None:
    rng = random.Random(6)
    for _ in range(300):
        rows = [
            (rng.choice(LABELS), rng.choice([0.0, 0.5, 1.0, rng.random()]), rng.random() < 0.5)
            for _ in range(rng.randrange(25))
        ]
        low, mid, high = sorted(rng.random() for _ in range(3))
        values = {SUPPORT: high, PARTIAL: mid, NOT: low, CONTRADICTION: -rng.random()}
        found = [label for label, _, _ in rows]
        trec = trec_scores(found, [v for _, _, v in rows])
        ours = (nugget_reward(found, [w for _, w, _ in rows], values), *trec.values())
        assert ours == pytest.approx(plain_scores(rows, values), abs=1e-12), rows


@given(marked)
def test_scores_are_shares(rows: list[tuple[str, float, bool]]) -> None:
    found, weights, vital = (list(column) for column in zip(*rows, strict=True))
    scores = [nugget_reward(found, weights, DEFAULT), *trec_scores(found, vital).values()]
    assert all(0.0 <= s <= 1.0 for s in scores)
    assert nugget_reward([SUPPORT] * len(found), weights, DEFAULT) == 1.0


@given(marked, st.data())
def test_a_more_supportive_label_never_lowers_a_score(rows: list[tuple[str, float, bool]], data: st.DataObject) -> None:
    found, weights, vital = (list(column) for column in zip(*rows, strict=True))
    index = data.draw(st.integers(0, len(rows) - 1))
    better = data.draw(st.sampled_from(WORST_FIRST[WORST_FIRST.index(found[index]) :]))
    raised = [*found[:index], better, *found[index + 1 :]]
    assert nugget_reward(raised, weights, DEFAULT) >= nugget_reward(found, weights, DEFAULT)
    before, after = trec_scores(found, vital), trec_scores(raised, vital)
    assert all(after[name] >= before[name] for name in before)


@given(marked, st.floats(0.001, 1000.0))
def test_weights_have_no_scale(rows: list[tuple[str, float, bool]], factor: float) -> None:
    found, weights, _ = (list(column) for column in zip(*rows, strict=True))
    scaled = nugget_reward(found, [w * factor for w in weights], DEFAULT)
    assert scaled == pytest.approx(nugget_reward(found, weights, DEFAULT))


@given(st.lists(labels_, min_size=1, max_size=6))
def test_blocks_merge_to_the_most_supportive_in_any_order(found: list[str]) -> None:
    merged = merge_labels(found)
    assert (
        merged == merge_labels(found[::-1]) == merge_labels([merge_labels(found[:2]), merge_labels(found[2:]), merged])
    )
    assert all(MERGE_ORDER.index(merged) >= MERGE_ORDER.index(label) for label in found)


def test_no_nuggets_and_no_weights_are_zero() -> None:
    assert nugget_reward([], [], DEFAULT) == 0.0 == nugget_reward([SUPPORT], [0.0], DEFAULT)
    assert set(trec_scores([], []).values()) == {0.0}
    assert trec_scores([SUPPORT], [False])["strict_vital"] == 0.0


# --------------------------------------------------------------------------------------------- calls and blocks


async def test_up_to_ten_nuggets_a_call_and_replies_by_key() -> None:
    facts = {f"Fact {i}.": rng for i, rng in zip(range(23), itertools.cycle(LABELS), strict=False)}
    task = Task("many", "What?", nuggets=tuple(Nugget(text) for text in facts))
    judge = ScriptedJudge(nugget_assign=lambda request: dict(reversed(by_fact(request, facts).items())))
    (verdict,) = await score(task, judge, rollout("Something."))
    assert [len(r.fields["nuggets"]) for r in judge.asked] == [10, 10, 3]
    assert [r["label"] for r in rows_of(verdict)] == list(facts.values())
    assert judge.asked[0].schema["required"] == [f"N{i}" for i in range(1, 11)]


async def test_blocks_of_a_long_message_are_merged() -> None:
    first, second = "A" + " one" * 60, "B" + " two" * 60
    said = {
        "A": dict(zip(FACTS, (NOT, SUPPORT, PARTIAL, CONTRADICTION), strict=True)),
        "B": dict(zip(FACTS, (SUPPORT, NOT, NOT, NOT), strict=True)),
    }
    for message in (f"{first}\n\n{second}", f"{second}\n\n{first}"):
        judge = ScriptedJudge(nugget_assign=lambda r: by_fact(r, said[r.fields["passage"][0]]))
        (verdict,) = await score(LONG, judge, rollout(message), block_chars=300)
        assert len(judge.asked) == 2
        assert [r["label"] for r in rows_of(verdict)] == [SUPPORT, SUPPORT, PARTIAL, CONTRADICTION]


@given(st.text(alphabet="qzk \n", max_size=2000), st.integers(200, 400))
def test_blocks_hold_every_word(message: str, most: int) -> None:
    blocks = cut_blocks(message, most)
    assert all(len(b) <= most for b in blocks)
    assert "".join("".join(b.split()) for b in blocks) == "".join(message.split())


def test_a_long_message_is_cut_between_paragraphs() -> None:
    parts = [f"Paragraph {i} " + "word " * 20 for i in range(6)]
    assert cut_blocks("\n\n".join(parts), 250) == [
        f"{a.rstrip()} \n\n{b.rstrip()}" for a, b in zip(parts[::2], parts[1::2], strict=True)
    ]
    assert "".join(cut_blocks("x" * 1000, 300)) == "x" * 1000
    assert cut_blocks(f"{'word ' * 50}\n\n...", 250) == [
        ("word " * 50).strip()
    ]  # a block that says nothing is not sent


async def test_a_judge_swayed_by_order_is_seen_and_pays_the_least() -> None:
    def first_wins(request: JudgeRequest) -> dict[str, str]:
        return {key: SUPPORT if key == "N1" else NOT for key in request.fields["nuggets"]}

    (swayed,) = await score(LONG, ScriptedJudge(nugget_assign=first_wins), rollout(SAID), shuffles=6)
    assert swayed.parts["consistency"] < 1 and swayed.reward == 0.0
    (steady,) = await score(LONG, ScriptedJudge(nugget_assign=by_fact), rollout(SAID), shuffles=3)
    assert steady.parts["consistency"] == 1.0 and steady.reward == pytest.approx(1.5 / 3)
    assert rows_of(steady)[0]["orders"] == [SUPPORT] * 4
    (again,) = await score(LONG, ScriptedJudge(nugget_assign=first_wins), rollout(SAID), shuffles=6)
    assert again == swayed  # orders follow from task and message


@pytest.mark.parametrize(
    ("size", "shuffles", "orders"), [(1, 3, 1), (2, 1, 2), (2, 5, 2), (3, 1, 2), (3, 9, 6), (12, 4, 5)]
)
async def test_no_order_is_asked_twice(size: int, shuffles: int, orders: int) -> None:
    facts = {f"Fact {i}.": SUPPORT for i in range(size)}
    for number in range(5):
        task = Task(f"t{number}", "What?", nuggets=tuple(Nugget(text) for text in facts))
        judge = ScriptedJudge(nugget_assign=lambda request: by_fact(request, facts))
        await score(task, judge, rollout("Something."), shuffles=shuffles)
        texts = [text for request in judge.asked for text in request.fields["nuggets"].values()]
        assert len({tuple(texts[i : i + size]) for i in range(0, len(texts), size)}) == orders == len(texts) // size


# ---------------------------------------------------------------------------------------------- short and long form


async def test_short_form_is_one_rubric_with_two_labels() -> None:
    judge = ScriptedJudge(nugget_short={"N1": SUPPORT})
    (verdict,) = await score(SHORT, judge, rollout("It lies on the Rhône.\n\n## Exact Answer\nthe city of Lyon"))
    assert verdict.reward == 1.0 and verdict.parts["outcome"] == 0.0
    (request,) = judge.asked
    assert request.schema["properties"]["N1"]["enum"] == [SUPPORT, NOT]
    assert request.fields["nuggets"] == {"N1": "The answer is: Lyon (also written: Lyons)"}


async def test_short_form_asks_nobody_about_an_exact_match() -> None:
    judge = ScriptedJudge(nugget_short={"N1": NOT})
    (verdict,) = await score(SHORT, judge, rollout("## Exact Answer\nLyons"))
    assert verdict.reward == 1.0 and not judge.asked
    (asked,) = await score(SHORT, judge, rollout("## Exact Answer\nLyons"), exact=False)
    assert asked.reward == 0.0 and len(judge.asked) == 1


def commits(request: JudgeRequest) -> dict[str, str]:
    """An honest judge of the short form: the town that a passage names, unless it names several."""
    named = [town for town in ("Paris", "Lyon", "Nice") if town in request.fields["passage"]]
    return {"N1": SUPPORT if named == ["Lyon"] else NOT}


@pytest.mark.parametrize("length", [0, 7_900])
async def test_several_answers_pay_nothing_in_the_short_form_however_far_apart_they_stand(length: int) -> None:
    told = "\n\n".join(f"{town}. {'It is a town. ' * (length // 14)}" for town in ("Paris", "Lyon", "Nice"))
    hedged, marked, right = await score(
        SHORT,
        ScriptedJudge(nugget_short=commits),
        rollout(told),
        rollout(f"{told}\n\n## Exact Answer\nParis"),
        rollout(f"{told}\n\n## Exact Answer\nthe city of Lyon"),
    )
    assert (hedged.reward, marked.reward, right.reward) == (0.0, 0.0, 1.0)


async def test_short_form_may_be_forced_or_forbidden() -> None:
    both = Task("both", "Which town?", ("Lyon",), nuggets=LONG.nuggets)
    judge = ScriptedJudge(nugget_short={"N1": SUPPORT}, nugget_assign=by_fact)
    await score(both, judge, rollout("x.\n\n## Exact Answer\nLyon"))
    await score(both, judge, rollout("x.\n\n## Exact Answer\nNice"), short_form="always")
    assert judge.prompts() == ["nugget_assign", "nugget_short"]
    (none,) = await score(SHORT, ScriptedJudge(), rollout("x.\n\n## Exact Answer\nLyon"), short_form="never")
    assert none.reward == 0.0 and none.parts["outcome"] == 1.0 and none.parts["num_nuggets"] == 0


async def test_long_form_is_right_with_every_vital_nugget() -> None:
    vital = {text: SUPPORT if i < 2 else NOT for i, text in enumerate(FACTS)}
    (right,) = await score(LONG, ScriptedJudge(nugget_assign=lambda r: by_fact(r, vital)), rollout(SAID))
    (wrong,) = await score(LONG, ScriptedJudge(nugget_assign=by_fact), rollout(SAID))
    assert (right.parts["outcome"], wrong.parts["outcome"]) == (1.0, 0.0)


async def test_long_form_without_a_vital_nugget_is_right_with_all() -> None:
    task = Task("okay", "What?", nuggets=tuple(Nugget(text, "okay") for text in FACTS))
    every = dict.fromkeys(FACTS, SUPPORT)
    (right,) = await score(task, ScriptedJudge(nugget_assign=lambda r: by_fact(r, every)), rollout(SAID))
    (wrong,) = await score(task, ScriptedJudge(nugget_assign=by_fact), rollout(SAID))
    assert (right.reward, right.parts["outcome"], wrong.parts["outcome"]) == (1.0, 1.0, 0.0)


async def test_an_unanswerable_question_wants_a_refusal() -> None:
    task = Task("no", "Who?")
    refused, guessed = await score(
        task, ScriptedJudge(), rollout("## Exact Answer\nunknown"), rollout("## Exact Answer\nAnn")
    )
    assert (refused.reward, guessed.reward) == (1.0, 0.0)


# ------------------------------------------------------------------------------------------------- failures


async def test_an_unreachable_judge_masks() -> None:
    (verdict,) = await score(LONG, ScriptedJudge(nugget_assign=Status.unavailable), rollout(SAID))
    assert verdict.masked and verdict.causes["nugget"] == "test_unavailable" and "nugget" not in verdict.parts


@pytest.mark.parametrize(
    "reply",
    [Status.unjudgeable, {}, {"N1": SUPPORT}, {f"N{i}": SUPPORT for i in range(1, 6)}, {f"N{i}": "yes" for i in range(1, 5)},
     {f"N{i}": True for i in range(1, 5)}, [SUPPORT] * 4, "support", {f"N{i}": [SUPPORT] for i in range(1, 5)}],
)  # fmt: skip
async def test_a_broken_reply_never_pays(reply: object) -> None:
    (verdict,) = await score(LONG, ScriptedJudge(nugget_assign=reply), rollout(SAID))
    assert verdict.reward == 0.0 and not verdict.masked and verdict.status["nugget"] == Status.unjudgeable


async def test_one_broken_block_breaks_the_whole() -> None:
    replies = iter([{f"N{i}": SUPPORT for i in range(1, 5)}, {}])
    judge = ScriptedJudge(nugget_assign=lambda _: next(replies))
    (verdict,) = await score(LONG, judge, rollout(f"{'one ' * 60}\n\n{'two ' * 60}"), block_chars=300)
    assert verdict.reward == 0.0 and verdict.status["nugget"] == Status.unjudgeable


@pytest.mark.parametrize("order", [1, -1])
async def test_a_reply_of_no_use_is_zero_even_where_another_call_was_lost(order: int) -> None:
    replies = iter([Status.unjudgeable, Status.unavailable][::order])
    judge = ScriptedJudge(nugget_assign=lambda _: next(replies))
    (verdict,) = await score(LONG, judge, rollout(f"{'one ' * 60}\n\n{'two ' * 60}"), block_chars=300)
    assert verdict.reward == 0.0 and not verdict.masked and verdict.status["nugget"] == Status.unjudgeable


@pytest.mark.parametrize("options", [{}, {"contradiction": -1.0}, {"not_support": -0.5, "contradiction": -1.0}])
@pytest.mark.parametrize(("task", "prompt"), [(LONG, "nugget_assign"), (SHORT, "nugget_short")])
async def test_to_break_the_judge_or_to_say_nothing_pays_no_more_than_the_worst_reply(
    task: Task, prompt: str, options: dict[str, float]
) -> None:
    def worst(request: JudgeRequest) -> dict[str, str]:
        labels = request.schema["properties"]["N1"]["enum"]
        return dict.fromkeys(request.fields["nuggets"], CONTRADICTION if CONTRADICTION in labels else NOT)

    (wrong,) = await score(task, ScriptedJudge(**{prompt: worst}), rollout(SAID), **options)
    broken = ScriptedJudge(**{prompt: Status.unjudgeable})
    ways = [rollout(SAID), rollout("Solution:"), rollout(""), rollout(SAID, stop=StopReason.malformed)]
    for verdict in await score(task, broken, *ways, **options):
        assert verdict.reward == verdict.parts["nugget"] == wrong.reward and not verdict.masked


async def test_only_scores_with_values_below_0_have_a_floor_below_0() -> None:
    broken = ScriptedJudge(nugget_assign=Status.unjudgeable)
    for options in ({"score": "vital", "contradiction": -1.0}, {"not_support": 0.2, "contradiction": 0.1}):
        assert [v.reward for v in await score(LONG, broken, rollout(SAID), rollout(""), **options)] == [0.0, 0.0]


@pytest.mark.parametrize("stop", [StopReason.context_full, StopReason.turn_limit, StopReason.malformed])
async def test_what_has_no_end_is_zero_and_asks_nobody(stop: StopReason) -> None:
    judge = ScriptedJudge()
    (verdict,) = await score(LONG, judge, rollout(SAID, stop=stop))
    assert verdict.reward == 0.0 == verdict.parts["nugget"] and not judge.asked and not verdict.masked


async def test_infrastructure_is_masked() -> None:
    (verdict,) = await score(LONG, ScriptedJudge(), rollout(SAID, stop=StopReason.env_failed))
    assert verdict.masked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partial": 1.5}, "does not hold"), ({"contradiction": 0.2}, "does not hold"), ({"vital": 0.0, "okay": 0.0}, "nor both 0"),
        ({"per_call": 11}, "per_call 11"), ({"score": "best"}, "one of weighted"), ({"short_form": "perhaps"}, "short_form"),
        ({"shuffles": -1}, "shuffles"), ({"block_chars": 10}, "block_chars"), ({"prompt": "outcome"}, "takes answer.*nuggets"),
        ({"prompt": "nugget_extract"}, "such as nugget_assign"), ({"prompt": "none"}, "no judge prompt"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_reward(RewardConfig(name="nugget", nugget=NuggetConfig(**options)))
    assert "\n" not in str(caught.value)


def test_the_prompts_take_the_requests() -> None:
    for request in (
        assign_request(LONG, SAID, list(FACTS)),
        assign_request(SHORT, SAID, ["The answer is: Lyon"], short=True),
    ):
        prompt = load_prompt(request.prompt)
        text = render(prompt, request.fields)
        assert "N1: " in text and SAID in text and prompt.agent_fields == ("passage",)


# -------------------------------------------------------------------------------------------- closed worlds


async def label_of(task: Task, passage: str, index: int = 0) -> str:
    request = assign_request(task, passage, [task.nuggets[index].text])
    reply = await RuleJudge().ask(request)
    assert reply.status is Status.ok, reply
    return str(reply.value["N1"])


WORLD = build_world(WorldConfig(num_entities=40, num_tasks=30, seed=3))
TWO = next(t for t in WORLD.tasks if len(t.nuggets) == 2)


@pytest.mark.parametrize("task", WORLD.tasks[:10], ids=lambda t: t.id)
async def test_the_rule_judge_labels_by_what_is_said(task: Task) -> None:
    fact = task.nuggets[0].text
    subject, rest = fact.split("'s ", 1)
    name = rest.rstrip(".").split()[-1]
    assert await label_of(task, fact) == SUPPORT
    assert await label_of(task, f"First, {fact.rstrip('.')} [[1]({subject})], it seems.") == SUPPORT
    assert await label_of(task, fact.replace(name, "Zzz")) == CONTRADICTION
    assert (
        await label_of(task, f"{fact} {fact.replace(name, 'Zzz')}") == CONTRADICTION
    )  # naming several is no way to be right
    assert await label_of(task, fact.replace(" is ", " is not ")) == CONTRADICTION
    assert await label_of(task, fact.replace(name, "unknown")) == NOT
    assert await label_of(task, f"{subject} has to do with {name}.") == PARTIAL
    assert await label_of(task, f"{subject} is a baker. {name} is a poet.") == NOT
    assert await label_of(task, fact.replace(name, f"{name}zo")) == CONTRADICTION  # a longer name is another
    assert await label_of(task, "Nothing.") == NOT


async def test_a_world_pays_for_the_trail_that_was_told() -> None:
    facts = [n.text for n in TWO.nuggets]
    whole, half, none = await score(
        TWO,
        RuleJudge(),
        *(rollout(f"{text}\n\n## Exact Answer\n{TWO.answers[0]}") for text in (" ".join(facts), facts[1], "So it is.")),
    )
    assert (whole.reward, half.reward, none.reward) == (1.0, 0.5, 0.0)
    assert whole.parts["outcome"] == half.parts["outcome"] == none.parts["outcome"] == 1.0


async def test_short_form_in_a_world_needs_no_oracle() -> None:
    right, wrong = await score(
        SHORT, RuleJudge(), *(rollout(f"## Exact Answer\n{a}") for a in ("lyon", "Nice")), exact=False
    )
    assert (right.reward, wrong.reward) == (1.0, 0.0)


async def test_the_rule_judge_never_guesses() -> None:
    strange = Task("s", "Q?", ("a",), nuggets=(Nugget("Grass is green."),), oracle=TWO.oracle)
    for task in (strange, LONG):
        (verdict,) = await score(task, RuleJudge(), rollout("Grass is green.\n\n## Exact Answer\na"))
        assert verdict.masked


# ------------------------------------------------------------------------------------------- over the wire


async def over_the_wire(handler: Any, task: Task, *messages: str, **options: Any) -> tuple[list[Verdict], Any]:
    async with serve(handler) as endpoint:
        judge = make_judge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge", backoff_s=0.01))
        try:
            return await score(task, judge, *(rollout(m) for m in messages), **options), endpoint
        finally:
            await judge.close()


def all_supported(body: dict[str, Any], _: int) -> Any:
    wire = body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]
    return verdict_of(dict.fromkeys(wire["required"], SUPPORT))


async def test_a_chat_judge_answers_by_key() -> None:
    (verdict,), endpoint = await over_the_wire(all_supported, LONG, SAID)
    assert verdict.reward == 1.0 and len(endpoint.requests) == 1
    assert verdict.prompts["nugget_assign"].startswith(load_prompt("nugget_assign").label)


async def test_text_that_says_nothing_never_pays_whoever_judges() -> None:
    empty = [":", "Solution", "Let's think step by step.", "\uff1a", "## Exact Answer\n:"]
    for task in (LONG, SHORT):
        verdicts, endpoint = await over_the_wire(all_supported, task, *empty)
        assert [v.reward for v in verdicts] == [0.0] * len(empty) and not endpoint.requests


def test_the_recipe_says_what_is_published() -> None:
    config = load_config("nugget_4b_grpo", [], RunConfig)
    loss, learner, buffer = config.learner.loss, config.learner, config.buffer
    assert (loss.clip_low, loss.clip_high, loss.kl_coef, loss.entropy_coef) == (0.2, 0.28, 0.01, 0.01)
    assert (learner.lr, learner.warmup_steps, learner.weight_decay, learner.grad_clip, learner.minibatches) == (
        1e-6,
        10,
        0.01,
        1.0,
        2,
    )
    assert (buffer.groups_per_batch, buffer.group_size, config.train.steps, config.reward.nugget.per_call) == (
        128,
        16,
        800,
        10,
    )
    assert loss.mismatch == "none"
    assert (
        config.reward.name == "nugget" and config.reward.nugget == NuggetConfig() and config.advantage.drop_zero_spread
    )
