from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.interfaces import Services
from agents.types import Group, Status, StopReason, Task, Verdict
from rewards.combine import COMBINERS, CombineConfig, combined, gated, hierarchical, weighted
from rewards.config import RewardConfig
from rewards.registry import REWARDS, make_reward
from tests.support.reward_cases import ScriptedJudge, group, rollout

TASK = Task("t", "Capital of France?", ("Paris",))
CLEAN = CombineConfig("gated", weights={"good": 1.0})
shares = st.floats(0, 1)


def bottom(*scores: float, **options: object) -> float:
    names = [f"b{i}" for i in range(len(scores))]
    config = CombineConfig("gated", weights={"good": 1.0}, bottom_line=names, **options)  # type: ignore[arg-type]
    return gated({"good": 1.0, **dict(zip(names, scores, strict=True))}, config)


# ------------------------------------------------------------------------------------------------------ SearchLLM


def test_searchllm_worked_example() -> None:
    assert bottom(1, 1, 1) == 1.0 and bottom() == 1.0
    assert bottom(0) == pytest.approx(0.0099, abs=5e-5)
    assert bottom(0, 1, 1) == pytest.approx(0.2147, abs=5e-5)
    assert bottom(0, *[1] * 8) == pytest.approx(0.5988, abs=5e-5)
    assert bottom(0.5, 1, 1) == pytest.approx(0.7963, abs=5e-5)


def test_soft_gate_lets_a_rich_violation_beat_a_poor_clean_answer_and_the_hard_gate_does_not() -> None:
    names = [f"b{i}" for i in range(9)]
    clean = {"good": 0.59, **dict.fromkeys(names, 1.0)}
    dirty = {"good": 1.0, **dict.fromkeys(names, 1.0), "b3": 0.0}
    soft = CombineConfig("gated", weights={"good": 1.0}, bottom_line=names)
    hard = CombineConfig("gated", weights={"good": 1.0}, bottom_line=names, mode="hard")
    assert gated(dirty, soft) > gated(clean, soft)
    assert gated(dirty, hard) == 0.0 < gated(clean, hard) == gated(clean, soft)


def test_behaviour_is_a_weighted_mean() -> None:
    config = CombineConfig("gated", weights={"a": 3.0, "b": 1.0})
    assert gated({"a": 1.0, "b": 0.0}, config) == 0.75


# -------------------------------------------------------------------------------------------------- ChatShopBuddy


def levels(l1: float, l2: float, efficiency: float = 0.0, **parts: float) -> float:
    config = CombineConfig("hierarchical", bottom_line=list(parts))
    return hierarchical({"outcome": l1, "rubric": l2, "efficiency": efficiency, **parts}, config)


def test_hierarchical_worked_example() -> None:
    assert levels(0, 1) <= levels(1, 0)  # a failed level is never made up for by the one above it
    assert levels(0.9, 0.0, 1.0) == levels(0.9, 1.0, 1.0) == pytest.approx(0.45)
    assert levels(1, 0.4, 1.0) == pytest.approx(0.5 + 0.16)
    assert levels(1, 0.5, 0.5) == pytest.approx(0.5 + 0.2 + 0.05)
    assert levels(1, 1, 1) == pytest.approx(1.0)
    assert levels(1, 1, 1, format=0.0) == 0.0 and levels(1, 1, 1, format=1.0) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------ invariants


@settings(deadline=None)
@given(
    st.sampled_from(sorted(COMBINERS)),
    st.lists(shares, min_size=3, max_size=3),
    shares,
    st.integers(0, 2),
    st.booleans(),
)
def test_no_part_lowers_the_reward_by_rising(
    name: str, scores: list[float], more: float, which: int, hard: bool
) -> None:
    config = CombineConfig(
        name, weights={"outcome": 0.7, "rubric": 0.3}, bottom_line=["efficiency"] if name == "gated" else [],
        mode="hard" if hard else "soft",
    )  # fmt: skip
    names = ["outcome", "rubric", "efficiency"]
    low, high = dict(zip(names, scores, strict=True)), dict(zip(names, scores, strict=True))
    high[names[which]] = max(more, scores[which])
    assert 0 <= COMBINERS[name](low, config) <= COMBINERS[name](high, config) + 1e-12 <= 1 + 1e-9


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (CombineConfig("best"), "unknown; one of weighted, gated, hierarchical"),
        (CombineConfig("weighted"), "sum to 0"),
        (CombineConfig("weighted", weights={"a": -1.0, "b": 2.0}), "negative"),
        (CombineConfig("gated", weights={"a": 1.0}, mode="medium"), "one of soft, hard"),
        (CombineConfig("gated", weights={"a": 1.0}, damping=0.0), "not positive"),
        (CombineConfig("hierarchical", levels=["a"]), "two or three parts"),
        (CombineConfig(rewards=["conduct"]), "needs reward.combine.name"),
        (
            CombineConfig("weighted", weights={"a": 1.0}, rewards=["conducts"]),
            "'conducts' is unknown; one of outcome, carr",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(config: CombineConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        make_reward(RewardConfig(combine=config))
    assert "\n" not in str(error.value)


def test_a_part_nobody_gives_and_a_part_that_is_no_share_are_named() -> None:
    with pytest.raises(ValueError, match=r"'rubrics', which no reward gives; there are outcome, rubric"):
        weighted({"outcome": 1.0, "rubric": 1.0}, CombineConfig("weighted", weights={"rubrics": 1.0}))
    with pytest.raises(ValueError, match="only parts in"):
        gated({"good": 3.0}, CLEAN)


# ------------------------------------------------------------------------------------------------- several rewards


def fixed(*verdicts: Verdict) -> object:
    async def score(group: Group, services: Services) -> list[Verdict]:
        return list(verdicts)

    return score


async def test_several_rewards_become_one() -> None:
    config = RewardConfig(
        name="outcome",
        combine=CombineConfig("gated", rewards=["conduct"], weights={"outcome": 1.0}, bottom_line=["format", "length"]),
    )
    right, wrong, broken = await make_reward(config)(
        group(
            TASK, rollout("## Exact Answer\nParis"), rollout("## Exact Answer\nLyon"), rollout("x", stop=StopReason.malformed)
        ),
        Services(),
    )  # fmt: skip
    assert (right.reward, wrong.reward, broken.reward) == (1.0, 0.0, 0.0)
    assert {"outcome", "f1", "format", "length", "distinct", "efficiency"} <= set(right.parts)
    assert right.evidence[0]["check"] == "outcome"


async def test_a_masked_part_masks_and_its_cause_is_kept() -> None:
    first = Verdict(1.0, {"outcome": 1.0}, status={"x": Status.unjudgeable}, causes={"x": "bad"})
    second = Verdict(0.0, {}, status={"rubric": Status.unavailable}, causes={"rubric": "timeout"})
    config = CombineConfig("weighted", weights={"outcome": 1.0, "rubric": 1.0})
    for pair in ((first, second), (second, first)):
        (verdict,) = await combined([fixed(v) for v in pair], config)(group(TASK, rollout("x")), Services())  # type: ignore[arg-type]
        assert verdict.masked and verdict.reward == 0.0
        assert verdict.causes == {"x": "bad", "rubric": "timeout"}


async def test_of_one_name_the_first_part_counts_and_unavailable_is_never_hidden() -> None:
    first = Verdict(0.0, {"outcome": 1.0}, step_rewards=(1.0, 2.0))
    second = Verdict(0.0, {"outcome": 0.0}, step_rewards=(3.0, 4.0), status={"outcome": Status.unavailable})
    config = CombineConfig("weighted", weights={"outcome": 1.0})
    (verdict,) = await combined([fixed(first)], config)(group(TASK, rollout("x")), Services())  # type: ignore[arg-type]
    assert verdict.reward == 1.0 and verdict.step_rewards == (1.0, 2.0)
    for pair in ((first, second), (second, first)):
        (verdict,) = await combined([fixed(v) for v in pair], config)(group(TASK, rollout("x")), Services())  # type: ignore[arg-type]
        assert verdict.masked
    # a second opinion that failed does not make the counted one look broken
    failed = Verdict(0.0, {"outcome": 0.0}, status={"outcome": Status.unjudgeable})
    (verdict,) = await combined([fixed(first), fixed(failed)], config)(group(TASK, rollout("x")), Services())  # type: ignore[arg-type, list-item]
    assert verdict.reward == 1.0 and not verdict.status
    dull = Verdict(0.0, {"outcome": 0.0}, status={"outcome": Status.unjudgeable})
    for pair in ((second, dull), (dull, second)):
        (verdict,) = await combined([fixed(v) for v in pair], config)(group(TASK, rollout("x")), Services())  # type: ignore[arg-type]
        assert verdict.masked


async def test_rubrics_of_wrong_rollouts_are_judged_when_a_combiner_may_pay_for_them() -> None:
    mixed = RewardConfig(combine=CombineConfig("weighted", weights={"outcome": 0.7, "rubric": 0.3}))
    assert RewardConfig().lazy and not mixed.lazy


async def test_a_reward_of_your_own_can_be_registered_and_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "short", lambda config: fixed(Verdict(1.0, {"short": 1.0})))
    config = RewardConfig(
        name="short", combine=CombineConfig("weighted", rewards=["outcome"], weights={"short": 1.0, "outcome": 2.0})
    )
    (verdict,) = await make_reward(config)(group(TASK, rollout("## Exact Answer\nParis")), Services(ScriptedJudge()))
    assert verdict.reward == 3.0
