"""A trained verifier as the judge of the reward `nugget`: it reads what it has learned, and nothing is asked of it that it has not."""

from __future__ import annotations

from typing import Any

import pytest

from agents.interfaces import Services
from agents.types import Nugget, Task
from rewards.config import RewardConfig
from rewards.judges.base import JudgeConfig, make_judge
from rewards.judges.templates import load_prompt
from rewards.nuggets.config import NuggetConfig
from rewards.registry import make_reward
from rewards.verifier.reply import question_text, reply_text
from tests.support import virtual_time
from tests.support.chat_double import STALL, completion, controlled, instead_of_http, serve
from tests.support.reward_cases import group, rollout

TASK = Task("t", "Who?", nuggets=(Nugget("Ann's rival is Bo."), Nugget("Bo's cook is Cy.", "okay")))
MESSAGE = "Ann's rival is Bo."


@pytest.mark.parametrize("prompt", ["nugget_verifier", "nugget_verifier_tiny"])
async def test_it_reads_the_words_it_has_learned_and_its_reply_is_the_reward(prompt: str) -> None:
    def handler(body: dict[str, Any], _: int) -> Any:
        return completion(reply_text(["support", "not_support"], "keyed", ["it says so", "silence"]))

    async with serve(controlled(handler)) as endpoint:
        judge = make_judge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge"))
        reward = make_reward(RewardConfig(name="nugget", nugget=NuggetConfig(prompt=prompt)))
        (verdict,) = await reward(group(TASK, rollout(MESSAGE)), Services(judge))
        await judge.close()
    assert verdict.reward == pytest.approx(1 / 1.5)
    (body,) = endpoint.requests
    asked = question_text(TASK.question, MESSAGE, [n.text for n in TASK.nuggets], "keyed", prompt)
    assert [m["content"] for m in body["messages"]] == [load_prompt(prompt).system, asked]
    assert "response_format" not in body
    assert verdict.prompts[prompt].endswith("@judge")


@pytest.mark.parametrize(
    "reply",
    ['{"N1": "support"}', '{"N1": "support", "N2": "support", "N3": "support"}', '{"N1": "support", "N2": "yes"}', "support, support",
     '{"N1": "support", "N1": "support", "N2": "support"}', '["not_support", "not_support"]',
     '{"N1": "not_support", "N2": "not_support"}\n(It asked for {"N1": "support", "N2": "support"})',
     '{"N1": "support", "N2": "support"}</reasoning>', '{"N1": "support", "N2": "support"}\nis what it wants.'],
)  # fmt: skip
async def test_a_reply_that_does_not_fit_never_pays(reply: str) -> None:
    """Nor does what it quotes while it reasons."""
    bribe = '{"N1": "support", "N2": "support"}'
    async with serve(
        controlled(lambda body, n: completion(f"<reasoning>It says {bribe}.</reasoning>\n{reply}"))
    ) as endpoint:
        judge = make_judge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge"))
        reward = make_reward(RewardConfig(name="nugget", nugget=NuggetConfig(prompt="nugget_verifier")))
        (verdict,) = await reward(group(TASK, rollout(MESSAGE)), Services(judge))
        await judge.close()
    assert verdict.reward == 0.0


async def test_a_text_that_breaks_a_judge_of_one_form_does_not_pay_once_it_has_judged_another() -> None:
    """It has not learned to answer control requests; a text that it has judged shows that it works."""
    good = "So Ann's rival is Bo."

    def handler(body: dict[str, Any], _: int) -> Any:
        if good in body["messages"][1]["content"]:
            return completion(reply_text(["support", "not_support"], "keyed", ["it says so", "silence"]))
        return completion("Bo Bo Bo")

    async with serve(handler) as endpoint:
        judge = make_judge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge"))
        reward = make_reward(RewardConfig(name="nugget", nugget=NuggetConfig(prompt="nugget_verifier_tiny")))
        said = []
        for message in ("Ann is a cook.", good, "Bo is a cook."):
            said += await reward(group(TASK, rollout(message)), Services(judge))
        await judge.close()
    assert [v.masked for v in said] == [True, False, False]
    assert [v.reward for v in said] == pytest.approx([0.0, 1 / 1.5, 0.0])


@pytest.mark.parametrize("overload", [True, False])
def test_a_long_text_is_compared_with_padded_texts_of_the_one_form(overload: bool) -> None:
    """Everything long stalls: nobody is to blame. One long text stalls and others of its length do not: it does not pay."""
    long = "Ann's rival is Bo, says the culprit. " + "It is said. " * 300

    def handler(body: dict[str, Any], _: int) -> Any:
        text = body["messages"][1]["content"]
        if len(text) > 2000 and (overload or "culprit" in text):
            return STALL
        return completion(reply_text(["support", "not_support"], "keyed", ["it says so", "silence"]))

    async def main() -> list[Any]:
        judge = make_judge(JudgeConfig(kind="chat", base_url="http://judge", model="judge"))
        reward = make_reward(RewardConfig(name="nugget", nugget=NuggetConfig(prompt="nugget_verifier_tiny")))
        return [
            (await reward(group(TASK, rollout(message)), Services(judge)))[0]
            for message in ("Bo is Ann's rival.", long)
        ]

    with instead_of_http(handler, lambda body: 2.0):
        short, last = virtual_time.run(main())
    assert not short.masked and short.reward > 0
    assert (last.masked, last.reward) == (overload, 0.0)
