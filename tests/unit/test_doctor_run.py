"""What limits a run and what is wrong with it: one hand-made run per verdict."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import gumshoe
from agents.report.findings import BROKEN, LIMIT, Finding, findings, phase_of
from agents.report.spans import Span
from cluster.doctor import examine_run
from cluster.rundir import RunFolder
from cluster.runlog import read_metrics
from cluster.schema import RunConfig
from cluster.watch import Teller

# A step of 10 s in which nothing stands out.
EVEN = {"time/step_s": 10.0, "time/wait_s": 1.5, "time/train_s": 4.5, "time/publish_s": 1.0, "time/checkpoint_s": 0.8}


def run(steps: int = 12, **values: Any) -> list[dict[str, Any]]:
    """Rows of a run of 10 s a step, the first one slow; keys have `__` for `/`."""
    row = {**EVEN, **{k.replace("__", "/"): v for k, v in values.items()}}
    rows = [{"kind": "train", "step": s, "time": 1000.0 + 10 * s, **row} for s in range(1, steps + 1)]
    rows[0]["time/step_s"] = 500.0  # it holds the set-up and must not count
    return rows


def leases(steps: int = 12, busy_s: float = 10.0, worker: str = "rollout-0") -> list[Span]:
    return [Span(worker, "rollout", 1000.0 + 10 * s, 1000.0 + 10 * s + busy_s, s) for s in range(steps + 1)]


def first(found: list[Finding]) -> str:
    return f"{found[0].what} -> {found[0].change}"


def test_a_healthy_run_has_no_problems() -> None:
    rows = run(groups__count=8, groups__zero_spread=1, mismatch__kl_k3=1e-5, masked__share=0.01)
    assert [f.rank for f in findings(rows, leases(), now=1125.0, free_bytes=1e12)] == [LIMIT]
    assert findings([]) == []


def test_the_learner_limits() -> None:
    found = findings(
        run(time__wait_s=0.3, time__train_s=8.5, time__forward_s=2.5, time__backward_s=5.3, time__pack_s=0.1), leases()
    )
    text = first(found)
    assert text.startswith("the learner limits: it waited 3 % of the time and trained 85 %")
    assert "forward and backward are 78 % of a step of 10 s" in text
    assert "train.num_workers" in text and "learner.max_tokens_per_microbatch" in text
    padded = first(
        findings(run(time__wait_s=0.3, time__train_s=8.5, learner__tokens=600, learner__computed_tokens=1000))
    )
    assert "40 % of what it computes is padding" in padded and "learner.layout=packed" in padded


WAITS: dict[str, Any] = {"time__wait_s": 6.1, "time__train_s": 2.0}


@pytest.mark.parametrize(
    ("parts", "says", "key"),
    [
        ({"generate": 8.5, "tools": 1.0, "judge": 0.5}, "sampling limits: the learner waited 61 % of a step of 10 s; generating is 85 %", "fleet.num_engines"),
        ({"generate": 1.0, "tools": 3.0, "judge": 1.0}, "the tools limit: the learner waited 61 % of a step of 10 s; searching and opening pages is 60 %", "service.concurrency"),
        ({"generate": 2.0, "tools": 1.0, "judge": 7.0}, "the judge limits: the learner waited 61 % of a step of 10 s; judging is 70 %", "judge.concurrency"),
        ({}, "rollouts limit: the learner waited 61 %", "rollout.workers"),
    ],
    ids=["sampling", "tools", "judge", "unknown"],
)  # fmt: skip
def test_rollouts_limit(parts: dict[str, float], says: str, key: str) -> None:
    text = first(findings(run(**WAITS, **{f"rollout__{k}_s": v for k, v in parts.items()}), leases()))
    assert text.startswith(says) and key in text


def test_a_long_tail_and_busy_engines_are_named() -> None:
    values = {"rollout__generate_s": 4.0, "rollout__tools_s": 0.0, "rollout__wall_s": 12.0, "engine__running": 14.2}
    text = first(findings(run(**WAITS, **values), leases()))
    assert "14 requests run at a time" in text and "the slowest attempt of a group takes 3.0 times the mean" in text


def test_admission_limits_when_learner_and_rollouts_take_turns() -> None:
    rows = run(**WAITS, rollout__generate_s=8.0, staleness__mean=0.0)
    turns = [*leases(busy_s=6.5), *leases(busy_s=5.5, worker="rollout-1")]
    text = first(findings(rows, [*turns, *leases(worker="learner")]))
    assert text.startswith("admission limits: the learner waited 61 %") and "without any lease 38 %" in text
    assert "buffer.max_staleness" in text
    stood_still = [s for s in leases(busy_s=6.0, worker="learner") if s.step % 2]  # the whole run did, not the rollouts
    assert first(findings(rows, [*turns, *stood_still])).startswith("sampling limits")


def test_publishing_checkpoints_and_the_rest_limit() -> None:
    text = first(findings(run(time__train_s=2.5, time__publish_s=3.0, publish__pause_ms=900.0), leases()))
    assert "publishing limits: 30 % of a step, 3 s each time (samplers stood still 900 ms of it)" in text
    assert "checkpoints limit: 35 %" in first(findings(run(time__train_s=2.5, time__checkpoint_s=3.5), leases()))
    assert "40 % of a step is in none" in first(
        findings(
            run(time__train_s=2.0, time__wait_s=1.0, time__publish_s=1.0, time__checkpoint_s=0.0, time__step_s=6.7)
        )
    )


def test_publish_and_checkpoint_are_found_outside_the_training_row() -> None:
    rows = [{k: v for k, v in r.items() if k not in ("time/publish_s", "time/checkpoint_s")} for r in run()]
    rows += [{"kind": "publish", "step": s, "time/publish_s": 2.5} for s in range(1, 13)]
    spans = [Span("learner", "checkpoint", 1000.0 + 10 * s, 1001.5 + 10 * s, s) for s in range(1, 13)]
    text = " ".join(f.what for f in findings(rows, [*leases(), *spans]))
    assert "publishing limits: 25 %" in text and "checkpoints limit: 15 %" in text


def test_what_is_broken_comes_first() -> None:
    rows = run(ledger__admitted=100, ledger__running=10, ledger__trained=80, **WAITS)
    found = findings(rows, leases(), free_bytes=2**29)
    assert [f.rank for f in found[:3]] == [BROKEN, BROKEN, LIMIT]
    assert "the ledger does not balance: 100 admitted, 90 accounted for" in found[0].what
    assert "the disk is nearly full: 0.50 GiB free" in found[1].what and "train.keep_checkpoints" in found[1].change


def test_no_step_for_long_names_who_is_waited_for() -> None:
    rows = [
        *run(ledger__running=30, ledger__ready=4),
        {"kind": "event", "step": 12, "time": 1125.0, "message": "the judge\nis slow"},
    ]
    now = 1120.0 + 600
    still = [*leases(70), Span("learner", "wait", 1110.0, 1115.0, 11), Span("learner", "train", 1115.0, 1120.0, 12)]
    found = findings(rows, still, now=now)
    assert found[0].rank == BROKEN
    assert (
        "no optimiser step for 10 min (one takes 10 s); learner did nothing since (last seen learner: train)"
        in found[0].what
    )
    assert "“the judge is slow” (step 12)" in found[0].what and "held 30 running, 4 ready" in found[0].change
    dead = findings(rows, [s for s in still if s.ended <= 1120], now=now)
    assert (
        "nobody wrote anything for 10 min: the driver was stopped or killed" in dead[0].what
        and "resume=auto" in dead[0].change
    )
    assert not any(f.rank == BROKEN for f in findings(rows, still, now=now, finished=True))
    assert not any(f.rank == BROKEN for f in findings(rows, still, now=1120.0 + 60))


def phase(name: str, at: float) -> dict[str, Any]:
    return {"kind": "event", "step": 12, "time": at, "message": f"{name} ..."}


def test_a_run_that_plays_its_last_evaluation_or_comes_up_again_is_not_broken() -> None:
    def broken(now: float, *more: dict[str, Any], steps: int = 50) -> str:
        found = findings([*run(), *more], now=now, config={"train": {"steps": steps}})
        return " ".join(f.what for f in found if f.rank == BROKEN)

    assert "the driver was stopped or killed" in broken(1120.0 + 600)
    assert "the driver was stopped or killed" in broken(1120.0 + 600, phase("training", 900.0))  # it made steps since
    assert not broken(1120.0 + 1200, phase("evaluation after training", 1121.0))
    assert not broken(1e6, phase("Ray, engines and actors", 1e6 - 60))  # resumed after days
    assert "“evaluation after training” began 67 min ago" in broken(
        1120.0 + 4000, phase("evaluation after training", 1121.0)
    )
    assert not broken(1e6, steps=12)


def test_groups_of_one_outcome_teach_raft() -> None:
    rows = run(groups__count=8, groups__zero_spread=7)
    assert any("teach nothing" in f.what for f in findings(rows, leases(), config={"advantage": {"name": "grpo"}}))
    assert not any("teach nothing" in f.what for f in findings(rows, leases(), config={"advantage": {"name": "raft"}}))


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    def says(healthy: bool, text: str) -> None:
        lines, well = examine_run(tmp_path / "run")
        assert text in "\n".join(lines) and well is healthy and all(len(line.splitlines()) == 1 for line in lines)

    now = time.time()
    says(False, "does not exist")
    (tmp_path / "run").mkdir()
    says(False, "holds no run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text("train: {batch_timeout_s: 7200}\n")
    says(True, "has no finished step yet")
    os.utime(config, (now - 5000, now - 5000))
    says(False, "BROKEN: it is stuck, or was stopped or killed: nothing came of it for 1h 23m")

    def told(*rows: dict[str, Any]) -> None:
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    told(phase("world, index and model", now - 4000), phase("Ray, engines and actors", now - 70))
    says(True, "has no finished step yet, at “Ray, engines and actors” since 1m")
    told(phase("Ray, engines and actors", now - 3000))
    says(False, "at “Ray, engines and actors” since 50m 00s; BROKEN")
    told(phase("training", now - 5000))
    says(True, "at “training” since")  # batch_timeout_s is longer than that
    told(phase("training", now - 8000), {"kind": "event", "step": 0, "time": now, "message": "sampler-0 died"})
    says(False, "nothing came of it for 2h 13m; the last event: sampler-0 died")
    (tmp_path / "run" / "summary.json").write_text("{}")
    says(True, "is finished; it trained nothing")


def test_parts_of_a_run_are_told_as_they_begin(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\n")
    with Teller(RunFolder(tmp_path), 3) as teller:
        with teller.phase("world, index and model"):
            pass
        with teller.phase("Ray, engines and actors"):
            lines, healthy = examine_run(tmp_path)
    assert healthy and "at “Ray, engines and actors” since 0s" in lines[0] and len(teller.seconds) == 2
    assert phase_of(read_metrics(tmp_path))[0] == "Ray, engines and actors"


def test_what_costs_learning() -> None:
    rows = run(
        mismatch__kl_k3=0.05, mismatch__cut=0.02, ratio__max=9.0, groups__count=8, groups__zero_spread=6, success=0.95,
        masked__share=0.25, masked__judge_down=12.0, masked__stale=3.0, skipped__nonfinite=0.5,
        unjudgeable__share=0.1, unjudgeable__judge_timeout=5.0,
        ledger__admitted=100, ledger__trained=70, ledger__dropped=30, dropped__stale=20, dropped__worker_lost=10,
    )  # fmt: skip
    text = "\n".join(f.what for f in findings(rows, leases()))
    for expected in (
        "sampler and learner disagree: KL (k3) 0.05, ratio up to 9; 2 % of the tokens were cut",
        "75 % of the groups teach nothing: all their attempts got the same reward (success 0.95, so the tasks are too easy)",
        "25 % of the attempts are left out of the loss (of a batch: judge_down 12.0)",
        "10 % of the attempts score 0 because no judge could judge them (of a batch: judge_timeout 5.0)",
        "30 % of the admitted episodes were dropped (20 % stale, 10 % worker_lost)",
        "6 of the last 11 optimiser steps were skipped",
    ):
        assert expected in text, expected


def test_restarts_and_rewinds() -> None:
    told = [
        "sampler-0 was fenced: gone",
        "sampler-1 took its place with weights v3",
        "rollout-2 died with 4 leases",
        "sampler-1 was fenced: silent",
    ]
    told += [
        "rollout-2 died (ActorDiedError); rollout-3 took its place",
        "learner 1 begins at step 5 (the one before was at 8)",
        "lease 3 failed: died",
    ]
    times = [10.0, 20.0, 30.0, 70.0, 31.0, 80.0, 90.0]
    rows = [
        *run(8),
        *run(12)[5:],
        *({"kind": "event", "step": 7, "time": t, "message": m} for t, m in zip(times, told, strict=True)),
    ]
    text = "\n".join(f.what for f in findings(rows, leases()))
    assert (
        "4 restarts (2 x sampler, 1 x rollout, 1 x learner); the last: “learner 1 begins at step 5 (the one before was at 8)” (step 7)"
        in text
    )
    assert "the learner went back 1 time; 3 steps were trained again" in text


def test_the_command_prints_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in run(time__wait_s=0.3, time__train_s=8.5))
    )
    lines, healthy = examine_run(tmp_path)
    assert not healthy and any("1. BROKEN: no optimiser step for" in line for line in lines)
    (tmp_path / "summary.json").write_text("{}")
    lines, healthy = examine_run(tmp_path)
    assert healthy and any("1. the learner limits" in line for line in lines)
    assert all(len(line.splitlines()) <= 1 for line in lines)


@pytest.mark.parametrize("path", ["agents/report/findings.py", "docs/observability.md"])
def test_every_key_it_names_exists(path: str) -> None:
    sections = {f.name: f.default_factory() for f in fields(RunConfig) if callable(f.default_factory)}
    text = (Path(gumshoe.ROOT) / path).read_text(encoding="utf-8")
    named = {m for m in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", text) if m.split(".")[0] in sections}
    assert len(named) > 8
    for name in named - {"ray.init", "ray.nodes"}:  # of Ray itself, not of our section
        node: Any = sections
        for part in name.split("."):
            assert part in node if isinstance(node, dict) else hasattr(node, part), (
                f"{path} names {name}, no key of the config"
            )
            node = node[part] if isinstance(node, dict) else getattr(node, part)
