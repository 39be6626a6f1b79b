from __future__ import annotations

import pytest

from agents.interfaces import Services
from agents.types import Status, StopReason, Task
from rewards.config import RewardConfig
from rewards.metrics.intervals import wilson
from rewards.registry import make_reward
from tests.support.reward_cases import ScriptedJudge, group, rollout

TASK = Task("t", "Capital of France?", answers=("Paris", "City of Paris"))
UNANSWERABLE = Task("u", "Capital of Atlantis?")
RULE = RewardConfig(name="outcome")
JUDGED = RewardConfig(name="outcome", outcome="judge")


async def test_exact_match_and_f1() -> None:
    good, half, bad = await make_reward(RULE)(
        group(
            TASK,
            rollout("## Exact Answer\nparis."),
            rollout("## Exact Answer\nParis city"),
            rollout("## Exact Answer\nLyon"),
        ),
        Services(),
    )
    assert (good.reward, good.parts["f1"]) == (1.0, 1.0)
    assert half.reward == 0.0 and 0 < half.parts["f1"] < 1
    assert bad.reward == bad.parts["f1"] == 0.0
    assert good.evidence[0]["correct"] and good.evidence[0]["answer"] == "paris."


async def test_refusing_an_unanswerable_question_is_right() -> None:
    right, wrong = await make_reward(RULE)(
        group(UNANSWERABLE, rollout("## Exact Answer\nunknown"), rollout("## Exact Answer\nX")), Services()
    )
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    (refused,) = await make_reward(RULE)(group(TASK, rollout("## Exact Answer\nunknown")), Services())
    assert refused.reward == 0.0


@pytest.mark.parametrize("stop", [StopReason.context_full, StopReason.turn_limit, StopReason.malformed])
async def test_unfinished_is_zero_without_a_judge(stop: StopReason) -> None:
    judge = ScriptedJudge()
    (verdict,) = await make_reward(JUDGED)(group(TASK, rollout("## Exact Answer\nParis", stop=stop)), Services(judge))
    assert verdict.reward == verdict.parts["outcome"] == 0.0 and not verdict.masked and not judge.asked


@pytest.mark.parametrize("stop", [StopReason.env_failed, StopReason.aborted])
async def test_infrastructure_is_masked(stop: StopReason) -> None:
    (verdict,) = await make_reward(RULE)(group(TASK, rollout("## Exact Answer\nParis", stop=stop)), Services())
    assert verdict.masked and verdict.causes == {"outcome": stop}


@pytest.mark.parametrize(
    ("reply", "reward", "status"),
    [
        ({"extracted_answer": "Paris", "correct": True}, 1.0, None),
        ({"extracted_answer": "Lyon", "correct": False}, 0.0, None),
        ({"extracted_answer": None, "correct": True}, 0.0, Status.unjudgeable),
        ({"extracted_answer": " ", "correct": True}, 0.0, Status.unjudgeable),
        ({"extracted_answer": "Paris", "correct": "yes"}, 0.0, Status.unjudgeable),
        ({"extracted_answer": "Paris", "correct": 1}, 0.0, Status.unjudgeable),
        (["yes"], 0.0, Status.unjudgeable),
        (Status.unjudgeable, 0.0, Status.unjudgeable),
        (Status.unavailable, 0.0, Status.unavailable),
    ],
)
async def test_judged_outcome(reply: object, reward: float, status: Status | None) -> None:
    (verdict,) = await make_reward(JUDGED)(
        group(TASK, rollout("## Exact Answer\nParis")), Services(ScriptedJudge(outcome=reply))
    )
    assert verdict.reward == reward
    assert verdict.status.get("outcome") == status
    assert verdict.masked == (status is Status.unavailable)


async def test_f1_pays_for_overlap() -> None:
    task = Task("t", "Who?", ("Ann Lee", "A. Lee of York"))
    rollouts = [rollout(f"## Exact Answer\n{answer}") for answer in ("Ann Lee", "Ann", "Bob")]
    verdicts = await make_reward(RewardConfig(name="outcome", outcome="f1"))(group(task, *rollouts), Services())
    assert [v.reward for v in verdicts] == [1.0, pytest.approx(2 / 3), 0.0]
    assert [v.evidence[0]["correct"] for v in verdicts] == [True, False, False]
    with pytest.raises(ValueError, match=r"reward\.outcome 'f1' is no right or wrong"):
        make_reward(RewardConfig(name="carr", outcome="f1"))


FOUND = Task("e", "Who?", ("Gupezo",), oracle={"entities": {"E0": "Gupezo", "E1": "Lomitave", "E2": "Ann Lee"}})


async def test_wrong_rollouts_earn_the_entities_they_found_relative_to_the_best() -> None:
    said = ("I saw Lomitave. ## no", "Lomitave and Ann\nLee met.", "Annlee Lomitaves", "Lomitave, Ann Lee", "Lomitave")
    answers = ("Ulo", "Ulo", "Ulo", "Gupezo", "Ulo")
    stops = (None, None, None, None, StopReason.env_failed)
    made = [rollout(f"{t}\n\n## Exact Answer\n{a}", stop=s) for t, a, s in zip(said, answers, stops, strict=True)]
    config = RewardConfig(name="outcome", reward="entity", rubric_ratio=0.3)
    verdicts = await make_reward(config)(group(FOUND, *made), Services())
    assert [v.parts.get("entities") for v in verdicts] == [1 / 3, 2 / 3, 0.0, 1.0, None]
    assert [v.reward for v in verdicts[:4]] == [pytest.approx(0.1), pytest.approx(0.2), 0.0, 1.0] and verdicts[4].masked
    (alone,) = await make_reward(config)(group(FOUND, made[0]), Services())
    assert alone.reward == pytest.approx(0.3)  # the best of its group
    (unknown,) = await make_reward(config)(group(TASK, made[0]), Services())
    assert unknown.reward == unknown.parts["entities"] == 0.0


@pytest.mark.parametrize("stop", [StopReason.context_full, StopReason.turn_limit, StopReason.malformed])
async def test_entities_of_unfinished_rollouts_earn_nothing(stop: StopReason) -> None:
    lost, plain = rollout("Lomitave, Ann Lee, Gupezo", stop=stop), rollout("Lomitave\n\n## Exact Answer\nUlo")
    config = RewardConfig(name="outcome", reward="entity")
    verdicts = await make_reward(config)(group(FOUND, lost, plain), Services())
    assert [v.reward for v in verdicts] == [0.0, pytest.approx(0.3)]


async def test_config_errors_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"reward\.name 'rouge' is unknown; one of outcome, carr"):
        make_reward(RewardConfig(name="rouge"))
    with pytest.raises(ValueError, match="needs rubrics"):
        make_reward(RewardConfig(name="outcome", reward="mix"))
    with pytest.raises(ValueError, match=r"set judge\.kind"):
        await make_reward(JUDGED)(group(TASK, rollout("## Exact Answer\nParis")), Services())


def test_wilson() -> None:
    mean, low, high = wilson(8, 10)
    assert (mean, round(low, 4), round(high, 4)) == (0.8, 0.4902, 0.9433)
    assert wilson(0, 0) == (0.0, 0.0, 1.0)
    assert wilson(0, 20)[1] == 0.0 and wilson(20, 20)[2] == 1.0
    with pytest.raises(ValueError, match="impossible"):
        wilson(3, 2)
