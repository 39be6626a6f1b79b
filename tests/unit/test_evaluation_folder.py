"""An evaluation's folder over time: stages that are given alone, settings that ask for less, lines that are damaged, recordings that change."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.report.evaluation_load import load_evaluation
from agents.types import RecordError, Turn, Usage
from cluster.errors import UserError, redacted
from cluster.evaluation.config import EvalConfig
from cluster.evaluation.contents import contents
from cluster.evaluation.journal import TASKS, UNITS, VERDICTS, Folder, open_folder
from cluster.evaluation.plan import checks, questions
from cluster.evaluation.records import Played, State, Unit
from cluster.evaluation.score import score_units
from cluster.evaluation.stages import Asked, evaluate
from cluster.evaluation.summary import summarise
from cluster.machine import check_engines
from cluster.model import ModelShape
from cluster.progress import Progress
from envs.benchmarks.base import Benchmark, BenchmarkConfig
from rewards.config import RewardConfig
from tests.unit.test_evaluation import CANARY, config, played_units, secret, write_played

GIB = 1 << 30


@pytest.fixture
def played(tmp_path: Path) -> Iterator[tuple[EvalConfig, list[Played]]]:
    """An evaluation that was played, four questions twice each."""
    found = config(tmp_path, samples=2)
    with open_folder(found, questions(found), contents(found)) as folder:
        units = [replace(p, unit=p.unit._replace(config=folder.config)) for p in once_played()]
        write_played(folder, units)
    yield found, units


@functools.cache
def once_played() -> list[Played]:
    return played_units(Benchmark("world", tuple(questions(config(Path())).tasks), ()), samples=2)


# --------------------------------------------------------------------------------------------------- stages alone


def test_a_report_shows_the_verdicts_of_the_judge_that_was_scored(played: Any) -> None:
    found, _ = played
    shown = []
    for reward in ("outcome", "carr", "outcome"):
        found.reward = RewardConfig(name=reward, lazy_rubrics=False)
        summary = json.loads(Path(evaluate(found, Asked.of("judge,score"))["summary"]).read_text())
        data = load_evaluation(Path(found.storage_path) / found.name)
        judges = {data.verdict(sample.judged)[1] for samples in data.questions.values() for sample in samples}
        assert judges == {summary["judge_hash"]}
        shown += judges
    assert shown[0] == shown[2] != shown[1], "what was judged before is judged, and shown, no second time"


def test_a_stage_wants_nothing_that_only_another_one_needs(played: Any) -> None:
    found, _ = played
    found.policy.chat.api_key_env = "GS_NO_SUCH_KEY"
    assert evaluate(found, Asked.of("judge"))["unjudged"] == 0
    found.judge.kind, found.judge.api_key_env = "chat", "GS_NO_SUCH_KEY_EITHER"
    found.judge.base_url, found.judge.model = "http://127.0.0.1:9/v1", "judge"
    assert evaluate(found, Asked.of("score"))["units"]["unjudged"] == 8, "nobody of that judge has judged"
    found.samples = 3
    for stages, variable in (("judge", "GS_NO_SUCH_KEY_EITHER"), ("run", "GS_NO_SUCH_KEY")):
        with pytest.raises(UserError, match=f"{variable} is not set"):
            evaluate(found, Asked.of(stages))


def test_a_checkpoint_that_is_gone_is_scored(tmp_path: Path) -> None:
    found = config(tmp_path)
    found.policy.kind, found.agent.name, found.model.path = "checkpoint", "policy", str(tmp_path / "policy")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"weights")
    with open_folder(found, questions(found), contents(found)) as folder:
        write_played(folder, [replace(p, unit=p.unit._replace(config=folder.config)) for p in once_played()[:4]])
    (tmp_path / "policy" / "model.safetensors").unlink()
    assert evaluate(found, Asked.of("judge,score"))["mean"]["n"] == 4
    with pytest.raises(UserError, match="policy"):
        evaluate(replace(found, samples=2), Asked.of("run"))
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"others")
    with (
        pytest.raises(UserError, match=r"model.weights is '.*' \(was '"),
        open_folder(found, questions(found), contents(found)),
    ):
        pass


def test_a_stage_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds nothing that was played; give --stage run first"):
        evaluate(config(tmp_path), Asked.of("score"))
    assert not (tmp_path / "e").exists(), "else it would be held against the settings of the first run"


# ---------------------------------------------------------------------------------------------------- asking for less


def test_samples_and_probes_that_are_not_asked_for_any_more_do_not_count(played: Any, tmp_path: Path) -> None:
    found, units = played
    found.probes = ["closed_book"]
    with open_folder(found, questions(found), contents(found)) as folder:
        write_played(folder, [replace(units[0], probe="closed_book")])
        assert len(list(folder.played())) == 9
    assert evaluate(found, Asked.of("judge"))["unjudged"] == 0
    found.samples, found.probes = 1, []
    with open_folder(found, questions(found), contents(found)) as folder:
        assert {(p.unit.sample, p.probe) for p in folder.played()} == {(0, "")} and len(folder.keys()) == 4
    result = evaluate(found, Asked.of("judge,score,report"))
    summary = json.loads(Path(result["summary"]).read_text())
    assert result["mean"]["n"] == 4 and summary["samples_per_question"] == 1 and summary["samples"] is None
    assert "4 attempts of an earlier, larger `samples` are left out" in Path(result["report"]).read_text()


# ------------------------------------------------------------------------------------------------------ damaged lines


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        (TASKS, "{}", "holds a line that names no question"),
        (TASKS, "[1]", "holds a line that is no record"),
        (UNITS, '{"unit": ["a", [0], "c"], "state": "done"}', "holds a line that names no unit"),
        (UNITS, '{"unit": ["a", 0], "state": "done"}', "holds a line that names no unit"),
        (UNITS, '{"unit": ["a", 0, "c"], "state": "lost"}', "does not say how its unit ended"),
        (UNITS, '{"unit": ["a", 0, "c"]}', "does not say how its unit ended"),
        (UNITS, "7", "holds a line that is no record"),
        (UNITS, "{", "damaged record"),
        (VERDICTS, '{"unit": {}, "judge": "j"}', "holds a line that names no unit"),
    ],
)
def test_a_damaged_line_is_named_in_one_line(tmp_path: Path, name: str, line: str, said: str) -> None:
    found = config(tmp_path)
    with open_folder(found, questions(found), {}):
        pass
    with open(tmp_path / "e" / name, "a") as file:
        file.write(line + "\n")
    with (
        pytest.raises((UserError, RecordError), match=said) as error,
        open_folder(found, questions(found), {}) as folder,
    ):
        folder.keys()
        list(folder.judged())
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_sealed_line_that_is_damaged_is_named_too(tmp_path: Path) -> None:
    found, benchmark = config(tmp_path), secret()
    with open_folder(found, benchmark, {}) as folder:
        lines = (folder.path / TASKS).read_text().splitlines()
    first = json.loads(lines[0])
    for sealed in (first["sealed"][:-4], 5, "other:abcd"):
        (tmp_path / "e" / TASKS).write_text("\n".join([json.dumps(first | {"sealed": sealed}), *lines[1:]]) + "\n")
        with pytest.raises(UserError, match="holds a line that cannot be opened"), open_folder(found, benchmark, {}):
            pass


# --------------------------------------------------------------------------------------------------------- recordings


def test_a_recording_that_changes_is_another_one(played: Any, tmp_path: Path) -> None:
    source, units = played
    again = config(tmp_path, samples=2)
    again.name, again.policy.kind, again.policy.recorded = "again", "recorded", str(tmp_path / "e")
    again.benchmark = BenchmarkConfig()
    assert [evaluate(again, Asked.of("run"))["played"] for _ in range(2)] == [8, 8]
    write_played(Folder(tmp_path / "e", units[0].unit.config, questions(source)), units[:1])
    assert evaluate(again, Asked.of("judge"))["unjudged"] == 0, "what was taken over stays as it was"
    with pytest.raises(UserError, match=r"policy.recording is '\w+' \(was '\w+'\); give this one another name="):
        evaluate(again, Asked.of("run"))


# ------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: setattr(c.sandbox.journal, "record", True), "sandbox.journal.record would write"),
        (lambda c: (setattr(c.judge, "kind", "vllm"), setattr(c.judge, "record", "r.jsonl")), "judge.record would write"),
        (lambda c: (setattr(c.judge, "kind", "vllm"), setattr(c.judge, "cache_dir", "r")), "judge.cache_dir would write"),
        (lambda c: setattr(c.sandbox.guard, "canaries", [CANARY]), "the configuration holds a canary of the set"),
    ],
)  # fmt: skip
def test_settings_that_would_write_a_secret_set_in_clear_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    monkeypatch.setattr("cluster.evaluation.stages.questions", lambda config: secret())
    found = config(tmp_path)
    found.judge.model = "judge"
    change(found)
    with pytest.raises(UserError, match=said):
        evaluate(found, Asked.of("judge"))
    assert not (tmp_path / "e").exists()
    monkeypatch.setattr("cluster.evaluation.stages.questions", lambda config: replace(secret(), secret=False))
    with pytest.raises(UserError, match="holds nothing that was played"):
        evaluate(found, Asked.of("judge"))


@pytest.mark.parametrize(
    ("stage", "name"), [("judge", "metrics.jsonl"), ("score", "notes.json"), ("score", "journals/player-0.jsonl")]
)
def test_whatever_a_stage_leaves_in_clear_is_taken_away_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    benchmark, found = secret(), config(tmp_path)
    monkeypatch.setattr("cluster.evaluation.stages.questions", lambda config: benchmark)
    with open_folder(found, benchmark, contents(found)) as folder:
        write_played(folder, [Played(Unit(t.id, 0, folder.config), State.failed) for t in benchmark.tasks])
    kept = (folder.path / UNITS).read_bytes()

    def writes(config: Any, folder: Folder, *_: Any) -> dict[str, Any]:
        path = folder.path / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps({"event": f"the endpoint said: {benchmark.tasks[0].question}"}) + "\n")
        if stage == "judge":
            raise UserError("the judge is gone")
        return {}

    monkeypatch.setitem(_stages(), stage, writes)
    ended = ". It had ended with: the judge is gone" if stage == "judge" else "all else of the evaluation is in place"
    with pytest.raises(UserError, match=rf"stood in {Path(name).name} \(the text of question .*{ended}") as error:
        evaluate(found, Asked.of(stage))
    assert benchmark.tasks[0].question not in str(error.value)
    assert not (folder.path / name).exists() and (folder.path / UNITS).read_bytes() == kept


def _stages() -> dict[str, Any]:
    from cluster.evaluation import stages

    return stages._STAGES


def test_a_command_line_is_told_without_its_passwords() -> None:
    argv = [
        "gumshoe", "eval", "bcp", "benchmark.password=hunter2", "policy.chat.base_url=http://me:pw7@host/v1", "judge.extra_body.api_key=sk-1",
        "policy.chat.api_key_env=MY_KEY", "budget.tokens=400",
    ]  # fmt: skip
    text = redacted(f"{' '.join(argv)}\n\nValueError: wrong password 'hunter2'", argv)
    assert not [hidden for hidden in ("hunter2", "me:pw7", "sk-1") if hidden in text]
    assert "benchmark.password=[hidden]" in text and "api_key_env=MY_KEY budget.tokens=400" in text


@pytest.mark.parametrize("key", ["schlüssel", "two words", "line\nend"])
def test_a_key_that_no_header_can_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("GS_TEST_KEY", key)
    found = config(tmp_path)
    found.policy.chat.api_key_env = "GS_TEST_KEY"
    with pytest.raises(UserError, match="GS_TEST_KEY holds signs that no key has") as error:
        for check in checks(found):
            check()
    assert key not in str(error.value)


# ------------------------------------------------------------------------------------------------------ what is told


def test_estimated_tokens_are_noted() -> None:
    benchmark, units = Benchmark("b", tuple(questions(config(Path())).tasks[:2]), ()), once_played()[:2]

    def notes(units: list[Played]) -> list[str]:
        return [str(n) for n in summarise(benchmark, score_units(benchmark, units, [], []))["notes"]]

    assert not any("estimated" in n for n in notes(units))
    assert any(
        n.startswith("the endpoint did not count the tokens of 1 of 2 units")
        for n in notes([_estimated(units[0]), units[1]])
    )


@pytest.mark.parametrize(("answer", "said"), [("off", True), ("chain", False)])
def test_chains_that_are_open_from_the_start_are_noted(tmp_path: Path, answer: str, said: bool) -> None:
    found = config(tmp_path)
    found.benchmark, found.sandbox.guard.answer = BenchmarkConfig(kind="world_webdetective", limit=2), answer
    with open_folder(found, questions(found), contents(found)) as folder:
        write_played(folder, [Played(Unit(t.id, 0, folder.config), State.failed) for t in folder.benchmark.tasks])
    summary = json.loads(Path(evaluate(found, Asked.of("score"))["summary"]).read_text())
    assert any("sandbox.guard.answer=chain" in n for n in summary["notes"]) is said


def _estimated(played: Played) -> Played:
    def guessed(turn: Turn) -> Turn:
        return replace(turn, usage=replace(turn.usage or Usage(), estimated=True))

    assert played.trajectory is not None
    return replace(played, trajectory=replace(played.trajectory, turns=tuple(map(guessed, played.trajectory.turns))))


def test_a_log_holds_a_line_a_minute_and_the_last() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(300, unit="question", stream=stream, clock=lambda: now[0], live=False, every_s=60.0)
    for step in range(1, 301):
        now[0] += 1.0
        progress.update(step, {})
    shown = stream.getvalue().splitlines()
    assert len(shown) == 6 and shown[0].startswith("question   1/300") and shown[-1].startswith("question 300/300")


@pytest.mark.parametrize("agent", ["policy", "react"])
def test_a_tokenizer_that_is_not_there_is_refused_whoever_speaks(tmp_path: Path, agent: str) -> None:
    found = config(tmp_path)
    found.policy.kind, found.agent.name = "checkpoint", agent
    found.model.path, found.model.tokenizer = "envs/world/policy", str(tmp_path / "nothing")
    found.engine = replace(found.engine, max_model_len=2048)
    found.sampling.max_context = 2048
    with pytest.raises(UserError, match=r"tokenizer folder .*nothing does not exist; correct model\.tokenizer"):
        for check in checks(found):
            check()


def test_engines_that_do_not_fit_into_memory_are_refused_before_they_start(tmp_path: Path) -> None:
    found = config(tmp_path)
    found.policy.kind, found.agent.name, found.model.path = "checkpoint", "policy", "somewhere"
    found.fleet.num_engines, found.engine = 4, replace(found.engine, kv_cache_gb=2.0)
    shape = ModelShape("qwen3", 1 << 28, 64, 0)
    check_engines(found, shape, free_bytes=64 * GIB)
    with pytest.raises(
        UserError, match=r"not enough memory: about 1\d\.\d GiB .* 9\.0 GiB are free; set fleet.num_engines=1"
    ):
        check_engines(found, shape, free_bytes=9 * GIB)
    found.fleet.num_gpus = 1
    with pytest.raises(UserError, match=r"beside the GPUs .* use a machine with more memory"):
        check_engines(found, shape, free_bytes=GIB)
