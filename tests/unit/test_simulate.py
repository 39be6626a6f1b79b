"""The simulated run: small cases by hand, invariants that no parameters may break, and what the command says and refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulate
from benchmarks.simulation import Run
from benchmarks.simulation_gpus import CARDS, Assumptions, Policy, engine_model, gpu_workload, learner_seconds
from benchmarks.simulation_parts import EngineModel, System, Turn, trimmed
from benchmarks.simulation_runs import CpuModel, Measured, check, latency_cells, load, turn_seconds, workload_of
from benchmarks.simulation_servers import Servers

ONE = EngineModel(step_s=0.01)
"""100 tokens per second, however many sequences."""
RESULTS = Path(simulate.RESULTS)


def one_turn(tokens: float, size: int = 1):
    """Every lease: `size` episodes of one turn."""
    return lambda lease, rng: [[Turn(0, tokens)] for _ in range(size)]


def alone(**more) -> System:
    """One group of one episode a batch, nothing costs anything but the engine."""
    return System(ONE, **{"group_size": 1, "groups_per_batch": 1, "max_staleness": 0, "groups_in_flight": 8, **more})


# ----------------------------------------------------------------------------------------------------- by hand


def test_a_synchronous_step_is_rollout_and_learner_and_publish_one_after_the_other() -> None:
    system = alone(learner_s=2.0, publish_s=0.5, judge_s=0.25, judges=1, lease_s=0.125, put_s=0.125)
    made = Run(system, one_turn(100), 3).play()
    first = 0.125 + 1.0 + 0.25 + 0.125 + 2.0
    assert [s.settled_at for s in made.steps] == pytest.approx([first, 2 * first + 0.5, 3 * first + 1.0])
    assert made.figures(1) == pytest.approx({
        "step_s": first + 0.5, "tokens_per_s": 100 / (first + 0.5), "staleness": 0.0, "dropped": 0.0, "train_s": 2.0, "wait_s": 1.5, "lease_s": 1.5,
    })  # fmt: skip


def test_with_staleness_one_the_slower_side_sets_the_step_and_every_token_is_one_batch_old() -> None:
    slow_learner = Run(alone(max_staleness=1, learner_s=2.0), one_turn(100), 8).play()
    assert slow_learner.figures(2)["step_s"] == pytest.approx(2.0)
    assert slow_learner.figures(2)["staleness"] == 1.0
    assert slow_learner.busy["learner"] > 0.9
    # one at a time in the engine: the rollout of the next batch begins when the last is done
    slow_engine = Run(alone(max_staleness=1, learner_s=0.25, groups_in_flight=1), one_turn(100), 8).play()
    assert slow_engine.figures(2)["step_s"] == pytest.approx(1.0)
    assert slow_engine.busy["engines"] == pytest.approx(1.0, abs=0.05)


def test_an_engine_is_shared_and_prefill_delays_everybody() -> None:
    # steps of 10 ms and 10 ms per sequence: alone 20 ms a token, two of them 30 ms
    engine = EngineModel(step_s=0.01, per_sequence_s=0.01, prefill_s=0.001, turn_s=0.1)
    system = replace(alone(group_size=2), engine=engine)

    def workload(lease, rng):
        return [[Turn(50, 10)], [Turn(50, 20)]]

    made = Run(system, workload, 1).play()
    # two prefills of 0.1 + 0.05, ten tokens of both, ten of the longer one alone
    assert made.lease_s == pytest.approx([0.3 + 10 * 0.03 + 10 * 0.02])
    assert made.sampled_tokens == pytest.approx(30)


def test_a_full_engine_makes_the_next_wait_and_context_slows_the_step() -> None:
    engine = EngineModel(step_s=0.01, per_context_s=0.0001, max_sequences=1)
    made = Run(replace(alone(group_size=2), engine=engine), lambda lease, rng: [[Turn(95, 10)]] * 2, 1).play()
    assert made.lease_s == pytest.approx([2 * 10 * (0.01 + 0.0001 * 100)])


def test_what_is_cached_is_not_computed_again_until_new_weights_come() -> None:
    engine = EngineModel(step_s=0.01, prefill_s=0.01)
    tools = [[Turn(100, 10, tool_s=1.0), Turn(20, 10)]]
    once = (100 + 20) * 0.01 + 20 * 0.01 + 1.0
    assert Run(replace(alone(), engine=engine), lambda lease, rng: tools, 1).play().lease_s == pytest.approx([once])
    # the second lease begins before the first publish, which comes while its tool runs: all 110 tokens again
    late = replace(alone(max_staleness=1, learner_s=1.5, groups_in_flight=1), engine=engine)
    assert Run(late, lambda lease, rng: tools, 2).play().lease_s == pytest.approx([once, once + 110 * 0.01])
    kept = replace(late, recompute=False)
    assert Run(kept, lambda lease, rng: tools, 2).play().lease_s == pytest.approx([once, once])


def test_a_publish_stops_the_engines_for_its_pause() -> None:
    system = alone(max_staleness=1, learner_s=0.5, publish_s=0.25, pause_s=0.125, groups_in_flight=1)
    made = Run(system, one_turn(100), 3).play()
    assert made.lease_s[0] == pytest.approx(1.0) and made.lease_s[1] == pytest.approx(1.125)


def test_an_overtaken_group_is_dropped_and_leaves_both_sides_of_the_rule() -> None:
    # lease 1 takes ten times as long as the others: three batches pass it
    system = alone(max_staleness=1, learner_s=0.25, groups_in_flight=2)
    made = Run(system, lambda lease, rng: [[Turn(0, 1000 if lease == 1 else 100)]], 12).play()
    assert made.dropped == 1
    assert all(age <= 1 for s in made.steps for age in s.ages) and len(made.steps) == 12


def test_a_member_over_age_is_withheld_and_its_siblings_train() -> None:
    engine = replace(ONE, max_sequences=1)
    system = replace(alone(group_size=2, max_staleness=1, learner_s=0.1, groups_in_flight=2), engine=engine, engines=2)

    def workload(lease, rng):  # the second lease begins with one member now and one much later
        return [[Turn(0, 1000)], [Turn(0, 100)] * 2] if lease == 1 else [[Turn(0, 100)], [Turn(0, 100)]]

    made = Run(system, workload, 6).play()
    assert all(len(s.ages) + s.withheld == 2 for s in made.steps)


def test_learner_and_engine_share_two_cores() -> None:
    # 1.5 + 1 cores asked of 2: both at 0.8 while both work
    system = alone(max_staleness=1, learner_s=1.0, cores=2.0, engine_cores=1.5, groups_in_flight=1)
    made = Run(system, one_turn(100), 6).play()
    assert made.figures(2)["step_s"] == pytest.approx(1.25, rel=0.01)
    assert Run(replace(system, cores=3.0), one_turn(100), 6).play().figures(2)["step_s"] == pytest.approx(1.0, rel=0.01)


def test_servers_are_in_order_of_arrival() -> None:
    two = Servers(2)
    assert [two.done(0.0, 1.0) for _ in range(4)] == [1.0, 1.0, 2.0, 2.0]
    assert two.done(5.0, 1.0) == 6.0 and two.share(6.0) == pytest.approx(5 / 12)
    assert Servers(0).done(3.0, 1.0) == 4.0  # no limit
    assert trimmed([1.0] * 9 + [100.0]) == 1.0


def test_a_system_that_cannot_move_says_so() -> None:
    with pytest.raises(RuntimeError, match="stands still at step 0"):
        Run(alone(groups_in_flight=0), one_turn(10), 1).play()


# -------------------------------------------------------------------------------------------------- invariants


@settings(deadline=None, max_examples=15)
@given(
    staleness=st.integers(0, 3), batch=st.integers(1, 4), size=st.integers(1, 4), engines=st.integers(1, 3), flight=st.integers(1, 6),
    workers=st.integers(1, 2), learner=st.floats(0.0, 3.0), publish=st.floats(0.0, 1.0), judges=st.integers(0, 2), slow=st.floats(0.0, 0.5),
    cores=st.sampled_from([0.0, 2.0]), fit=st.sampled_from([2, 64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_books_capacities_and_littles_law(
    staleness, batch, size, engines, flight, workers, learner, publish, judges, slow, cores, fit, seed
) -> None:
    engine = EngineModel(0.01, 0.002, 1e-6, 1e-4, 0.001, max_sequences=fit, kv_tokens=2000.0)
    system = System(
        engine, size, batch, staleness, engines, workers, flight, learner_s=learner, learner_per_token_s=1e-4, publish_s=publish,
        pause_s=publish / 2, judge_s=0.05, judges=judges, tools=2, tool_service_s=slow / 2, turn_s=0.002, route_s=0.001, lease_s=0.001,
        put_s=0.002, ship_s=0.001, cores=cores,
    )  # fmt: skip

    def workload(lease, rng):
        return [[Turn(20, 5 + rng.integers(20), slow)] * int(rng.geometric(0.3)) for _ in range(size)]

    moments = [0.0]

    def watch(run: Run) -> None:
        counts = run.ledger.counts()  # raises unless admitted = running + ready + in a batch + trained + dropped
        assert run.now >= moments[-1]
        moments.append(run.now)
        running = set(run.ledger.running_leases())
        assert counts.running == size * len(running) <= size * workers * flight
        assert set(run.leases) == running | set(run.ledger.ready_leases())
        room = system.batch_episodes * (staleness + 1 + run.ledger.version) - run.ledger.consumed
        assert counts.running + counts.ready < room + size  # the rule, checked before the last admission

    run = Run(system, workload, 6, seed, watch)
    made = run.play()
    assert len(made.steps) == 6 and all(a <= staleness for s in made.steps for a in s.ages)
    # Little: what was under way on average is what came, times how long it stayed
    stayed = size * (sum(made.lease_s) + sum(run.now - run.leases[i].began for i in run.ledger.running_leases()))
    assert made.running_mean * made.seconds == pytest.approx(stayed, rel=1e-6, abs=1e-6)
    # nobody does more than he can
    most_per_s = max(n / engine.step(n, 0.0) for n in (1, engine.max_sequences))
    assert made.sampled_tokens <= engines * most_per_s * made.seconds * (1 + 1e-9)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in made.busy.values()), made.busy
    shipped = sum(s.tokens for s in made.steps)
    assert shipped * 1e-4 + learner * len(made.steps) <= made.seconds * (1 + 1e-9)
    if judges:
        assert size * len(made.lease_s) * 0.05 <= judges * made.seconds + 1e-9
    assert made.admitted >= 6 * system.batch_episodes


def test_same_seed_same_run() -> None:
    system = System(EngineModel(0.01, 0.001), group_size=2, groups_per_batch=2, groups_in_flight=4, learner_s=0.5)

    def workload(lease, rng):
        return [[Turn(5, 10 + rng.integers(30), 0.1)] * 2 for _ in range(2)]

    first, again, other = (Run(system, workload, 5, seed).play().steps for seed in (1, 1, 2))
    assert first == again != other


# ------------------------------------------------------------------------------------- measured runs, and the check


def test_the_engines_seconds_per_turn_come_from_two_lengths_of_turns() -> None:
    # 10 ms a token and 0.1 s a turn, of 10 and of 100 tokens
    figures = {f"{s}: {k}": v for s, n in (("turns", 10), ("long", 100)) for k, v in (("tokens", n), ("requests", 1))}
    figures |= {f"{s}: ours tokens/s": {"median": n / (n * 0.01 + 0.1)} for s, n in (("turns", 10), ("long", 100))}
    assert turn_seconds({"figures": figures}) == pytest.approx(0.1)


def test_drawn_episodes_have_the_runs_lengths() -> None:
    run = Measured("x", "", 40, turns=(6.0,), sampled=(96.0,), tokens=(300.0,), spread=0.15, tool_s=0.05)
    rng = np.random.default_rng(0)
    made = [e for i in range(300) for e in workload_of(run)(i, rng)]
    assert np.mean([len(e) for e in made]) == pytest.approx(6.0, rel=0.03)
    assert np.mean([sum(t.sampled_tokens for t in e) for e in made]) == pytest.approx(96.0, rel=0.03)
    assert np.mean([sum(t.sampled_tokens + t.prompt_tokens for t in e) for e in made]) == pytest.approx(300.0, rel=0.03)
    assert all(e[-1].tool_s == 0.0 and all(t.tool_s == 0.05 for t in e[:-1]) for e in made)


def test_a_slower_machine_is_seen_by_its_learner_and_a_run_is_checked_against_its_own_figures() -> None:
    model = CpuModel(step_s=0.001, per_sequence_s=0.0002, learner_per_token_s=1e-4, turn_s=0.0)
    quick = Measured("quick", "", 8, 2, 2, turns=(2.0,), sampled=(10.0,), tokens=(40.0,), spread=0.0)
    first = check({"quick": replace(quick, found={"step_s": 1.0, "tokens_per_s": 1.0, "train_s": 1.0})}, model)[0]
    truth = check({"quick": replace(quick, found={**first["blind"], "train_s": 1.0})}, model)[0]
    assert all(abs(v) < 1e-3 for v in truth["blind_error"].values())
    half = {
        k: v * (0.5 if k == "tokens_per_s" else 2.0)
        for k, v in first["blind"].items()
        if k in ("step_s", "tokens_per_s")
    }
    seen = check(
        {
            "quick": replace(
                quick, found={**half, "step_s": first["blind"]["step_s"] * 2, "train_s": 2 / first["slower"]}
            )
        },
        model,
    )[0]
    assert seen["slower"] == pytest.approx(2.0, rel=0.01)
    assert seen["blind_error"]["step_s"] == pytest.approx(-0.5, abs=0.01)


def test_the_recorded_runs_can_be_read_and_name_what_they_vary() -> None:
    runs = load(RESULTS / "simulate" / "runs.json")
    assert "demo" in runs and all(isinstance(r.turns, tuple) and r.found["step_s"] > 0 for r in runs.values())
    assert {r.engines for r in runs.values()} == {1, 2} and {r.groups_per_batch for r in runs.values()} == {2, 8, 16}
    cells = latency_cells(json.loads((RESULTS / "pipeline.json").read_text(encoding="utf-8")))
    assert {r.max_staleness for r in cells} == {0, 1} and {r.tool_s for r in cells} == {0.05, 0.1, 0.25}


# -------------------------------------------------------------------------------------------------------- on GPUs


def test_a_card_and_a_policy_by_hand() -> None:
    policy, a = Policy("p", 4e9, 144e3, 0.0), Assumptions(memory_share=0.5, prefill_mfu=0.5, launch_s=0.0, kv_share=0.5)
    engine = engine_model(policy, CARDS["h100"], a)
    assert engine.step_s == pytest.approx(8e9 / 1.675e12)
    assert engine.per_context_s == pytest.approx(144e3 / 1.675e12)
    assert engine.prefill_s == engine.per_sequence_s == pytest.approx(8e9 / 494.5e12)
    assert engine.kv_tokens == pytest.approx(32e9 / 144e3)
    with pytest.raises(ValueError, match="does not fit 1 GPUs"):
        engine_model(replace(policy, parameters=20e9), CARDS["h100"], a)
    # two ranks: 60 tokens on one, 30 + 30 on the other; at one rank no gathering
    a = replace(a, mfu=0.5, optimiser_s=0.0, network=1e30)
    one = 6 * 4e9 / 494.5e12
    assert learner_seconds([30, 60, 30], 1, policy, CARDS["h100"], a) == pytest.approx(120 * one)
    assert learner_seconds([30, 60, 30], 2, policy, CARDS["h100"], a) == pytest.approx(60 * one)
    # more ranks than episodes help nobody, and a slow network is waited for
    assert learner_seconds([30, 60, 30], 64, policy, CARDS["h100"], a) == pytest.approx(60 * one)
    assert learner_seconds([30], 64, policy, CARDS["h100"], replace(a, network=1e9)) == pytest.approx(3 * 8.0)


def test_the_shape_of_the_4b_gives_its_published_sizes() -> None:
    policy = Policy.of(simulate.ROOT / "configs" / "shapes" / "qwen3_4b.json")
    assert policy.parameters == pytest.approx(4.02e9, rel=0.01)  # published: 4.0B
    assert policy.kv_bytes == 2 * 2 * 36 * 8 * 128
    with pytest.raises(ValueError, match="a model with experts"):
        Policy.of(simulate.ROOT / "configs" / "shapes" / "qwen3_30b_a3b.json")


def test_drawn_gpu_episodes_stay_in_the_context() -> None:
    a, rng = Assumptions(turns=60, max_context=20000), np.random.default_rng(0)
    made = [e for i in range(20) for e in gpu_workload(a)(i, rng)]
    assert len(made) == 160 and all(e for e in made)
    assert max(sum(t.prompt_tokens + t.sampled_tokens for t in e) for e in made) <= 20000


def test_scale_names_what_holds_it_up(tmp_path, capsys) -> None:
    (tmp_path / "simulate").mkdir()
    for name, content in (("check", {"errors": {}}), ("control", {"seconds": dict.fromkeys(("lease_s", "put_s", "ship_s", "pickle_s", "shard_s", "prompt_s"), 1e-4)})):  # fmt: skip
        (tmp_path / "simulate" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "simulate" / "runs.json").write_text('{"runs": []}')
    (tmp_path / "simulate" / "model.json").write_text(json.dumps({"model": asdict(CpuModel())}))
    small = ["--steps", "3", "--gpus", "8", "--assume", "turns=1", "judge_s=500", "task_spread=0"]
    before = simulate.FIXED, simulate.EACH
    simulate.FIXED, simulate.EACH = 16, 2
    try:
        assert simulate.main(["--parts", "predict", "--results", str(tmp_path), *small]) == 0
    finally:
        simulate.FIXED, simulate.EACH = before
    made = json.loads((tmp_path / "simulate" / "scale.json").read_text())
    assert made["inputs"]["never run on a GPU"] and made["inputs"]["assumed"]["judge_s"] == 500
    # nothing queues: episodes under way are bounded by admission, so less latency and more staleness help alike
    assert {r["held_up_by"] for r in made["rows"]} <= {"judges", "staleness bound"}
    assert made["rows"][0]["gains"]["judges"] > 0.5 > 0.1 > made["rows"][0]["gains"]["engines"]
    assert "Simulated; no GPU was measured" in (tmp_path / "simulate.svg").read_text()
    assert "held up by" in capsys.readouterr().out


def test_the_page_lists_every_assumption_with_its_default() -> None:
    page = (simulate.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert [f"| `{k}` | {v:g} |" for k, v in asdict(Assumptions()).items() if f"| `{k}` | {v:g} |" not in page] == []


def test_the_page_has_every_recorded_row() -> None:
    page = (simulate.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "simulate" / "scale.json").read_text(encoding="utf-8"))["rows"]
    assert {r["scenario"] for r in rows} == set(simulate.SCENARIOS)
    for r in rows:
        held = r["held_up_by"] + (f" ({r['gains'][r['held_up_by']]:+.0%})".replace("%", " %") if "gains" in r else "")
        line = (
            f"| {r['scenario'].removeprefix('batch of ')} | {r['gpus']:,} | {r['tokens_per_s'] / r['gpus']:.0f} | {r['step_s']:,.0f} | "
            f"{r['staleness']:.2f} | {100 * r['dropped']:.1f} % | {held} |"
        )
        assert line in page, line


def test_the_recorded_errors_are_those_of_the_recorded_rows(capsys) -> None:
    recorded = json.loads((RESULTS / "simulate" / "check.json").read_text(encoding="utf-8"))
    assert simulate.show_check(recorded["rows"]) == recorded["errors"]
    runs = load(RESULTS / "simulate" / "runs.json")
    for row in recorded["rows"]:
        if row["run"] in runs:
            assert row["measured"].items() <= runs[row["run"]].found.items()
    assert capsys.readouterr().out.count("fitted on") == len(simulate.FITTED_ON)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--assume", "mfuu=0.4"], "with a name of"), (["--assume", "mfu=fast"], "is not a number"), (["--assume", "mfu=0"], "above 0"),
        (["--read", "x", "nowhere", "y", "--results", "nowhere"], "not the folder of a training run"), (["--gpus", "1"], "at least 2"), (["--shape", "nowhere.json"], "nowhere.json"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(argv, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        simulate.main(["--parts", "predict", *argv])
    assert ended.value.code == 2 and said in capsys.readouterr().err
