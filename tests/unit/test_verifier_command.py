"""`gumshoe verifier`: data of closed worlds, the supervised stage, and an evaluation, as files and lines a user sees."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, cast

import pytest

from agents.interfaces import Sandbox, Services
from agents.protocols.tools import Tools
from agents.sampling.full import collect
from agents.types import (
    Generation,
    Group,
    Identity,
    JudgeReply,
    JudgeRequest,
    Member,
    Sampling,
    Span,
    Status,
    StopReason,
    Uid,
    Version,
)
from cluster.config import load_config
from cluster.errors import UserError
from cluster.schema import RunConfig
from cluster.speech import load_tokenizer
from cluster.verifier import PassagesConfig, VerifierRun, read_passages, verifier
from cluster.warmup import WarmupRun, fingerprint
from envs.jsonl import read_tasks
from envs.world.policy import POLICY_DIR
from rewards.judges.rule import RuleJudge
from rewards.judges.templates import load_prompt
from rewards.nugget import LABELS
from rewards.registry import make_reward
from rewards.verifier.config import FORMS
from rewards.verifier.reply import read_any, split_reply
from tests.support.chat_double import completion, controlled, serve, verdict

pytestmark = pytest.mark.filterwarnings("ignore")


def step(name: str, folder: Path, *overrides: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    base = [f"folder={folder}/data", f"out={folder}/sft", "passages.limit=30", "held_out.limit=12", "rl=''"]
    return verifier(name, "verifier_tiny", [*base, *overrides], lines.append), lines


FEW = ("warmup.stages=[{name: sft, steps: 6, lr: 1.0e-3, rise_steps: 2}]", "warmup.batch_tokens=800",
       "warmup.report_every=3", "warmup.num_checks=2", "warmup.threads=1")  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def num_keys(body: dict[str, Any]) -> int:
    """Nuggets that a judge was asked for."""
    return int(body["messages"][1]["content"].partition('field="nuggets"')[2].partition("</data")[0].count("\nN"))


def all_support(body: dict[str, Any], n: int) -> Any:
    labels = {f"N{i}": "support" for i in range(1, num_keys(body) + 1)}
    return completion(f"<reasoning>\nall\n</reasoning>\n{json.dumps(labels)}")


def asks(url: str, who: str = "eval.judge") -> list[str]:
    return [f"{who}.kind=chat", f"{who}.base_url={url}", f"{who}.model=judge"]


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


def test_a_journal_of_another_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step("data", tmp_path)
    monkeypatch.setattr("rewards.judges.identity.VERSION", "rule-99")
    with pytest.raises(UserError, match="begun with judge"):
        step("data", tmp_path)


def test_labels_of_passages_that_were_told_otherwise_are_asked_for_again(tmp_path: Path) -> None:
    again = ("passages.retell=0", "held_out.retell=0")
    step("data", tmp_path / "one")
    step("data", tmp_path / "one", *again)
    step("data", tmp_path / "other", *again)
    one, other = (rows_of(tmp_path / name / "data" / "eval.jsonl") for name in ("one", "other"))
    assert one == other


async def test_a_teacher_behind_an_endpoint_gives_reasons_to_learn(tmp_path: Path) -> None:
    def handler(body: dict[str, Any], n: int) -> Any:
        keys = [f"N{i}" for i in range(1, num_keys(body) + 1)]
        return verdict({key: {"reason": f"Said in reply {n}.", "label": LABELS[n % 4]} for key in keys})

    async with serve(controlled(handler)) as endpoint:
        status, lines = await asyncio.to_thread(step, "data", tmp_path, *asks(endpoint.url, "judge"))
    assert status == 0 and "100% with the teacher's reasons" in lines[1]
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["train"]["with_reasons"] == report["held_out"]["with_reasons"] == 1.0
    assert all("\nN1: Said in reply" in row["reply"] for row in rows_of(tmp_path / "data" / "sft.jsonl"))


def test_supervised_stage_learns_rows_and_is_not_done_twice(tmp_path: Path) -> None:
    step("data", tmp_path)
    for name in ("sft", "checks"):  # a line ends at a line feed alone
        with (tmp_path / "data" / f"{name}.jsonl").open("a") as file:
            file.write('{"question": "Who\u2028?", "reply": "one\x85"}\n')
    status, lines = step("train", tmp_path, *FEW)
    assert status == 0 and lines[-1] == f"supervised stage: {tmp_path / 'sft'}"
    losses = [float(line.partition("loss ")[2].split()[0]) for line in lines if "loss " in line]
    assert losses[-1] < losses[0]
    assert {"model.safetensors", "tokenizer.json", "config.json", "warmup.json"} <= {
        p.name for p in (tmp_path / "sft").iterdir()
    }
    status, lines = step("train", tmp_path, *FEW)
    assert status == 0 and "the supervised stage is done" in lines[-1]
    # free to change, and not
    assert "is done" in step("train", tmp_path, *FEW, "warmup.report_every=2", "warmup.threads=2")[1][-1]
    for change, message in (
        ("warmup.batch_tokens=2000", "made with warmup.batch_tokens '800', not '2000'"),
        ("examples.keep=0", r"made with rows.sft sha256 '\w+', not '\w+'"),
    ):
        with pytest.raises(UserError, match=message):
            step("train", tmp_path, *FEW, change)


def test_training_on_data_of_other_settings_or_that_is_not_whole_makes_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[Any] = []
    monkeypatch.setattr("cluster.verifier.run_warmup", lambda run, _: taught.append(run))
    data = tmp_path / "data"
    step("data", tmp_path)
    whole = {p.name: p.read_bytes() for p in data.iterdir() if p.name not in ("journal.jsonl", "report.json")}
    status, lines = step("train", tmp_path, "examples.keep=0")
    assert status == 0 and "made with examples.keep '0.5', not '0.0'; it is made anew" in lines[0]
    assert json.loads((data / "report.json").read_text())["train"]["augmented"] == 0
    step("train", tmp_path)
    for name in ("checks.jsonl", "tasks.jsonl", "report.json"):  # as a kill leaves it: the report comes last
        (data / name).unlink()
    assert step("train", tmp_path)[0] == 0
    assert (data / "report.json").is_file()
    assert {name: (data / name).read_bytes() for name in whole} == whole
    assert [run.rows for run in taught] == [{"sft": str(data / "sft.jsonl")}] * 3


def test_the_rl_run_is_read_first_and_goes_on_unless_it_began_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []

    def taught(run: WarmupRun, _: Any) -> None:
        Path(run.out).mkdir()
        (Path(run.out) / "warmup.json").write_text(json.dumps({"about": fingerprint(run)}))

    monkeypatch.setattr("cluster.verifier.run_warmup", taught)
    monkeypatch.setattr("cluster.train.run", lambda config: runs.append(config) or {"note": "finished"})
    for wrong, message in (
        ("rl=verifer_tiny_rl", "did you mean 'verifier_tiny_rl'"),
        ("rl_overrides=[learner.lrr=1]", "learner.lr"),
    ):
        with pytest.raises(UserError, match=message):
            step("train", tmp_path, "rl=verifier_tiny_rl", wrong)
    assert list(tmp_path.iterdir()) == []
    options = ["rl=verifier_tiny_rl", f"rl_overrides=[storage_path={tmp_path}/runs]"]
    assert "note finished" in step("train", tmp_path, *options)[1][-1]
    begun = tmp_path / "runs" / "verifier_tiny_rl" / "config.yaml"
    begun.parent.mkdir(parents=True)
    begun.write_text("")
    step("train", tmp_path, *options)
    os.utime(begun, (1, 1))
    step("train", tmp_path, *options)
    assert [run.resume for run in runs] == ["auto", "auto", ""]
    assert {run.model.path for run in runs} == {str(tmp_path / "sft")}


def test_the_teacher_evaluated_against_itself_is_perfect(tmp_path: Path) -> None:
    step("data", tmp_path)
    status, lines = step("eval", tmp_path, *RULE, "eval.runs=3", "eval.ks=[1, 2, 3]")
    report = json.loads((tmp_path / "data" / "eval" / "report.json").read_text())
    assert status == 0 and lines[0].startswith("rubric  macro     P 1.000  R 1.000  F1 1.000 ± 0.000")
    for level in ("rubric", "sample"):
        assert report[level]["macro"]["f1"] == 1.0 and report[level]["failed"] == 0
        assert report[level]["over_runs"]["pass@3"] == report[level]["over_runs"]["maj@3"] == 1.0
    assert len(rows_of(tmp_path / "data" / "eval" / "predictions.jsonl")) == report["rubric"]["n"]


async def test_a_verifier_behind_an_endpoint_is_asked_with_its_prompt_and_failures_count(tmp_path: Path) -> None:
    await asyncio.to_thread(step, "data", tmp_path)

    def handler(body: dict[str, Any], n: int) -> Any:
        return all_support(body, n) if n % 5 else completion("I will not.")

    async with serve(controlled(handler)) as endpoint:
        status, _ = await asyncio.to_thread(step, "eval", tmp_path, *asks(endpoint.url))
    report = json.loads((tmp_path / "data" / "eval" / "report.json").read_text())
    assert status == 0 and report["rubric"]["failed"] == 0  # asked again, it answered
    assert report["rubric"]["by_label"]["support"]["recall"] == 1.0
    assert report["rubric"]["by_label"]["not_support"]["recall"] == 0.0
    assert all("Exact Answer" in text for text in endpoint.texts)


RULE = ("eval.judge.kind=rule", "eval.prompt=nugget_assign")


def test_an_evaluation_keeps_its_calls_back_until_they_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call's deadline begins when the judge is asked, so what waits must not have been asked."""
    step("data", tmp_path)
    asked, most, plain = 0, 0, RuleJudge.ask

    async def ask(self: RuleJudge, request: JudgeRequest) -> JudgeReply:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await asyncio.sleep(0)
        asked -= 1
        return await plain(self, request)

    monkeypatch.setattr(RuleJudge, "ask", ask)
    status, lines = step("eval", tmp_path, *RULE, "eval.judge.concurrency=3")
    assert status == 0 and most == 3 and "12 calls; failed {}, unavailable {}" in lines


def test_what_an_evaluation_could_not_ask_for_is_in_no_score_and_a_failure_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step("data", tmp_path)
    first, second, *others = rows_of(tmp_path / "data" / "eval.jsonl")
    plain, away = RuleJudge.ask, {first["text"]}

    async def ask(self: RuleJudge, request: JudgeRequest) -> JudgeReply:
        if request.fields["passage"] in away:
            return JudgeReply(Status.unavailable, cause="judge_deadline")
        if request.fields["passage"] == second["text"]:
            return JudgeReply(Status.unjudgeable, cause="unusable_reply")
        return await plain(self, request)

    monkeypatch.setattr(RuleJudge, "ask", ask)
    status, lines = step("eval", tmp_path, *RULE)
    report = json.loads((tmp_path / "data" / "eval" / "report.json").read_text())
    assert status == 1 and "12 calls; failed {'unusable_reply': 1}, unavailable {'judge_deadline': 1}" in lines
    assert report["unavailable"] == len(first["nuggets"]) and report["rubric"]["failed"] == len(second["nuggets"])
    right = sum(len(row["nuggets"]) for row in others)
    assert report["rubric"]["accuracy"] == pytest.approx(right / (right + len(second["nuggets"])))
    away |= {row["text"] for row in others} | {second["text"]}
    with pytest.raises(UserError, match=r"no label was got from the verifier; causes: .*judge_deadline"):
        step("eval", tmp_path, *RULE)


def test_rows_may_hold_any_character(tmp_path: Path) -> None:
    row = {
        "id": "x",
        "question": "Who\u2028?",
        "text": "one\x85two\u2029",
        "nuggets": [{"text": "a", "label": "support"}],
    }
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"id": name}, ensure_ascii=False) + "\n\n", "utf-8")
    files = [f"passages.file={tmp_path}/a.jsonl", f"held_out.file={tmp_path}/b.jsonl"]
    assert step("data", tmp_path, *files)[0] == 0
    (passage,) = read_passages(PassagesConfig(str(tmp_path / "data" / "eval.jsonl")), 0)
    assert passage.text == row["text"]
    with pytest.raises(UserError, match="no_oracle"):
        step("eval", tmp_path, *RULE)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for options, message in (
        (["passages.limit=0"], "set passages.file, or passages.limit"),
        (["held_out.limit=0"], "set held_out.file, or held_out.limit"),
        ([f"held_out.file={tmp_path}/none.jsonl"], "file of held_out .* does not exist"),
        (["rows={sft: other.jsonl}"], "unknown key 'rows"),
        (["check_rows=other.jsonl"], "unknown key 'check_rows'"),
        (["examples.forms=[prose]"], "examples.forms"),
        (["examples.prompt=nothing"], "no judge prompt 'nothing'"),
    ):
        with pytest.raises(UserError, match=message):
            step("data", tmp_path, *options)
    with pytest.raises(UserError, match="does not exist"):
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
        assert (run.warmup.batch_rows, run.warmup.batch_tokens, run.warmup.save_every) == (256, 2 * 8192, 50)
        assert set(e.forms) == set(FORMS)
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
