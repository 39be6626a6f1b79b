"""Advantages: the worked examples of the papers, masked members, and what reaches the learner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.advantages import (
    ADVANTAGES,
    AdvantageConfig,
    batch_samples,
    cgrpo_rewards,
    group_advantages,
    to_samples,
)
from agents.types import (
    Action,
    ActionKind,
    Generation,
    Group,
    Identity,
    Member,
    RecordError,
    Role,
    Sampling,
    Span,
    Status,
    StopReason,
    Task,
    Trajectory,
    Turn,
    Uid,
    Verdict,
    Version,
)
from tests.builders import a_stepped_group

CONFIG = AdvantageConfig()
TASK = Task("t", "Who?", answers=("x",))
CENTRED = sorted(set(ADVANTAGES) - {"raft"})


def trajectory(
    verdict: Verdict | None,
    attempt: int = 0,
    stop: StopReason = StopReason.answered,
    prompt: tuple[int, ...] = (1, 2, 3),
) -> Trajectory:
    """prompt (3), policy (2, version 4), observation (2), policy (3, versions 4 then 5)."""

    def speak(id: int, ids: tuple[int, ...], spans: tuple[Span, ...]) -> Turn:
        generation = Generation(ids, tuple(-0.5 for _ in ids), spans, "stop")
        return Turn.sampled(id, id - 1, generation, Action(ActionKind.call))

    turns = (
        Turn.given(0, -1, Role.prompt, prompt),
        speak(1, (10, 11), (Span(0, 2, Version(0, 4)),)),
        Turn.given(2, 1, Role.observation, (20, 21)),
        speak(3, (12, 13, 14), (Span(0, 1, Version(0, 4)), Span(1, 3, Version(0, 5)))),
    )
    identity = Identity("run", Uid("t", "g", attempt), "tools", "tok", "tpl", Sampling(temperature=0.7))
    return Trajectory(identity, turns, stop, verdict=verdict)


def group(*verdicts: Verdict, first_turn: int = 0, stops: dict[int, StopReason] | None = None) -> Group:
    stops = stops or {}
    members = tuple(
        Member(trajectory(v, i, stops.get(i, StopReason.answered)), first_turn) for i, v in enumerate(verdicts)
    )
    return Group("g", TASK, members)


def rewards(*values: float) -> Group:
    return group(*(Verdict(v, {"outcome": float(v > 0.5), "rubric": v}) for v in values))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1, -1 / 3, -1 / 3, -1 / 3]),
        ("grpo", [1.5, -0.5, -0.5, -0.5]),
    ],
)
def test_one_success_among_four(name: str, expected: list[float]) -> None:
    found = ADVANTAGES[name](np.array([1.0, 0, 0, 0]), CONFIG)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cgrpo_follows_the_papers_figure() -> None:
    outcome, rubric = [1, 1, 0], [0.375, 0.625, 0.125]
    np.testing.assert_allclose(cgrpo_rewards(outcome, rubric), [0.7 + 0.3 * 0.6, 1.0, 0.0])
    np.testing.assert_allclose(cgrpo_rewards(outcome, rubric, normalise="raw"), [0.8125, 0.8875, 0.0])


def test_cgrpo_variants() -> None:
    outcome, rubric = [1, 0, 1], [0.25, 1.0, 0.5]
    np.testing.assert_allclose(cgrpo_rewards(outcome, rubric), [0.775, 0, 0.85])
    np.testing.assert_allclose(cgrpo_rewards(outcome, rubric, normalise="correct"), [0.85, 0, 1.0])
    np.testing.assert_allclose(cgrpo_rewards(outcome, rubric, correct_only=False), [0.775, 0.3, 0.85])
    np.testing.assert_allclose(cgrpo_rewards(outcome, rubric, void_G=[False, True, False]), [0.85, 0, 1.0])
    np.testing.assert_allclose(cgrpo_rewards([1, 0], [0, 0]), [0.7, 0])
    with pytest.raises(ValueError, match="normalise 'best'"):
        cgrpo_rewards(outcome, rubric, normalise="best")


@settings(deadline=None)  # a busy machine is no mistake of the arithmetic
@pytest.mark.parametrize("name", CENTRED)
@given(value=st.floats(-1e3, 1e3), size=st.integers(1, 9))
def test_equal_rewards_and_single_members_teach_nothing(name: str, value: float, size: int) -> None:
    assert not ADVANTAGES[name](np.full(size, value), CONFIG).any()


@settings(deadline=None)  # a busy machine is no mistake of the arithmetic
@pytest.mark.parametrize("name", CENTRED)
@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=8), shift=st.floats(-5, 5))
def test_advantages_centre_and_ignore_a_shift(name: str, values: list[float], shift: float) -> None:
    config = AdvantageConfig(eps=1e-2)  # a large eps: the identity must not hang on tiny spreads
    base = ADVANTAGES[name](np.array(values), config)
    assert abs(base.sum()) < 1e-6
    np.testing.assert_allclose(ADVANTAGES[name](np.array(values) + shift, config), base, atol=1e-6)
    assert np.all(
        np.argsort(values, kind="stable")[-1:] == np.argsort(base, kind="stable")[-1:]
    ) or base.max() == pytest.approx(base[int(np.argmax(values))])


def test_raft_accepts_right_rollouts_and_nothing_else_counts() -> None:
    config = AdvantageConfig("raft")
    scored = group(
        Verdict(0.3, {"outcome": 1.0, "rubric": 0.0}), Verdict(0.9, {"outcome": 0.0, "rubric": 1.0}),
        Verdict.unavailable("outcome", "judge_timeout"), Verdict(0.9, {"outcome": 0.9}),
    )  # fmt: skip
    assert group_advantages(scored, config) == [1.0, 0.0, None, 0.0]
    right = group(Verdict(1.0, {"outcome": 1.0}), Verdict(1.0, {"outcome": 1.0}))
    assert group_advantages(right, config) == [1.0, 1.0]  # no baseline: a group of right ones still teaches
    assert [s.advantages.max() for s in to_samples(right, config)[0]] == [1.0, 1.0]
    with pytest.raises(RecordError, match=r"raft needs the verdict parts outcome; .* lacks outcome"):
        group_advantages(group(Verdict(1.0, {"f1": 1.0})), config)
    with pytest.raises(ValueError, match="drop_zero_spread"):
        group_advantages(right, AdvantageConfig("raft", drop_zero_spread=True))


def test_raft_has_the_gradient_of_the_log_likelihood_of_accepted_samples() -> None:
    torch = pytest.importorskip("torch")
    from agents.learning.config import LossConfig
    from agents.learning.loss import Tokens, clipped

    logprobs = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    tokens = Tokens(torch.tensor([-0.4, -1.3, -2.0]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]))
    loss, _ = clipped(logprobs, torch.zeros(3), tokens, LossConfig(mismatch="none"))
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-1.0, -1.0, 0.0]


def test_masked_members_leave_the_baseline() -> None:
    scored = group(Verdict(1.0), Verdict.unavailable("outcome", "judge_timeout"), Verdict(0.0), Verdict(0.0))
    advantages = group_advantages(scored, AdvantageConfig("dr_grpo"))
    assert advantages[1] is None
    np.testing.assert_allclose([advantages[0], advantages[2], advantages[3]], [2 / 3, -1 / 3, -1 / 3])
    samples, stats = to_samples(scored, AdvantageConfig("dr_grpo"))
    assert [s.rollout_id for s in samples] == ["t/g/0", "t/g/2", "t/g/3"]
    assert stats.masked == {"judge_timeout": 1}


def test_texts_that_no_judge_could_judge_are_counted_by_cause() -> None:
    broken = Verdict(0.0, {"outcome": 0.0}, status={"outcome": Status.unjudgeable}, causes={"outcome": "judge_timeout"})
    hollow = replace(broken, causes={"outcome": "hollow_text"})
    whole = group(Verdict(1.0), broken, hollow, broken)
    lost = group(broken, Verdict.unavailable("outcome", "judge_timeout"))
    _, summary = batch_samples([whole, lost], AdvantageConfig("dr_grpo"))
    assert (summary["unjudgeable/judge_timeout"], summary["unjudgeable/hollow_text"]) == (3.0, 1.0)
    assert (summary["unjudgeable/share"], summary["masked/share"]) == (pytest.approx(4 / 6), pytest.approx(1 / 6))
    _, summary = batch_samples([group(Verdict(1.0))], AdvantageConfig("dr_grpo"))
    assert summary["unjudgeable/share"] == 0.0


def test_infrastructure_endings_are_masked_even_without_a_verdict() -> None:
    scored = group(Verdict(1.0), Verdict(0.0), Verdict(0.0), stops={2: StopReason.env_failed})
    lost = Member(trajectory(None, 3, StopReason.aborted))
    scored = Group("g", TASK, (*scored.members, lost))
    samples, summary = batch_samples([scored], AdvantageConfig("dr_grpo"))
    assert [float(s.advantages.max() + s.advantages.min()) for s in samples] == [0.5, -0.5]
    assert summary["masked/env_failed"] == summary["masked/aborted"] == 1
    assert summary["masked/share"] == 0.5
    assert summary["reward/mean"] == 0.5


def test_unscored_group_is_refused() -> None:
    with pytest.raises(RecordError, match="not been scored"):
        group_advantages(Group("g", TASK, (Member(trajectory(None)),)), CONFIG)


def test_cgrpo_recombines_parts_and_voids_overlong() -> None:
    parts = [(1.0, 0.375), (1.0, 0.625), (0.0, 0.125), (1.0, 1.0)]
    scored = group(*(Verdict(9.0, {"outcome": o, "rubric": r}) for o, r in parts), stops={3: StopReason.context_full})
    samples, _ = to_samples(scored, AdvantageConfig("c_grpo"))
    np.testing.assert_allclose([s.reward for s in samples], [0.88, 1.0, 0.0, 0.0])


def test_rubric_metrics_are_means_over_members_whose_rubrics_were_judged() -> None:
    judged = Verdict(1.0, {"outcome": 1.0, "rubric": 0.5, "cited_pages": 4.0, "rubric_judged": 1.0})
    skipped = Verdict(0.0, {"outcome": 0.0, "rubric": 0.0, "cited_pages": 0.0, "rubric_judged": 0.0})
    found = batch_samples([group(judged, skipped), group(skipped, skipped), rewards(0.75)], CONFIG)[1]
    assert found["reward/rubric"] == pytest.approx((0.5 + 0.75) / 2) and found["reward/cited_pages"] == 4.0
    assert found["reward/rubric_judged"] == 0.25 and found["reward/outcome"] == pytest.approx(2 / 5)
    assert "reward/rubric" not in batch_samples([group(skipped, skipped)], CONFIG)[1]


def test_cgrpo_names_the_missing_part() -> None:
    with pytest.raises(RecordError, match="rubric"):
        group_advantages(
            group(Verdict(1.0, {"outcome": 1.0}), Verdict(0.0, {"outcome": 0.0})), AdvantageConfig("c_grpo")
        )


def test_samples_train_only_what_the_policy_said() -> None:
    sample = to_samples(rewards(1.0, 0.0), CONFIG)[0][0]
    assert sample.mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert sample.versions.tolist() == [-1, -1, -1, 4, 4, -1, -1, 4, 5, 5]
    assert sample.temperatures.tolist() == pytest.approx([1, 1, 1, 0.7, 0.7, 1, 1, 0.7, 0.7, 0.7])
    assert np.count_nonzero(sample.advantages) == 5
    assert (sample.prefix_id, sample.prefix_len) == ("g", 3)


def test_step_candidates_train_their_own_turn_on_a_shared_prefix() -> None:
    members = tuple(Member(trajectory(Verdict(v)), 3) for v in (1.0, 0.0))
    samples, _ = to_samples(Group("g/0.1", TASK, members), CONFIG)
    assert [s.mask.tolist() for s in samples] == [[0] * 7 + [1] * 3] * 2
    assert [(s.prefix_id, s.prefix_len) for s in samples] == [("t/g/0", 7)] * 2, "by episode: its steps share"
    assert len({s.rollout_id for s in samples}) == 2


def test_step_groups_are_counted_one_by_one() -> None:
    tied = a_stepped_group(verdicts=[[Verdict(1.0)] * 2, [Verdict(1.0), Verdict(0.0)]])
    samples, summary = batch_samples([tied, rewards(1.0, 1.0)], CONFIG)
    assert (summary["groups/count"], summary["groups/zero_spread"]) == (3, 2)
    assert {s.prefix_id for s in samples[:4]} == {"t/g/0"} and [s.prefix_len for s in samples[:4]] == [3, 3, 8, 8]


def test_unequal_prompts_share_nothing() -> None:
    members = (Member(trajectory(Verdict(1.0))), Member(trajectory(Verdict(0.0), 1, prompt=(1, 2, 4))))
    assert [s.prefix_len for s in to_samples(Group("g", TASK, members), CONFIG)[0]] == [0, 0]


def test_zero_spread_is_flagged_and_may_be_dropped() -> None:
    samples, summary = batch_samples([rewards(1.0, 1.0), rewards(1.0, 0.0)], CONFIG)
    assert len(samples) == 4 and summary["groups/zero_spread"] == 1
    assert not samples[0].advantages.any()
    dropped, summary = batch_samples([rewards(1.0, 1.0), rewards(1.0, 0.0)], AdvantageConfig(drop_zero_spread=True))
    assert len(dropped) == 2 and summary["groups/zero_spread"] == 1
    assert summary["reward/mean"] == 0.75 and summary["reward/outcome"] == 0.75


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_outcome_is_weighed_by_a_number(weight: float) -> None:
    with pytest.raises(ValueError, match=r"advantage\.outcome_weight .* is negative or not finite"):
        AdvantageConfig(outcome_weight=weight).check()


def test_unknown_advantage_is_one_clear_line() -> None:
    with pytest.raises(
        ValueError, match=r"advantage.name 'gpro' is unknown; one of c_grpo, dr_grpo, gae, grpo, raft, rloo"
    ):
        group_advantages(rewards(1.0, 0.0), AdvantageConfig("gpro"))
