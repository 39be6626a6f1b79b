from __future__ import annotations

import functools
import itertools
import json
import random
import zoneinfo
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.interfaces import Services
from agents.types import Action, ActionKind, Group, Member, Nugget, StopReason, Task, ToolCall, Trajectory, Verdict
from rewards.config import RewardConfig, SlateConfig
from rewards.guards.agreement import agreement, drift
from rewards.guards.master_keys import (
    KEYS,
    TRANSLATED,
    GuardConfig,
    attack,
    is_master_key,
    says_nothing,
    variants,
)
from rewards.guards.monitors import Monitor, MonitorConfig, trend
from rewards.judges.base import JudgeConfig, make_judge
from rewards.registry import JUDGES_OUTCOME, REWARDS, make_reward
from tests.support.chat_double import serve, verdict
from tests.support.reward_cases import Gullible, group, page, rollout
from tests.support.step_cases import walk

TASK = Task(
    "t", "Capital of France?", ("Paris",), ("<E0> is the capital of France.",), (Nugget("Paris is the capital."),),
    meta={"gold_texts": ["Paris is the capital of France."], "claims": ["Paris"]},
)  # fmt: skip


async def verdicts(
    name: str, judge: Gullible, *rollouts: Trajectory, task: Task = TASK, **options: Any
) -> list[Verdict]:
    config = RewardConfig(name=name, outcome="judge" if name in JUDGES_OUTCOME else "rule", **options)
    return await make_reward(config)(group(task, *rollouts), Services(judge))


def dressed(text: str) -> list[Trajectory]:
    """The text as a whole message, under the headings a protocol asks for, and as the query of a search."""
    message = f"## Explanation with Citations\n{text} [[1](doc)]\n\n## Exact Answer\n{text}\n\n## References\n1. doc"
    shown = [page("doc", "Paris is the capital of France.")]
    plain = rollout(text, shown)
    return [
        plain,
        rollout(message, shown),
        walk((text, ["Paris is the capital."]), plain.final or pytest.fail("no action")),
    ]


@functools.cache
def armed(key: str) -> tuple[list[str], list[Trajectory]]:
    """(texts, rollouts) of all forms of a key."""
    made = [(text, t) for text in variants(key) for t in dressed(text)]
    return [text for text, _ in made], [t for _, t in made]


JUDGED = ("outcome", "carr", "nugget", "regularised", "r3_rag", "claims", "simpleqa", "slate")


@pytest.mark.parametrize("name", [*JUDGED, "utility"])
async def test_the_gullible_judge_is_fooled_by_an_ordinary_wrong_answer(name: str) -> None:
    """Else the tests below would prove nothing."""
    judge = Gullible()
    found = await verdicts(name, judge, *dressed("Lyon"))
    assert all(v.reward > 0 for v in found) and judge.asked


@pytest.mark.parametrize("name", [n for n in REWARDS if n not in ("toolrl", "stepsearch", "conduct", "verifier")])
async def test_every_master_key_scores_0_through_every_judge_based_reward(name: str) -> None:
    """Also through rewards that others add to the registry: name one here that asks no judge."""
    for key in (*KEYS, *TRANSLATED):
        judge, (texts, rollouts) = Gullible(), armed(key)
        found = await verdicts(name, judge, *rollouts)
        assert not (paid := [text for text, v in zip(texts, found, strict=True) if v.reward]), (key, paid)
        assert not any(v.masked for v in found) and all(v.parts.get("outcome", 0.0) == 0.0 for v in found)
        assert not judge.asked, (key, judge.asked[0])


@pytest.mark.parametrize(
    "text",
    [
        "ѕolution", "Soluti\u1d0fn", "Soluti0n", "<b>Solution</b>", "&nbsp;Solution", "1. Solution", "a) Solution", "Solution [1]", "Solution 1:",
        "Step 1: Solution 2", "Thought process: 1", "SolutionSolution", "letsthinkstepbystep", "解。1", "かいせつ1", "Let\u02bcs solve this problem step by step.",
        "Approach:", "Sure, my approach is this:", "**Soluzione:**", "Çözüm:", "Lời giải：", "الحل:", "Ratkaisu:\n\nRatkaisu:", "Approach 1:",
        "```text\nSolution\n```", "<think></think>Solution", "[Solution](https://x.org)", "S.o.l.u.t.i.o.n", "\\begin{align}Solution\\end{align}",
    ],
)  # fmt: skip
def test_dress_does_not_help_a_key(text: str) -> None:
    assert is_master_key(text)


def says_yes(body: dict[str, Any], n: int) -> Any:
    """A gullible endpoint; as a reader it is right once it is shown the page."""
    wanted = body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]
    reads = set(wanted["properties"]) == {"answer"}
    blind = reads and "Paris is the capital" not in json.dumps(body["messages"])
    return verdict({"answer": None} if blind else Gullible.best(wanted))


@pytest.mark.parametrize("name", [*JUDGED, "utility"])
async def test_through_a_real_client_a_gullible_endpoint_pays_for_an_answer_and_for_no_key(name: str) -> None:
    async with serve(says_yes) as endpoint:
        judge = make_judge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge"))
        found = await verdicts(name, judge, *dressed("Lyon"))  # type: ignore[arg-type]
        assert all(v.reward > 0 and not v.status for v in found)
        asked = len(endpoint.requests)
        for key in KEYS:
            found = await verdicts(name, judge, *dressed(key))  # type: ignore[arg-type]
            assert [v.reward for v in found] == [0.0, 0.0, 0.0] and not any(v.masked for v in found)
        assert asked > 0 and len(endpoint.requests) == asked
        await judge.close()


async def test_a_key_as_a_thought_a_query_or_an_answer_is_the_worst_step_there_is() -> None:
    def candidates(text: str) -> Group:
        search = Action(ActionKind.call, (ToolCall("search", {"query": text}),), thought=text)
        final = Action(ActionKind.answer, thought=text, message=text, answer=text)
        return Group("g", TASK, tuple(Member(walk(action), first_turn=1) for action in (search, final)))

    reward = make_reward(RewardConfig(name="slate", slate=SlateConfig(early_bonus=0.0)))
    async with serve(says_yes) as endpoint:
        judge = make_judge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge"))
        paid = await reward(candidates("Lyon"), Services(judge))
        assert all(v.reward > 0 and not v.status for v in paid)
        asked = len(endpoint.requests)
        for key in KEYS:
            found = await reward(candidates(key), Services(judge))
            assert [v.reward for v in found] == [-2.0, -2.0] and not any(v.masked for v in found)
        assert asked > 0 and len(endpoint.requests) == asked
        await judge.close()


async def test_attack_reports_a_rate_per_key_and_the_guard_passes_the_gate() -> None:
    async def through_the_guard(text: str) -> bool:
        (found,) = await verdicts("outcome", Gullible(), rollout(f"## Exact Answer\n{text}"))
        return found.reward > 0

    async def colon_lover(text: str) -> bool:
        return ":" in text

    rates = await attack(through_the_guard)
    assert set(rates) == {*KEYS, *TRANSLATED} and max(rates.values()) <= 0.01
    fooled = await attack(colon_lover)
    assert fooled["Thought process:"] > 0.5 and fooled["Solution"] == 0.0
    assert len(KEYS) == 10 and all(len(set(variants(key))) > 5 for key in KEYS)


async def test_the_unguarded_reward_is_fooled_so_the_guard_is_what_helps() -> None:
    (found,) = await verdicts("outcome", Gullible(), rollout("Solution"), guard=GuardConfig(master_keys=False))
    assert found.reward == 1.0


async def test_only_the_keyed_members_of_a_group_are_silenced() -> None:
    judge = Gullible()
    keyed, fine, masked = await verdicts(
        "carr",
        judge,
        rollout("## Exact Answer\nSolution:"),
        rollout("## Exact Answer\nParis"),
        rollout("", stop=StopReason.env_failed),
    )
    assert (keyed.reward, fine.reward) == (0.0, 1.0) and masked.masked
    assert {"outcome", "rubric"} <= set(keyed.parts)  # C-GRPO can read it
    assert keyed.evidence[-1] == {"check": "master_key", "answer": "Solution:", "reason": "the answer has no content"}
    assert all("Solution" not in json.dumps(dict(r.fields)) for r in judge.asked)


# Answers a person might give. The last lines are titles made of opener words, which are as rare among real answers.
LEGITIMATE = """42|-5|3.14|1969|12,000|0|7 %|€ 5|$3.5 million|½|10^6|x = 3|1/3|N/2|π|Ω|B|A+|C++|C#|.NET|F|X|Y2K|R2-D2|No. 5|3M|7-Eleven
Yes|no|None|unknown|both|neither|true|false|left|red|north-west|about 30|twice|never|five|a dozen|the second|in 1912|May 5, 1821|5th century BC
Paris|The Hague|New York City|Saint-Étienne|São Paulo|Malmö|Łódź|İzmir|Кирилл|Αθήνα|القاهرة|ירושלים|दिल्ली|กรุงเทพ|서울|東京|北京|ハノイ|解放军|答謝
Ann|Bo|Li|O'Neill|Jr.|J. R. R. Tolkien|Dr. No|will.i.am|k.d. lang|Ke$ha|P!nk|The Who|U2|Yes (band)|ABBA|AC/DC|M.I.A.|Will Smith|Grace Kelly
Mount Everest|Lake Superior|the Nile|Route 66|Apollo 11|Boeing 747|HMS Beagle|H2O|CO2|NaCl|E. coli|T. rex|DNA|oak|granite|helium|iron|jazz|chess
Final Fantasy VII|The Answer Is Blowin' in the Wind|Solution Tree Press|Explanation of Benefits|Problem Child|Step Brothers|Final Destination|Thinking, Fast and Slow
The Thought Gang|The Problem of Pain|Reasoning About Uncertainty|Process Theology|Critique of Pure Reason|Thus Spoke Zarathustra|Now, Voyager
The answer is 42|Answer: 7|It is 5|Final answer: 12|the answer is 答え 3|答案是5|2.|(4)|Step 1969|<vector>|\\boxed{\\pi}|<b>Nile</b>|AT&T|R&amp;B|1s
α|ν|А|Weil am Rhein|Stepan|Works|Тесла|Ростов|Όσλο|Århus|Ørsted|a.m.|U.S.|1. FC Köln|A. A. Milne|J. S. Bach|[Nile](http://x.org)
http://example.org|a@b.org|ISBN 0-19|10:30|4 p.m.|-40 °C|53° N|km/h|3:2|{1, 2}|[0, 1]|f(x)|E = mc²|3×10⁸ m/s|1️⃣ one|#1|@home|C-3PO
Mission: Impossible|2001: A Space Odyssey|Matthew 5:3|16:9|std::vector|C:|Jeopardy!|Age: 42|It is 5:|Sure Thing|Approach Lighting System
Let It Be|It Follows|The Final Problem""".replace("\n", "|").split("|")  # fmt: skip


def short_answers() -> list[str]:
    rng = random.Random(0)
    places = [name.split("/")[-1].replace("_", " ") for name in zoneinfo.available_timezones()]
    numbers = [
        rng.choice(["{}", "{} km", "{}%", "${}", "the {}th", "{} BC"]).format(rng.randint(0, 9999)) for _ in range(300)
    ]
    names = [
        "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))).title()
        for _ in range(300)
    ]
    return list(dict.fromkeys([*places, *numbers, *names, *LEGITIMATE]))


def test_at_most_one_legitimate_answer_in_a_hundred_is_taken_for_a_key() -> None:
    other = Task("o", "q?", ("something else",))
    answers = short_answers()
    wrong = [a for a in answers if says_nothing(other, rollout(f"## Exact Answer\n{a}"))]
    by_hand = [a for a in LEGITIMATE if says_nothing(other, rollout(f"## Exact Answer\n{a}"))]
    assert len(answers) > 1000 and len(wrong) <= 0.01 * len(answers), wrong
    assert set(by_hand) <= {"Let It Be", "It Follows", "The Final Problem"}


@pytest.mark.parametrize("gold", ["Let It Be", "It", "解", "∞", "+", ":)", "Step by Step", *LEGITIMATE])
def test_a_right_answer_is_never_taken_for_a_key(gold: str) -> None:
    task = Task("o", "q?", (gold,))
    assert not says_nothing(task, rollout(f"## Exact Answer\n{gold}"))


def test_what_passes_and_what_is_looked_at() -> None:
    assert not says_nothing(TASK, rollout("## Exact Answer\n:)"), allow=[":)"])
    assert says_nothing(TASK, rollout("## Exact Answer\n:)"))
    assert not says_nothing(TASK, rollout("## Exact Answer\nunknown"))
    assert not says_nothing(TASK, rollout("The capital is Paris."))
    assert says_nothing(TASK, rollout("The capital is Paris [[1](doc)].\n\n## Exact Answer\nThought process:"))
    assert says_nothing(TASK, rollout("[[1](https://a.very/long/address)]"))
    assert not says_nothing(TASK, rollout("Solution", stop=StopReason.turn_limit))  # scored 0 by its ending


# -------------------------------------------------------------------------------------------------------- monitors


def test_trend_worked_example() -> None:
    rising = trend([1, 2, 3, 4, 5])
    assert rising.change == 4.0 and rising.z == pytest.approx(9 / (5 * 4 * 15 / 18) ** 0.5)
    assert trend([5, 4, 3, 2, 1]).z == -rising.z
    assert trend([0.5] * 9) == trend([1, 2, 3]) == trend([])


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [1, 1, 2, 2, 3], [1, 1, 1, 2, 3, 3]])
def test_the_variance_behind_z_is_that_over_all_orders(values: list[float]) -> None:
    n = len(values)
    s = [sum(np.sign(p[j] - p[i]) for i in range(n) for j in range(i + 1, n)) for p in itertools.permutations(values)]
    highest = trend(sorted(values))
    assert highest.z == pytest.approx((max(s) - 1) / np.std(s))


def test_trends_in_noise_are_as_rare_as_stated() -> None:
    rng = np.random.default_rng(0)
    z = np.array([trend(rng.random(20)).z for _ in range(2000)])
    assert np.mean(z >= 2.33) < 0.02 and np.mean(z <= -2.33) < 0.02 and abs(np.mean(z)) < 0.1


def run(rows: list[dict[str, float]], monitor: Monitor | None = None) -> list[tuple[int, str]]:
    monitor = monitor or Monitor(MonitorConfig())
    return [(i, alarm.kind) for i, row in enumerate(rows) for alarm in monitor.update(row)]


def rows(outcome: np.ndarray, rubric: np.ndarray, tokens: np.ndarray | None = None) -> list[dict[str, float]]:
    tokens = np.full(len(outcome), 500.0) if tokens is None else tokens
    return [
        {"reward/outcome": o, "reward/rubric": r, "episode/sampled_tokens": t}
        for o, r, t in zip(outcome, rubric, tokens, strict=True)
    ]


def test_the_shortcut_signature_raises_an_alarm_and_honest_learning_does_not() -> None:
    rng = np.random.default_rng(1)
    up, noise = np.linspace(0.2, 0.8, 60), lambda: rng.normal(0, 0.03, 60)
    shortcut = run(rows(up + noise(), np.linspace(0.6, 0.2, 60) + noise()))
    assert [kind for _, kind in shortcut] == ["shortcut"] and shortcut[0][0] < 40
    assert not run(rows(up + noise(), up + noise()))
    assert not run(rows(up + noise(), 0.5 + noise()))
    assert not run(rows(up[::-1] + noise(), up[::-1] + noise()))  # all fall together: a bad run, no shortcut
    assert not run(rows(up + noise(), np.full(60, np.nan)))
    assert not run([{"reward/outcome": None}, {}])  # type: ignore[dict-item]


@pytest.mark.parametrize("evidence", ["rubric", "nugget", "relevance", "gain", "mine"])
def test_the_evidence_that_is_watched_is_that_of_the_reward(evidence: str) -> None:
    up = np.linspace(0.2, 0.8, 30)
    seen = [{"reward/outcome": o, f"reward/{evidence}": 1 - o} for o in up]
    assert [kind for _, kind in run(seen)] == ([] if evidence == "mine" else ["shortcut"])
    assert [kind for _, kind in run(seen, Monitor(MonitorConfig(evidence=[f"reward/{evidence}"])))] == ["shortcut"]


def test_a_monitor_that_could_never_alarm_is_refused() -> None:
    MonitorConfig().check()
    MonitorConfig(window=6).check()
    with pytest.raises(ValueError, match=r"monitor\.window 5 is too short .* set it to 6 or more"):
        MonitorConfig(window=5).check()
    for bad in ({"z": 0.0}, {"change": np.nan}, {"growth": 1.0}, {"collapse": -0.1}, {"min_distinct": 2.0}):
        with pytest.raises(ValueError, match=rf"monitor\.{next(iter(bad))} .* out of range"):
            MonitorConfig(**bad).check()


def test_false_alarms_in_flat_runs_are_rare() -> None:
    rng = np.random.default_rng(2)
    alarms = sum(bool(run(rows(rng.normal(0.5, 0.1, 60), rng.normal(0.5, 0.1, 60)))) for _ in range(100))
    assert alarms <= 1


def test_length_and_repetition() -> None:
    rng = np.random.default_rng(3)
    up, flat = np.linspace(0.2, 0.9, 60), rng.normal(0.5, 0.01, 60)
    shrinking = np.concatenate([np.full(20, 500.0), np.linspace(500, 20, 20), np.full(20, 20.0)])
    assert [k for _, k in run(rows(up, flat, shrinking))] == ["collapse"]
    assert not run(rows(flat, flat, shrinking))  # shorter, and not paid for it
    assert [k for _, k in run(rows(flat, flat, np.linspace(100, 900, 60)))] == ["growth"]
    begins = [{"reward/distinct": 0.9}] * 30 + [{"reward/distinct": 0.1}] * 30
    assert [k for _, k in run(begins)] == ["repetition"]


def test_an_alarm_is_said_when_it_begins_and_again_after_it_was_quiet() -> None:
    loud, quiet = [{"reward/distinct": 0.1}] * 40, [{"reward/distinct": 0.9}] * 40
    assert [k for _, k in run([*loud, *quiet, *loud])] == ["repetition", "repetition"]


def test_a_judge_that_agrees_with_itself_less_than_at_the_start_is_drift() -> None:
    rng = np.random.default_rng(4)
    steady, worse = rng.normal(0.9, 0.02, 60), rng.normal(0.8, 0.02, 30)
    found = run([{"reward/consistency": x} for x in (*steady, *worse)])
    assert [kind for _, kind in found] == ["drift"] and 60 < found[0][0] < 80
    assert not run([{"reward/consistency": x} for x in rng.normal(0.9, 0.02, 90)])
    assert not run([{"reward/consistency": x} for x in (0.5, 0.9) * 15])  # fewer rows than two windows
    mine = Monitor(MonitorConfig(steady=["judge/mine"]))
    assert [kind for _, kind in run([{"judge/mine": x} for x in (*steady, *worse)], mine)] == ["drift"]


# ------------------------------------------------------------------------------------------------------- agreement


def test_agreement_worked_example() -> None:
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = agreement(a, b)
    assert found.share == 0.7 and found.kappa == pytest.approx(0.4)
    assert found.share_low < 0.7 < found.share_high and 0.1 < found.kappa_low < 0.4 < found.kappa_high < 0.7
    assert agreement([1, 1], [1, 1]).kappa == 1.0 and agreement([1, 0], [0, 1]).kappa == -1.0
    with pytest.raises(ValueError, match="not 0 and 0"):
        agreement([], [])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_agreement_is_symmetric_and_knows_chance(pairs: list[tuple[int, int]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    n = len(pairs)
    found, turned = agreement(a, b, 50), agreement(b, a, 50)
    same = sum(x == y for x, y in pairs) / n
    chance = sum(a.count(k) * b.count(k) for k in range(3)) / n**2
    assert found.kappa == pytest.approx((same - chance) / (1 - chance) if chance < 1 else 1.0)
    assert found.kappa == pytest.approx(turned.kappa) and found.share == turned.share == pytest.approx(same)


def test_the_interval_of_kappa_holds_the_truth_about_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for i in range(200):
        truth = rng.random(150) < 0.5
        other = np.where(rng.random(150) < 0.2, ~truth, truth)  # kappa 0.6
        found = agreement(truth.tolist(), other.tolist(), 400, seed=i)
        held += found.kappa_low <= 0.6 <= found.kappa_high
    assert held >= 180


def test_drift_worked_example() -> None:
    before, now = [0.0] * 5000 + [1.0] * 5000, [0.0] * 8000 + [1.0] * 2000
    found = drift(before, now)
    assert found.psi == pytest.approx(0.4159, abs=1e-3) and found.ks == pytest.approx(0.3) and found.p < 1e-6
    same = drift(before, before)
    assert same.psi == same.ks == 0.0 and same.p == 1.0
    with pytest.raises(ValueError, match="both windows"):
        drift([], [1.0])


def test_drift_against_brute_force_and_its_p_value_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    low = 0
    for _ in range(300):
        x, y = rng.random(60), rng.random(80)
        found = drift(x.tolist(), y.tolist())
        steps = [abs(np.mean(x <= t) - np.mean(y <= t)) for t in [*x, *y]]
        assert found.ks == pytest.approx(max(steps)) and found.psi >= 0
        low += found.p < 0.05
    assert low / 300 < 0.08
    assert drift(rng.random(200).tolist(), (rng.random(200) ** 2).tolist()).psi > 0.1
    assert drift([0.1] * 50, [0.9] * 50).psi > 1 and np.isfinite(drift([0.1] * 50, [0.9] * 50).psi)
