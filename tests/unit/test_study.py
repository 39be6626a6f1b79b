"""Studies: what is run again and what is not, what a failing arm leaves, and the arithmetic of paired differences."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from agents.recordfile import write_records
from benchmarks import controls, demo, shortcut, verdicts
from benchmarks import slate as slate_study
from benchmarks.plot import Curves, Line, Panel, Point, plot
from benchmarks.results_file import write_json
from benchmarks.study import (
    Changed,
    Lab,
    Plan,
    Resolved,
    Study,
    StudyError,
    bootstrap,
    column,
    difference,
    flat,
    resolve,
    run_figures,
    stream,
)
from cluster.config import load_config
from cluster.preflight import check_steps
from cluster.schema import RunConfig
from tests.builders import a_group


class Bench:
    """A study of two arms whose runs only count themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[tuple[str, int]] = []
        self.configs = {"a": {"lr": 1.0, "hops.2": 1.0}, "b": {"lr": 2.0, "hops.2": 1.0}}
        self.broken: dict[tuple[str, int], BaseException] = {}

    def arm(self, name: str) -> Callable[[int], Plan]:
        def plan(seed: int) -> Plan:
            def run() -> Mapping[str, float]:
                self.ran.append((name, seed))
                if (name, seed) in self.broken:
                    raise self.broken[name, seed]
                return {"score": self.configs[name]["lr"] + seed}

            return Plan(Resolved(self.configs[name], {"lr": 0.0, "added": 7}), [f"lr={self.configs[name]['lr']}"], run)

        return plan

    def study(self, seeds: tuple[int, ...] = (0, 1), again: list[str] | None = None) -> Study:
        self.ran.clear()
        arms = {name: self.arm(name) for name in self.configs}
        return Study("toy", arms, seeds, again=again, results=self.folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_arm_and_seed_runs_once_and_says_where_it_comes_from(bench: Bench) -> None:
    study = bench.study()
    table = study.run()
    assert bench.ran == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert table["b", 1] == {"score": 3.0} and study.complete(table) == [0, 1]
    kept = json.loads((bench.folder / "toy" / "b-seed1.json").read_text())
    assert {"command", "date", "commit", "overrides", "config", "config_hash", "figures"} <= set(kept)
    assert kept["config"] == bench.configs["b"] and not list(bench.folder.rglob("*.part"))
    assert bench.study().run() == table and bench.ran == []


def test_an_interrupted_study_goes_on(bench: Bench) -> None:
    bench.broken["b", 0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.study().run()
    assert [p.name for p in sorted((bench.folder / "toy").iterdir())] == ["a-seed0.json"]
    bench.broken.clear()
    bench.study().run()
    assert bench.ran == [("b", 0), ("a", 1), ("b", 1)]


def test_a_changed_config_stops_the_study_and_again_overrules(bench: Bench) -> None:
    bench.study().run()
    bench.configs["b"]["lr"] = 5.0
    with pytest.raises(Changed, match=r"b-seed0\.json is of another config: lr was 2\.0, is 5\.0\. .*--again b"):
        bench.study().run()
    assert bench.ran == []
    assert bench.study(again=["b"]).run()["b", 1] == {"score": 6.0}
    assert bench.ran == [("b", 0), ("b", 1)]
    bench.study(again=[]).run()
    assert len(bench.ran) == 4
    with pytest.raises(StudyError, match="no such arm; it has a, b"):
        bench.study(again=["c"])


def test_a_key_that_was_added_since_changes_nothing_while_it_has_its_default(bench: Bench) -> None:
    bench.study().run()
    bench.configs["a"]["added"] = 7
    bench.study().run()
    assert bench.ran == []
    bench.configs["a"]["added"] = 8
    with pytest.raises(Changed, match="added was 7, is 8"):
        bench.study().run()


def test_a_result_without_a_config_is_not_taken_for_ours(bench: Bench) -> None:
    write_json(bench.folder / "toy" / "a-seed0.json", {"date": "2026-01-01", "figures": {"score": 9}})
    with pytest.raises(Changed, match="does not say which config"):
        bench.study().run()
    (bench.folder / "toy" / "a-seed0.json").write_text('{"figures": ')
    with pytest.raises(Changed, match=r"a-seed0\.json cannot be read .* remove it"):
        bench.study().run()


def test_a_failing_arm_is_recorded_and_tried_again_the_others_go_on(bench: Bench) -> None:
    bench.broken["a", 0] = StudyError("no space left\non device")
    study = bench.study()
    table = study.run()
    assert study.failed == {"a seed 0": "no space left on device"} and study.complete(table) == [1]
    failure = bench.folder / "toy" / "a-seed0.failed.json"
    assert json.loads(failure.read_text())["failed"] == "no space left on device"
    assert study.close({"n": 1}, "<svg/>") == 1
    assert "a seed 0" in json.loads((bench.folder / "toy.json").read_text())["failed"]
    bench.broken.clear()
    study = bench.study()
    study.run()
    assert bench.ran == [("a", 0)] and not failure.exists() and study.close({"n": 1}, "<svg/>") == 0


def test_an_arm_may_need_what_another_one_measured(bench: Bench) -> None:
    study = bench.study(seeds=(0,))

    def needy(seed: int) -> Plan:
        return Plan(Resolved({"seconds": study.figures("a", seed)["score"]}), [], lambda: {"score": 0})

    study.arms = {"b": needy, "a": bench.arm("a")}
    study.run()
    assert study.failed == {"b seed 0": "there is no result of toy a seed 0 (a-seed0.json)"}
    study.failed.clear()
    assert study.run()["b", 0] == {"score": 0}


# ----------------------------------------------------------------------------------------------------------- runs


def finished(lab_folder: Path) -> Callable[[list[str], Path], None]:
    """Stands for the command: makes the run's folder."""

    def call(command: list[str], log: Path) -> None:
        name = next(c for c in command if c.startswith("name=")).removeprefix("name=")
        folder = lab_folder / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"command": command}))

    return call


def test_a_finished_run_is_found_and_an_unfinished_one_goes_on(tmp_path: Path) -> None:
    lab = Lab(tmp_path, call=finished(tmp_path))
    folder = lab.gumshoe("train", "configs/demo.yaml", "r", ["seed=1"])
    command = json.loads((folder / "summary.json").read_text())["command"]
    assert command[1:5] == ["gumshoe.py", "train", "configs/demo.yaml", "seed=1"] and "resume=auto" in command
    lab.call = lambda command, log: pytest.fail("the run is finished")
    assert lab.gumshoe("train", "configs/demo.yaml", "r", ["seed=1"]) == folder


def test_again_sets_an_earlier_run_aside(tmp_path: Path) -> None:
    lab = Lab(tmp_path, call=finished(tmp_path))
    lab.gumshoe("eval", "configs/demo.yaml", "r", [])
    lab.again = True
    lab.gumshoe("eval", "configs/demo.yaml", "r", [])
    assert len(list(tmp_path.glob("r*"))) == 2


def test_a_command_that_fails_ends_in_its_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stream(["python3", "-c", "print('step 1/2')"], tmp_path / "log")
    assert "    step 1/2" in capfd.readouterr().out and (tmp_path / "log").read_text() == "step 1/2\n"
    with pytest.raises(StudyError, match=r"gumshoe: no such file \(exit status 3"):
        stream(["python3", "-c", "print('gumshoe: no such file'); exit(3)"], tmp_path / "log")


# -------------------------------------------------------------------------------------------------------- configs


def test_place_and_name_are_no_part_of_a_config_values_and_weights_are() -> None:
    one = resolve("configs/demo.yaml", ["name=a", "storage_path=/x"])
    two = resolve("configs/demo.yaml", ["name=b"])
    assert one.hash == two.hash and one.values["world.synthetic.train.hops.2"] == 1.0
    assert len(one.values["model.path sha256"]) == 12
    assert resolve("configs/demo.yaml", ["learner.lr=1e-4"]).changes(one.values) == ["learner.lr was 0.0003, is 0.0001"]
    assert flat({"a": {"b": {2: 1}}, "name": "x", "ray": {"address": "y"}}) == {"a.b.2": 1}


def test_the_shortcut_arms_differ_in_the_advantage_alone() -> None:
    arms = [resolve(shortcut.CONFIG, shortcut.overrides(arm, 1, [])) for arm in shortcut.ARMS]
    assert arms[1].changes(arms[0].values) == ["advantage.name was 'c_grpo', is 'grpo'"]
    values = arms[0].values
    # outcome-only means: what grpo trains on, Verdict.reward, is the outcome; and rubrics are judged whatever they earn
    assert values["reward.reward"] == "outcome" and values["reward.lazy_rubrics"] is False
    assert values["train.max_minutes"] == 0  # the same number of steps, however long they take


def test_the_claim_needs_all_of_its_seeds() -> None:
    good, bad = [0.2, 0.1, 0.3], [0.2, -0.1, 0.3]
    assert shortcut.verdict([0, 1, 2], [good] * 3) is True
    assert shortcut.verdict([0, 1, 2, 3], [good, good, good, bad]) is True  # fixed beforehand for these three
    assert shortcut.verdict([0, 1, 2], [good, bad, good]) is False
    assert shortcut.verdict([0, 2], [good, good]) == "not decided: seed 1 missing"


@pytest.mark.parametrize(
    ("again", "trial", "main"),
    [
        (None, None, None),
        ([], [], []),
        (["sft"], [], ["sft"]),
        (["rft"], None, ["rft"]),
        (["sft-0.0006"], ["sft-0.0006"], None),
    ],
)
def test_again_reaches_the_trial_of_rates(
    again: list[str] | None, trial: list[str] | None, main: list[str] | None
) -> None:
    assert controls.again_for(again, [f"sft-{rate:g}" for rate in controls.RATES]) == trial
    assert controls.again_for(again, controls.ARMS) == main


def test_an_unknown_arm_is_still_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="has no such arm"):
        Study("controls", dict.fromkeys(controls.ARMS), [0], again=controls.again_for(["rtf"], controls.ARMS))  # type: ignore[arg-type]


def test_figures_of_a_run_whose_log_a_kill_has_torn(tmp_path: Path) -> None:
    success = {"mean": 0.5, "low": 0.4, "high": 0.6}
    summary = {
        "success_before": success,
        "success_after": success,
        "seconds": {"training": 5.0},
        "steps": 2,
        "sampled_tokens": 9,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [{"kind": "event", "step": 0, "message": "engines: {}"}, {"kind": "train", "step": 1, "time/step_s": 10.0}]
    lines = [json.dumps(row) for row in [*rows, rows[0], {**rows[1], "step": 2, "mismatch/kl_k3": 0.25}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], '{"kind": "train", "st', *lines[2:]]) + "\n")
    for moment in ("before", "after"):
        write_records(tmp_path / "eval" / f"{moment}.jsonl", [a_group()])
    found = run_figures(tmp_path)
    assert found["training_s"] == 20.0 and found["starts"] == 2 and found["kl_k3_max"] == 0.25


def test_more_than_half_of_the_shortcut_worlds_questions_can_be_guessed() -> None:
    for seed in (0, 1, 2):
        known = shortcut.guessable(seed, [])
        assert len(known) == 300 and 0.5 < np.mean(list(known.values())) < 0.7


def test_controls_train_as_long_as_rl_did_from_the_same_weights_on_the_same_tasks(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    rl = demo.plan(lab, 1, []).config
    rft = controls.rft(lab, "rft", 1, 300.0, []).config
    assert {c.split(" was ")[0] for c in rft.changes(rl.values)} == {
        "advantage.name", "learner.loss.mismatch", "train.steps", "train.max_minutes",
    }  # fmt: skip
    assert rft.values["train.max_minutes"] == 5.0
    sft = controls.sft(lab, "sft", 1, 300.0, 6e-4, []).config
    assert {k: sft.values[k] for k in rl.values} == dict(rl.values)  # its evaluations are the demo's
    stage = sft.values["warm-up warmup.stages"][0]
    assert (stage["name"], stage["max_seconds"], stage["lr"]) == ("expert", 300.0, 6e-4)
    assert sft.values["warm-up warmup.base sha256"] == rl.values["model.path sha256"]
    assert sft.values["warm-up scripts.expert.world.split"] == "train"
    assert sft.values["warm-up warmup.threads"] == 2
    assert not any(sft.values[f"warm-up scripts.expert.mix.{kind}"] for kind in ("early", "see_also", "uncited"))


# ------------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("arm", slate_study.ARMS)
def test_slate_arms_weigh_tokens_as_their_recipes_do_and_may_run(arm: str) -> None:
    asked = slate_study.overrides(arm, 1, 1000, [])
    recipe = "slate_3b" if arm in ("slate", "unjudged") else "search_r1_3b_grpo"
    aggregation = load_config(recipe, [], RunConfig).learner.aggregation
    assert aggregation == ("sequence_mean" if recipe == "slate_3b" else "token_mean")
    config = load_config(slate_study.demo.CONFIG, asked, RunConfig)
    assert config.learner.aggregation == aggregation and config.train.max_sampled_tokens == 1000
    check_steps(config)


def test_a_slate_run_is_read_by_what_it_trained(tmp_path: Path) -> None:
    def train(step: int, **more: float) -> dict[str, Any]:
        return {"kind": "train", "step": step, "episodes": 2, "episode/sampled_tokens": 50, "time/step_s": 10.0, **more}  # fmt: skip

    judged = {"reward/judge_calls": 1.5, "groups/samples": 20, "judge/asked": 9999.0}
    rows = [
        {"kind": "eval", "step": 0, "success/mean": 0.25}, train(1, **judged), train(2, **judged), {"kind": "eval", "step": 2, "success/mean": 0.5},
        train(3), {"kind": "eval", "step": 3, "success/mean": 0.75}, train(3, **{**judged, "ledger/dropped": 4.0}),
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert slate_study.curve(tmp_path) == {
        "step": [0, 2, 3], "tokens": [0, 200, 300], "seconds": [0, 20, 30], "success": [0.25, 0.5, 0.75],
    }  # fmt: skip
    found = slate_study.costs(tmp_path, attempts=1)
    assert found["judge calls per task"] == 15.0, (
        "of trained candidates: evaluations and dropped episodes are not counted"
    )
    assert slate_study.costs(tmp_path, attempts=2)["judge calls per task"] == 30.0
    assert found["dropped episodes"] == 4


def test_a_learning_curve_is_the_mean_over_seeds_as_far_as_all_of_them_got() -> None:
    table = {
        ("slate", 0): {"curve": {"tokens": [0, 100, 200], "success": [0.0, 0.5, 1.0]}},
        ("slate", 1): {"curve": {"tokens": [0, 150], "success": [0.2, 0.8]}},
    }
    line = slate_study.line(table, "slate", [0, 1], "tokens")
    assert [x for x, _ in line.mean] == [0, 100, 150]
    assert [y for _, y in line.mean] == pytest.approx([0.1, (0.5 + 0.6) / 2, (0.75 + 0.8) / 2])
    assert line.each == [[(0, 0.0), (100, 0.5), (200, 1.0)], [(0, 0.2), (150, 0.8)]]


def test_slates_claim_needs_all_of_its_seeds() -> None:
    assert slate_study.verdict([0, 1, 2], [0.1, 0.02, 0.2]) is True
    assert slate_study.verdict([0, 1, 2], [0.1, -0.02, 0.2]) is False
    assert slate_study.verdict([0, 2], [0.1, 0.02, 0.2]) == "not decided: seed 1 missing"


def test_a_verifiers_lessons_keep_what_its_run_measured_of_itself(tmp_path: Path) -> None:
    shares = {"success/mean": 0.25, "success/low": 0.2, "success/high": 0.31, "success/n": 300}
    rows = [
        {"kind": "train", "step": 1, "reward/mean": 0.1},
        {"kind": "eval", "step": 0, **shares, "parts/f1": 0.5, "parts/form": 1.0, "episode/searches": 0.0},
        {"kind": "eval", "step": 40, **shares, "success/mean": 0.44, "parts/f1": 0.7, "parts/form": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, last = verdicts.evaluations(tmp_path)
    assert first == {"step": 0, "success": [0.25, 0.2, 0.31], "n": 300, "parts": {"f1": 0.5, "form": 1.0}}
    assert (last["step"], last["success"][0], last["parts"]) == (40, 0.44, {"f1": 0.7})


def test_label_terms_are_a_mean_over_passages_by_the_published_reward(tmp_path: Path) -> None:
    told = [
        ("q1", "p1", "support", "support"), ("q1", "p1", "not_support", "not_support"),  # all right: 0.7
        ("q1", "p2", "support", "not_support"),  # all wrong; the absent label still counts 1: 0.35 / 3
        ("q2", "p2", "support", None), ("q2", "p2", "support", "support"),  # a reply that could not be read: 0
    ]  # fmt: skip
    keys = ("question", "passage", "gold", "predicted")
    lines = [dict(zip(keys, (*row[:3], [row[3]]), strict=True)) for row in told]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({**line, "nugget": "A is B."}) + "\n" for line in lines))
    assert verdicts.label_terms(path) == pytest.approx((0.7 + 0.35 / 3 + 0) / 3)


def test_a_paired_difference_counts_tasks_that_both_judged() -> None:
    a = {"task": ["x", "y", "z", "w"], "outcome": [1, 1, None, 0]}
    b = {"task": ["w", "y", "z", "x"], "outcome": [1, 1, 1, 0]}
    assert difference(a, b, "outcome").tolist() == [1.0, 0.0, -1.0]
    assert column(a, "outcome") == {"x": 1.0, "y": 1.0, "w": 0.0}
    with pytest.raises(StudyError, match="no judged task"):
        difference(a, {"task": ["q"], "outcome": [1]}, "outcome")


def test_bootstrap_by_hand() -> None:
    # two tasks, differences 0 and 1: the mean of a draw is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4
    found = bootstrap([np.array([0.0, 1.0])])
    assert found.as_list() == [0.5, 0.0, 1.0]
    assert bootstrap([np.ones(5), np.zeros(5)]).as_list() == [0.5, 0.5, 0.5]  # seeds are not drawn, tasks are
    # 400 tasks, half of them 1: the normal approximation, 1.96 * sqrt(1/4 / 400) = 0.049
    wide = bootstrap([np.tile([0.0, 1.0], 200)])
    assert wide.low == pytest.approx(0.451, abs=0.004) and wide.high == pytest.approx(0.549, abs=0.004)
    # pairing: two arms that are right on the same tasks differ by nothing, with certainty
    a = {"task": list("abcdefgh"), "outcome": [0, 1] * 4}
    assert bootstrap([difference(a, a, "outcome")]).as_list() == [0.0, 0.0, 0.0]


def test_lists_of_numbers_stand_on_one_line_and_read_back(tmp_path: Path) -> None:
    content = {
        "a": [1, None, 2.5],
        "b": [[1.0, 2.0], []],
        "c": {"d": ["x]", "y,\n z"]},
        "e": [],
        "f": {},
        "g": {"h": [{"i": 1}]},
    }
    text = write_json(tmp_path / "x.json", content).read_text()
    assert json.loads(text) == content and '"a": [1, null, 2.5]' in text


def test_a_plot_is_well_formed_and_escaped() -> None:
    rows = [("a < b", [Point(0.4, 0.3, 0.5, hollow=True), Point(0.9, colour=1)]), ("c", [Point(-0.2, -0.3, -0.1)])]
    curves = Curves("c", [Line("an <arm>", [(0, 0.1), (9e5, 0.9)], [[(0, 0.0), (9e5, 1.0)]] * 3)], "tokens", (0.0, 1.0))
    svg = plot("1 & 2", [Panel("p", rows, zero=True), Panel("empty span", [("x", [Point(0.0)])]), curves], "note")
    root = ElementTree.fromstring(svg)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 4 and circles[0].attrib["fill"] == "#fff"
    assert {"a < b", "an <arm>", "tokens"} <= {e.text for e in root.iter()}
    drawn = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(drawn) == 4 and len({e.attrib["stroke"] for e in drawn}) == 1, (
        "three seeds and their mean, in one colour"
    )
