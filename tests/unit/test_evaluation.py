"""An evaluation's folder and stages, without Ray: what it refuses, what it keeps, and what it never writes in clear."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.chat.config import ChatAgentConfig
from agents.sampling.config import SamplingConfig
from agents.types import Task
from cluster import cli
from cluster.config import CONFIGS, config_names, load_config, sections
from cluster.errors import UserError
from cluster.evaluation.config import BudgetConfig, ChatConfig, EvalConfig, differing, identity
from cluster.evaluation.contents import contents
from cluster.evaluation.engines import served
from cluster.evaluation.journal import SCORES, TASKS, UNITS, VERDICTS, Folder, open_folder
from cluster.evaluation.judge import judge, judge_hash
from cluster.evaluation.plan import checks, jobs, lacking, questions
from cluster.evaluation.records import Judged, Played, State, Unit
from cluster.evaluation.sealing import Sealer, guard, leaks
from cluster.evaluation.stages import Asked, evaluate
from cluster.evaluation.workers import Kit, Player
from cluster.rollout import RolloutConfig
from envs.benchmarks.base import Benchmark, BenchmarkConfig, BenchmarkError
from envs.config import SandboxConfig
from rewards.config import RewardConfig
from tests.support.chat_agent_server import ScriptedChat
from tests.support.sandbox_play import backend, world

CANARY = "INVENTED-CANARY-4711 of a set that does not exist"
TASKS_ = tuple(world().tasks[:4])


def config(folder: Path, **more: Any) -> EvalConfig:
    """An evaluation of the scripted agent in the tests' world."""
    found = EvalConfig(name="e", storage_path=str(folder), benchmark=BenchmarkConfig(kind="world"), **more)
    found.world = replace(found.world, seed=0, split="train", num_entities=30, num_tasks=4, hops={3: 1.0}, shortcut=1.0)
    found.policy.kind, found.agent.name = "chat", "tools"
    found.policy.chat = ChatConfig(base_url="http://127.0.0.1:9/v1", model="agent")
    found.judge.kind = "rule"
    return found


def secret(tasks: tuple[Task, ...] = TASKS_) -> Benchmark:
    marked = tuple(replace(t, meta={**t.meta, "canaries": [CANARY]}) for t in tasks)
    return Benchmark("hidden", marked, ("accuracy", "em"), secret=True, canaries=(CANARY,))


def played_units(benchmark: Benchmark, hash: str = "c", samples: int = 1) -> list[Played]:
    kit = Kit(
        "run", "tools", ChatAgentConfig(), 0.0, 0, BudgetConfig(), 60.0, SandboxConfig(), RolloutConfig(), SamplingConfig(), ChatConfig(),
    )  # fmt: skip

    async def all_of_them() -> list[Played]:
        player = Player(kit, backend(), chat_of=lambda session, seed: ScriptedChat())
        return [await player.play(t, Unit(t.id, s, hash)) for s in range(samples) for t in benchmark.tasks]

    return asyncio.run(all_of_them())


def write_played(folder: Folder, units: list[Played]) -> None:
    with folder.writer(UNITS) as writer:
        for unit in units:
            writer.write(unit)


# --------------------------------------------------------------------------------------------------------- config


EVALS = [name for name in config_names() if "benchmark" in sections(name)]


@pytest.mark.parametrize("name", EVALS)
def test_every_shipped_evaluation_loads_and_fits_together(name: str) -> None:
    found = load_config(name, [], EvalConfig)
    found.check()
    assert found.name and identity(found)["policy.kind"] == found.policy.kind
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("#")


def test_there_are_examples() -> None:
    assert {"eval_browsecomp_plus", "eval_demo", "eval_search_r1"} <= set(EVALS)


def _set(key: str, value: Any) -> Any:
    def change(found: EvalConfig) -> None:
        *path, last = key.split(".")
        section: Any = found
        for name in path:
            section = getattr(section, name)
        setattr(section, last, value)

    return change


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("agent.name", "toolz", "agent.name 'toolz' is unknown; did you mean 'tools'? There are policy, "),
        ("agent.name", "policy", "no chat endpoint does; name a chat agent"),
        ("policy.kind", "model", "policy.kind 'model' is unknown; one of checkpoint, chat, recorded"),
        ("policy.chat.model", "", "policy.chat.model is empty"),
        ("policy.chat.base_url", "here", "is not an http(s) address"),
        ("policy.chat.extra_body", {"n": 2}, "policy.chat.extra_body sets n, which the evaluation sets itself"),
        ("policy.kind", "recorded", "policy.recorded is empty"),
        ("corpus.source", "files", "corpus.source is 'files' and corpus.files is []; give corpus.files"),
        ("corpus.index", "somewhere", "set corpus.source=index"),
        ("corpus.source", "server", "needs retrieval.kind=remote or live"),
        ("retrieval.kind", "live", "brings a corpus of its own; set corpus.source=server"),
        ("probes", ["open_book"], "probes: 'open_book' is unknown; one of closed_book, oracle"),
        ("budget.tokens", -1, "budget.tokens -1 is negative"),
        (
            "budget.money",
            1.0,
            "budget.money is never spent without prices; give policy.chat.price_in and policy.chat.price_out",
        ),
        ("budget.seconds", 9999.0, "deadline_s=3600 ends a question before budget.seconds=9999 does"),
        ("agent.settings.overflow", "ask", "agent.settings: overflow 'ask' is not one of drop, stop"),
        ("samples", 0, "samples is 0; it must be at least 1"),
        ("metrics", ["acuracy"], "metrics[0] is 'acuracy'; it must be one of"),
        ("policy.chat.api_key_env", "GS_NO_SUCH_KEY", "the environment variable GS_NO_SUCH_KEY is not set"),
        ("benchmark.kind", "browsecomb", "benchmark.kind 'browsecomb' is unknown; did you mean 'browsecomp'"),
        ("benchmark.kind", "", "benchmark.kind is not set; one of world, "),
    ],
)
def test_what_is_wrong_is_one_line(key: str, value: Any, line: str, tmp_path: Path) -> None:
    found = config(tmp_path)
    _set(key, value)(found)
    with pytest.raises((UserError, BenchmarkError)) as error:
        for check in checks(found):
            check()
        questions(found)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "e.yaml", tmp_path / "out"
    path.write_text(
        f"name: e\nstorage_path: {out}\nbenchmark: {{kind: frames, path: /nowhere/test.tsv}}\nmodel: {{path: envs/world/policy}}\n"
        "engine: {max_model_len: 640}\nsampling: {max_context: 640}\nprotocol: {tools: {format_request: '', show_tools: false}}\n"
    )
    for overrides, line in (
        (["benchmark.knid=x"], "did you mean 'benchmark.kind'"),
        (["--stage", "score"], "Get it from"),
    ):
        assert cli.main(["eval", str(path), *overrides]) == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1 and not list(out.glob("e/*"))


def test_an_endpoint_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the policy's endpoint http://127.0.0.1:9/v1 does not answer \(ConnectError\)"
    ):
        evaluate(config(tmp_path), Asked())
    with pytest.raises(UserError, match="--stage 'juge' is unknown; stages are run, judge, score, report"):
        Asked.of("run,juge")
    with pytest.raises(UserError, match="holds nothing that was played; give --stage run first"):
        evaluate(config(tmp_path), Asked.of("score"))


def test_options_of_evaluations_are_refused_for_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "demo", "--retry-errors"]) == 2
    assert "--retry-errors is for evaluations; demo has no section benchmark" in capsys.readouterr().err


def test_identity_holds_what_an_answer_hangs_on_and_no_more(tmp_path: Path) -> None:
    def named(change: Any = None) -> dict[str, Any]:
        found = config(tmp_path)
        if change:
            change(found)
        return identity(found)

    before = named()
    same = {
        "samples": 4, "judge.kind": "chat", "rollout.workers": 3, "policy.chat.concurrency": 1, "benchmark.limit": 3, "probes": ["oracle"],
        "metrics": ["em"], "policy.chat.price_in": 2.0,
    }  # fmt: skip
    other = {
        "seed": 1, "agent.name": "react", "policy.chat.model": "b", "budget.calls": 9, "without_gold": True, "world.seed": 5,
        "retrieval.kind": "bm25", "sandbox.max_k": 7,
    }  # fmt: skip
    assert all(named(_set(key, value)) == before for key, value in same.items())
    for key, value in other.items():
        [said] = list(differing(before, named(_set(key, value))))
        assert said.startswith(f"{key} is ")


def test_identity_of_a_served_checkpoint_and_of_a_budget_of_money(tmp_path: Path) -> None:
    def named(*changes: tuple[str, Any]) -> dict[str, Any]:
        found = config(tmp_path)
        for key, value in (("policy.kind", "checkpoint"), ("agent.name", "react"), *changes):
            _set(key, value)(found)
        return identity(found)

    asked = "policy.chat.extra_body"
    assert list(differing(named(), named((asked, {"top_p": 0.5})))) == [f"{asked}.top_p is 0.5 (was None)"]
    assert not list(differing({k: v for k, v in named().items() if k != asked}, named())), "no setting came to be"
    paid = ("budget.money", 1.0), ("policy.chat.price_in", 2.0)
    assert list(differing(named(*paid), named(*paid, ("policy.chat.price_in", 3.0))))


def test_the_window_of_a_served_checkpoint_is_its_engines(tmp_path: Path) -> None:
    found = config(tmp_path)
    assert served(found).context_window == 0, "an endpoint says so by refusing"
    found.policy.kind, found.engine = "checkpoint", replace(found.engine, max_model_len=2048)
    assert served(found).context_window == 2048
    for given, kept in ((1000, 1000), (4096, 2048)):
        found.policy.chat.context_window = given
        assert served(found).context_window == kept


# --------------------------------------------------------------------------------------------------------- folder


def test_a_folder_belongs_to_one_identity_and_one_writer(tmp_path: Path) -> None:
    found = config(tmp_path)
    benchmark = questions(found)
    refused(found, benchmark, "evaluation 'e' is going on in", twice=True)
    with open_folder(config(tmp_path, samples=3), benchmark, {}):
        pass
    fewer = config(tmp_path, budget=BudgetConfig(calls=2))
    refused(
        fewer,
        benchmark,
        "holds an evaluation of other settings: budget.calls is 2 (was 0); give this one another name=",
    )
    with open_folder(replace(found, name="weights"), benchmark, {"model.weights": "a"}):
        pass
    refused(replace(found, name="weights"), benchmark, "model.weights is 'b' (was 'a')", extra={"model.weights": "b"})
    changed = replace(benchmark, tasks=(replace(benchmark.tasks[0], question="Another?"), *benchmark.tasks[1:]))
    refused(found, changed, "is not what it was when")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ledger.jsonl").write_text("{}")
    found.name = "other"
    refused(found, benchmark, "holds something else than an evaluation")


def refused(found: EvalConfig, benchmark: Benchmark, line: str, *, extra: Any = None, twice: bool = False) -> None:
    with contextlib.ExitStack() as stack:
        if twice:
            stack.enter_context(open_folder(found, benchmark, {}))
        with pytest.raises(UserError, match=re.escape(line)):
            stack.enter_context(open_folder(found, benchmark, extra or {}))


def test_what_was_played_is_skipped_and_what_failed_is_asked_for(tmp_path: Path) -> None:
    found = config(tmp_path, samples=2, probes=["closed_book"])
    with open_folder(found, questions(found), {}) as folder:
        first, second, *_ = folder.benchmark.tasks
        everything = jobs(found, folder, retry_errors=False)
        assert len(everything) == 4 * 3 and [j.unit.sample for j in everything[:8]] == [0] * 4 + [1] * 4
        done, failed = (
            played_units(folder.benchmark, folder.config)[0],
            Played(Unit(second.id, 0, folder.config), State.failed),
        )
        write_played(folder, [replace(done, state=State.failed, trajectory=None), done, failed])
        with open(folder.path / UNITS, "ab") as file:
            file.write(b'{"unit": ["torn')  # its writer was killed
        left = {job.key for job in jobs(found, folder, retry_errors=False)}
        again = {job.key for job in jobs(found, folder, retry_errors=True)}
        assert (first.id, 0, "") not in again and len(left) == 10 and again - left == {(second.id, 0, "")}
        write_played(folder, [replace(failed, state=State.done, trajectory=done.trajectory)])
        assert [p.state for p in folder.played()] == [State.done, State.done], "the last line of a unit counts"


def test_stages_judge_score_and_report_what_was_played(tmp_path: Path) -> None:
    found = config(tmp_path, reward=RewardConfig(name="outcome"))
    with open_folder(found, questions(found), contents(found)) as folder:
        units = played_units(folder.benchmark, folder.config)
        write_played(folder, [*units[:3], Played(units[3].unit, State.failed, error="the endpoint is gone")])
    result = evaluate(found, Asked.of("judge,score,report"))
    assert result["mean"]["n"] == 3 and result["mean"]["mean"] == 1.0 and result["units"]["failed"] == 1
    summary = json.loads(Path(result["summary"]).read_text())
    assert summary["excluded"] == [{"task": units[3].unit.task, "sample": 0, "error": "the endpoint is gone"}]
    assert Path(result["report"]).is_file() and len((tmp_path / "e" / SCORES).read_text().splitlines()) == 4

    before = (tmp_path / "e" / UNITS).read_bytes()
    evaluate(found, Asked.of("judge"))
    assert len((tmp_path / "e" / VERDICTS).read_text().splitlines()) == 3, "nobody is asked twice"
    found.reward = RewardConfig(name="carr", lazy_rubrics=False)
    again = evaluate(found, Asked.of("judge,score"))
    assert len((tmp_path / "e" / VERDICTS).read_text().splitlines()) == 6, (
        "another judge's verdicts come beside the first's"
    )
    assert again["mean"]["mean"] == 1.0 and (tmp_path / "e" / UNITS).read_bytes() == before


def test_two_evaluations_are_compared(tmp_path: Path) -> None:
    for name, without in (("whole", False), ("gone", True)):
        found = replace(config(tmp_path), name=name, without_gold=without)
        with open_folder(found, questions(found), contents(found)) as folder:
            write_played(folder, played_units(folder.benchmark, folder.config))
        asked = Asked.of("judge,score,report", against=str(tmp_path / "whole") if without else "")
        result = evaluate(found, asked)
    assert Path(result["comparison"]).is_file()
    made = json.loads((tmp_path / "gone" / "comparison.json").read_text())
    assert made["against"] == "whole" and made["runs"]["questions"] == 4 and made["without_evidence"]["full"]["n"] == 4
    with pytest.raises(UserError, match="--against /nowhere: there are no scores"):
        evaluate(found, Asked.of("report", against="/nowhere"))


def test_a_recording_is_evaluated_without_an_agent(tmp_path: Path) -> None:
    found = config(tmp_path)
    with open_folder(found, questions(found), contents(found)) as folder:
        write_played(folder, played_units(folder.benchmark, folder.config))
    again = config(tmp_path)
    again.name, again.policy.kind, again.policy.recorded = "again", "recorded", str(tmp_path / "e")
    again.benchmark = BenchmarkConfig()
    result = evaluate(again, Asked())
    assert result["mean"]["mean"] == 1.0 and result["mean"]["questions"] == 4 and result["played"] == 4
    again.policy.recorded = str(tmp_path)
    with pytest.raises(UserError, match="holds nothing that was played"):
        evaluate(again, Asked())


def test_a_judge_that_is_gone_ends_the_stage_and_leaves_what_was_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents.types import Verdict
    from cluster.services import RewardServer

    found = config(tmp_path, patience=2)
    given: list[Any] = []

    async def score(self: Any, group: Any) -> list[Verdict]:
        given.append(group.id)
        return [
            Verdict(1.0, {"outcome": 1.0}) if len(given) == 1 else Verdict.unavailable("outcome", "judge_unreachable")
        ]

    monkeypatch.setattr(RewardServer, "score", score)
    with open_folder(found, questions(found), {}) as folder:
        write_played(folder, played_units(folder.benchmark, folder.config))
        with pytest.raises(UserError, match=r"2 verdicts in a row could not be given, the last for judge_unreachable"):
            asyncio.run(judge(found, folder, None, lambda *_: None))
        assert [j.judge for j in folder.judged()] == [judge_hash(found)]


def test_evidence_that_the_corpus_lacks_is_counted() -> None:
    benchmark = Benchmark("b", TASKS_, ())
    assert lacking(benchmark, {d.id for d in world().documents}) == []
    gone = TASKS_[0].gold_docs[0]
    known = {d.id for d in world().documents} - {gone}
    short = sum(gone in t.gold_docs for t in TASKS_)
    assert lacking(benchmark, known)[0].startswith(f"the corpus lacks 1 evidence documents of {short} of 4 questions")


# -------------------------------------------------------------------------------------------------------- secrets


def test_a_secret_set_is_sealed_wherever_it_is_written(tmp_path: Path) -> None:
    found, benchmark = config(tmp_path), secret()
    with open_folder(found, benchmark, {}) as folder:
        units = played_units(benchmark, folder.config)
        write_played(folder, units)
        assert asyncio.run(judge(found, folder, None, lambda *_: None)) == {}
        written = {name: (folder.path / name).read_text() for name in (TASKS, UNITS, VERDICTS)}
        for name, text in written.items():
            assert leaks(text, benchmark) == "" and text.count("sealed") == 4, name
        assert list(folder.played()) == units and all(isinstance(j, Judged) for j in folder.judged())
        assert json.loads(written[UNITS].splitlines()[0])["unit"] == [units[0].unit.task, 0, folder.config]
        folder.save_tasks()
        assert (folder.path / TASKS).read_text() == written[TASKS], "a resumed folder keeps its lines"
    with pytest.raises(ValueError, match="sealed with the canary of another set"):
        Sealer(replace(benchmark, tasks=(), canaries=("quite another canary",))).unseal(
            json.loads(written[TASKS].splitlines()[0])["sealed"]
        )
    with pytest.raises(UserError, match="comes with no canary"):
        Sealer(Benchmark("b", TASKS_, (), secret=True))


def test_an_artefact_with_a_text_of_the_set_is_taken_away(tmp_path: Path) -> None:
    benchmark, clean, dirty = secret(), tmp_path / "clean.json", tmp_path / "dirty.json"
    clean.write_text('{"accuracy": 0.5}')
    dirty.write_text(json.dumps({"x": TASKS_[0].question}, indent=2))
    with pytest.raises(UserError, match=r"dirty.json \(the text of question") as error:
        guard([clean, dirty, tmp_path / "missing"], benchmark)
    assert clean.exists() and not dirty.exists() and TASKS_[0].question not in str(error.value)
    dirty.write_text(f"see {CANARY}")
    with pytest.raises(UserError, match="a canary of the set"):
        guard([dirty], benchmark, revealed=True)
    dirty.write_text(TASKS_[0].question)
    guard([dirty], benchmark, revealed=True)
    guard([dirty], Benchmark("open", TASKS_, ()))


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"policy.chat.extra_body": {}}, {"policy.chat.extra_body.reasoning_effort": "high"}, "reasoning_effort"),
        ({"world.hops.2": 1.0}, {"world.hops.2": 1.0, "world.hops.4": 5.0}, "world.hops.4"),
        ({"sandbox.max_calls": 5}, {"sandbox.max_calls": 5, "sandbox.new_setting": 1}, ""),
    ],
)
def test_names_that_a_user_adds_are_other_settings_and_new_defaults_are_not(
    before: dict, now: dict, named: str
) -> None:
    from cluster.evaluation.config import differing

    said = " ".join(differing(before, now))
    assert (named in said) if named else not said


def test_money_is_no_limit_for_a_checkpoint_that_speaks_token_by_token(tmp_path: Path) -> None:
    found = config(tmp_path, budget=BudgetConfig(money=1.0))
    found.policy.chat.price_out = 2.0
    found.check()
    found.policy.kind, found.agent.name = "checkpoint", "policy"
    with pytest.raises(ValueError, match=r"costs nothing that is counted; limit budget.tokens instead"):
        found.check()
