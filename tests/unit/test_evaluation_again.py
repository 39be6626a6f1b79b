"""The command of an evaluation given again: what it wants when nothing is left to do, and when the files of its checkpoint have changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.evaluation.config import EvalConfig
from cluster.evaluation.contents import contents
from cluster.evaluation.journal import UNITS, VERDICTS, Folder, open_folder
from cluster.evaluation.plan import questions
from cluster.evaluation.records import Played, State
from cluster.evaluation.stages import Asked, evaluate
from rewards.judges.base import JudgeConfig
from tests.unit.test_evaluation import config, write_played
from tests.unit.test_evaluation_folder import once_played


def units(folder: Folder) -> list[Played]:
    """Every question played once."""
    return [replace(p, unit=p.unit._replace(config=folder.config)) for p in once_played()[:4]]


# ------------------------------------------------------------------------------------------------ nothing left to do


@pytest.fixture
def finished(tmp_path: Path) -> tuple[EvalConfig, Path]:
    """A chat evaluation that was played and judged, at an endpoint that is gone by now."""
    found = config(tmp_path)
    with open_folder(found, questions(found), contents(found)) as folder:
        write_played(folder, units(folder))
    evaluate(found, Asked.of("judge,score"))
    return found, folder.path


def test_a_finished_evaluation_asks_nobody_and_makes_its_report(
    finished: tuple[EvalConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, path = finished
    found.policy.chat.api_key_env = "GS_NO_SUCH_KEY"
    before = {name: (path / name).read_bytes() for name in (UNITS, VERDICTS)}
    monkeypatch.setattr("cluster.evaluation.stages.ray_session", None)  # nothing that needs Ray is begun
    result = evaluate(found, Asked())
    assert Path(result["report"]).is_file() and result["played"] == 4 and result["unjudged"] == 0
    assert {name: (path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("more", [{"samples": 2}, {"probes": ["closed_book"]}])
def test_what_is_left_to_play_wants_its_endpoint(finished: tuple[EvalConfig, Path], more: dict[str, Any]) -> None:
    found = replace(finished[0], **more)
    with pytest.raises(UserError, match=r"the policy's endpoint http://127.0.0.1:9/v1 does not answer"):
        evaluate(found, Asked())
    found.policy.chat.api_key_env = "GS_NO_SUCH_KEY"
    with pytest.raises(UserError, match="GS_NO_SUCH_KEY is not set"):
        evaluate(found, Asked())


def test_errors_that_are_played_again_want_their_endpoint_and_a_judge_that_lacks_verdicts_its_key(
    finished: tuple[EvalConfig, Path],
) -> None:
    found = finished[0]
    with open_folder(found, questions(found), contents(found)) as folder:
        first = next(iter(folder.played()))
        write_played(folder, [replace(first, state=State.failed, trajectory=None, error="away")])
    assert evaluate(found, Asked())["failed"] == 1
    with pytest.raises(UserError, match="does not answer"):
        evaluate(found, Asked(retry_errors=True))
    found.judge = JudgeConfig(kind="chat", model="j", base_url="http://127.0.0.1:9/v1", api_key_env="GS_NO_SUCH_KEY")
    with pytest.raises(UserError, match="GS_NO_SUCH_KEY is not set"):
        evaluate(found, Asked())


def test_questions_that_are_not_asked_for_any_more_are_not_counted(finished: tuple[EvalConfig, Path]) -> None:
    found = finished[0]
    found.benchmark.limit = 2
    result = evaluate(found, Asked())
    assert result["played"] == 2 and result["mean"]["questions"] == 2


def test_an_object_store_is_refused_instead_of_a_folder_that_nobody_would_find(tmp_path: Path) -> None:
    found = replace(config(tmp_path), storage_path="s3://bucket/evaluations")
    with pytest.raises(
        UserError, match=r"storage_path s3://bucket/evaluations is an object store; .* set storage_path to one"
    ):
        evaluate(found, Asked())


# ------------------------------------------------------------------------------------------------------- a checkpoint


def checkpoint(folder: Path) -> EvalConfig:
    """An evaluation of a made-up checkpoint by a chat agent."""
    model = folder / "model"
    model.mkdir()
    for name, text in {
        "config.json": '{"model_type": "qwen3", "transformers_version": "4"}', "model.safetensors": "weights", "tokenizer.json": "{}",
        "tokenizer_config.json": '{"chat_template": "a", "eos_token": "x"}', "chat_template.jinja": "{{ messages }}",
    }.items():  # fmt: skip
        (model / name).write_text(text)
    found = config(folder)
    found.policy.kind, found.agent.name, found.model.path = "checkpoint", "react", str(model)
    return found


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", '{"added": 1}', "model.tokenizer_files is .*: the files of the tokenizer changed"),
        ("tokenizer_config.json", '{"chat_template": "a"}', "model.tokenizer_files is .*: the files of the tokenizer changed"),
        ("tokenizer_config.json", '{"chat_template": "b", "eos_token": "x"}', "settings: model.chat_template is .*: the chat template changed;"),
        ("chat_template.jinja", "{{ other }}", "settings: model.chat_template is .*: the chat template changed;"),
        ("config.json", '{"model_type": "qwen3", "rope_scaling": 4}', "model.config is .*: config.json in model.path changed"),
        ("model.safetensors", "other", "model.weights is .*: the weights in model.path changed"),
        ("config.json", '{"model_type": "qwen3", "transformers_version": "5"}', ""),
        ("generation_config.json", "{}", ""),
    ],
)  # fmt: skip
def test_files_of_a_checkpoint_that_answers_hang_on_belong_to_the_identity(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    found = checkpoint(tmp_path)
    benchmark = questions(found)
    with open_folder(found, benchmark, contents(found)):
        pass
    (tmp_path / "model" / name).write_text(text)
    if said:
        with pytest.raises(UserError, match=said), open_folder(found, benchmark, contents(found)):
            pass
    else:
        with open_folder(found, benchmark, contents(found)):
            pass


def test_a_template_and_a_tokenizer_from_elsewhere_are_those_that_count(tmp_path: Path) -> None:
    found = checkpoint(tmp_path)
    before, template, other = contents(found), tmp_path / "mine.jinja", tmp_path / "other"
    template.write_text("mine")
    found.policy.engine_args = ["--chat-template", str(template)]
    mine = contents(found)
    (tmp_path / "model" / "chat_template.jinja").write_text("not used")
    assert contents(found) == mine != before
    template.write_text("changed")
    assert contents(found)["model.chat_template"] != mine["model.chat_template"]
    other.mkdir()
    (other / "tokenizer.json").write_text('{"other": 1}')
    named = [replace(found, policy=replace(found.policy, engine_args=[f"--tokenizer={other}"])), replace(found)]
    named[1].model = replace(found.model, tokenizer=str(other))
    hashes = {contents(each)["model.tokenizer_files"] for each in named}
    assert len(hashes) == 1 and mine["model.tokenizer_files"] not in hashes


def test_an_identity_of_before_files_were_in_it_stays_readable(tmp_path: Path) -> None:
    found = checkpoint(tmp_path)
    benchmark, now = questions(found), contents(found)
    old = {"model.weights": now["model.weights"], "agent.prompts": now["agent.prompts"]}
    with open_folder(found, benchmark, old) as folder:
        write_played(folder, units(folder))
    assert evaluate(found, Asked())["played"] == 4
    for file in (tmp_path / "model").iterdir():
        file.unlink()
    assert evaluate(found, Asked())["played"] == 4, "all was played, so nobody wants the checkpoint any more"
