"""`gumshoe verifier`: data of closed worlds, the supervised stage, and an evaluation, as files and lines a user sees."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

from agents.interfaces import Sandbox, Services
from agents.protocols.tools import Tools
from agents.sampling.full import collect
from agents.types import Generation, Group, Identity, Member, Sampling, Span, StopReason, Uid, Version
from cluster.config import load_config
from cluster.errors import UserError
from cluster.schema import RunConfig
from cluster.speech import load_tokenizer
from cluster.verifier import PassagesConfig, VerifierRun, read_passages, verifier
from envs.jsonl import read_tasks
from envs.world.policy import POLICY_DIR
from rewards.judges.rule import RuleJudge
from rewards.judges.templates import load_prompt
from rewards.registry import make_reward
from rewards.verifier.reply import read_any, split_reply
from tests.support.chat_double import completion, controlled, serve

pytestmark = pytest.mark.filterwarnings("ignore")


def step(name: str, folder: Path, *overrides: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    base = [f"folder={folder}/data", f"out={folder}/sft", "passages.limit=30", "held_out.limit=12", "rl=''"]
    return verifier(name, "verifier_tiny", [*base, *overrides], lines.append), lines


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_data_of_closed_worlds_labels_all_three_ways_and_keeps_names_apart(tmp_path: Path) -> None:
    status, lines = step("data", tmp_path)
    assert status == 0 and lines[0].startswith("30 passages to learn from, 12 held out, 0 not labelled")
    data = tmp_path / "data"
    report = json.loads((data / "report.json").read_text())
    assert set(report["train"]["labels"]) == {"support", "partial_support", "not_support"}
    lessons, tasks = rows_of(data / "sft.jsonl"), read_tasks(data / "tasks.jsonl")
    assert len(lessons) == len(tasks) == report["train"]["examples"] > 30
    for row, task in zip(lessons, tasks, strict=True):
        assert task.question == row["question"] and task.oracle is not None
        score, labels = split_reply(row["reply"])
        assert score == 1.0 and read_any(labels) == task.oracle["labels"]
    held_out = {r["question_id"] for r in rows_of(data / "eval.jsonl")}
    assert len(held_out) > 3 and not held_out & {t.meta["question_id"] for t in tasks}


def test_the_same_command_asks_the_teacher_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step("data", tmp_path)
    first = {p.name: p.read_bytes() for p in (tmp_path / "data").iterdir() if p.name != "report.json"}

    async def never(self: RuleJudge, request: object) -> object:
        raise AssertionError("asked again")

    monkeypatch.setattr(RuleJudge, "ask", never)
    assert step("data", tmp_path)[0] == 0
    assert {name: (tmp_path / "data" / name).read_bytes() for name in first} == first


def test_a_journal_of_another_teacher_is_refused(tmp_path: Path) -> None:
    step("data", tmp_path)
    with pytest.raises(UserError, match="begun with judge"):
        step("data", tmp_path, "judge.model=another")


def test_supervised_stage_learns_rows_and_is_not_done_twice(tmp_path: Path) -> None:
    few = ["warmup.stages=[{name: sft, steps: 12, lr: 1.0e-3, rise_steps: 2}]", "warmup.batch_tokens=1500"]
    few += ["warmup.report_every=6", "warmup.num_checks=4", "warmup.threads=1"]
    status, lines = step("train", tmp_path, *few)
    assert status == 0 and lines[-1] == f"supervised stage: {tmp_path / 'sft'}"
    losses = [float(line.partition("loss ")[2].split()[0]) for line in lines if "loss " in line]
    assert losses[-1] < losses[0]
    assert {"model.safetensors", "tokenizer.json", "config.json", "warmup.json"} <= {
        p.name for p in (tmp_path / "sft").iterdir()
    }
    status, lines = step("train", tmp_path, *few)
    assert status == 0 and "the supervised stage is done" in lines[-1]


def test_the_teacher_evaluated_against_itself_is_perfect(tmp_path: Path) -> None:
    step("data", tmp_path)
    options = ["eval.judge.kind=rule", "eval.prompt=nugget_assign", "eval.runs=3", "eval.ks=[1, 3]"]
    status, lines = step("eval", tmp_path, *options)
    report = json.loads((tmp_path / "data" / "eval" / "report.json").read_text())
    assert status == 0 and lines[0].startswith("rubric  macro     P 1.000  R 1.000  F1 1.000")
    for level in ("rubric", "sample"):
        assert report[level]["macro"]["f1"] == 1.0 and report[level]["failed"] == 0
        assert report[level]["over_runs"]["pass@3"] == report[level]["over_runs"]["maj@3"] == 1.0
    assert len(rows_of(tmp_path / "data" / "eval" / "predictions.jsonl")) == report["rubric"]["n"]


async def test_a_verifier_behind_an_endpoint_is_asked_with_its_prompt_and_failures_count(tmp_path: Path) -> None:
    await asyncio.to_thread(step, "data", tmp_path)

    def handler(body: dict[str, Any], n: int) -> Any:
        keys = body["messages"][1]["content"].partition('field="nuggets"')[2].count("\nN")
        labels = {f"N{i}": "support" for i in range(1, keys + 1)}
        return completion(f"<reasoning>\nall\n</reasoning>\n{json.dumps(labels)}" if n % 5 else "I will not.")

    async with serve(controlled(handler)) as endpoint:
        options = ["eval.judge.kind=chat", f"eval.judge.base_url={endpoint.url}", "eval.judge.model=judge"]
        status, _ = await asyncio.to_thread(step, "eval", tmp_path, *options)
    report = json.loads((tmp_path / "data" / "eval" / "report.json").read_text())
    assert status == 0 and report["rubric"]["failed"] == 0  # asked again, it answered
    assert report["rubric"]["by_label"]["support"]["recall"] == 1.0
    assert report["rubric"]["by_label"]["not_support"]["recall"] == 0.0
    assert all("Exact Answer" in text for text in endpoint.texts)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for options, message in (
        (["passages.limit=0"], "neither a file nor a world"),
        ([f"passages.file={tmp_path}/none.jsonl"], "cannot be read"),
        (["examples.forms=[prose]"], "examples.forms"),
        (["examples.prompt=nothing"], "no judge prompt 'nothing'"),
    ):
        with pytest.raises(UserError, match=message):
            step("data", tmp_path, *options)
    with pytest.raises(UserError, match="cannot be read"):
        step("eval", tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"id": "x", "question": "?", "text": "t", "nuggets": ["a"]}\n{"id": 1}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: field 'question'"):
        read_passages(PassagesConfig(str(tmp_path / "bad.jsonl")), 0)


def test_ids_may_not_meet(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "x", "question": "?", "text": "t", "nuggets": ["a"]}\n')
    both = [f"passages.file={tmp_path}/a.jsonl", f"held_out.file={tmp_path}/a.jsonl"]
    with pytest.raises(UserError, match="two passages have the id 'x'"):
        step("data", tmp_path, *both)


@pytest.mark.parametrize("name", ["verifier_tiny", "verifier_4b_sft"])
def test_the_configs_fit_and_lead_to_their_rl_stage(name: str) -> None:
    run = load_config(name, [], VerifierRun)
    rl = load_config(run.rl, [], RunConfig)
    assert rl.model.path == run.out and rl.world.jsonl.tasks == f"{run.folder}/tasks.jsonl"
    assert not run.protocol.show_tools and run.protocol.bare_answer and not run.protocol.format_request
    if name == "verifier_4b_sft":
        e = run.examples
        assert (e.per_call, e.keep, e.thin_above, e.thin_share, e.thin_cut) == (10, 0.1, 5, 0.5, 0.2)
        assert (run.warmup.weight_decay, run.warmup.clip_norm, run.warmup.stages[0].lr) == (0.1, 1.0, 1e-6)
        assert run.warmup.stages[0].rise_steps == 0.2 * run.warmup.stages[0].steps


# ------------------------------------------------------------------------------------------- one turn of an episode


class Speaks:
    """A policy that says one thing, and keeps what it was shown."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.shown = ids, [0]

    async def generate(self, prompt_ids: Any, **_: Any) -> Generation:
        self.shown = list(prompt_ids)
        spans = (Span(0, len(self.ids), Version(0, 0)),)
        return Generation(tuple(self.ids), (-0.5,) * len(self.ids), spans, "stop")


async def test_an_episode_of_one_turn_is_shown_what_a_judge_is_shown_and_earns_the_reward(tmp_path: Path) -> None:
    await asyncio.to_thread(step, "data", tmp_path)
    config = load_config("verifier_tiny_rl", [], RunConfig)
    tokenizer = load_tokenizer(str(POLICY_DIR))
    speech = Tools(tokenizer, config.protocol.tools)
    reward = make_reward(config.reward)
    tasks = read_tasks(tmp_path / "data" / "tasks.jsonl")[:5]
    for task, lesson in zip(tasks, rows_of(tmp_path / "data" / "sft.jsonl"), strict=False):
        policy = Speaks([*tokenizer.encode(lesson["reply"], add_special_tokens=False), speech.stop_token_ids[0]])
        identity = Identity("r", Uid(task.id, "g", 0), "tools", "a", "b", Sampling(max_tokens=256))
        episode = await collect(task, identity, policy, cast(Sandbox, None), speech, config.sampling)
        (trajectory,) = episode.trajectories()
        asked = [
            {"role": "system", "content": load_prompt("nugget_verifier_tiny").system},
            {"role": "user", "content": task.question},
        ]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert policy.shown == tokenizer.encode(text, add_special_tokens=False)
        assert lesson["reply"] not in tokenizer.decode(policy.shown)
        (verdict,) = await reward(Group("g", task, (Member(trajectory),)), Services())
        assert trajectory.stop is StopReason.answered and verdict.reward == pytest.approx(1.0)
        assert verdict.parts["outcome"] == 1.0 and len(trajectory.token_ids) <= config.sampling.max_context
