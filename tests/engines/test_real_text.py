"""A user's own world by configuration alone: two optimiser steps of a randomly initialised Qwen3 with a large vocabulary, by PPO.

The real command in a process of its own, on the packages installed here, judged by a chat endpoint over HTTP.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.real_text import ROOT, figures, gold_found, overrides
from tests.support.chat_server import ChatServer
from tests.support.real_text import STATUS_FILE, make_inputs, parse_packages

LIMIT_S = 360
SMALL = (
    "buffer.groups_per_batch=2",
    "buffer.group_size=3",
    "sampling.max_turn_tokens=24",
    "train.eval_tasks=4",
    "train.eval_every=0",
    "advantage.name=gae",
    "learner.critic.kind=model",
    "learner.loss.kl_coef=0.001",
    "learner.loss.kl_in=reward",
)
MARK = "GUMSHOE_TEST_RUN"


def left_over(mark: str) -> list[str]:
    """Command lines of processes that carry the mark of a run in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and process.environ().get(MARK) == mark
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(" ".join(process.cmdline())[:120] or process.name())
        except (psutil.Error, OSError):
            continue
    return found


def segments() -> set[Path]:
    memory = Path("/dev/shm")
    return set(memory.glob("gumshoe-real_text-*")) if memory.is_dir() else set()


def test_two_steps_on_real_text_by_configuration_alone(tmp_path: Path) -> None:
    if not STATUS_FILE.is_file():
        pytest.skip("needs a Debian machine's list of packages")
    installed = sorted(parse_packages(STATUS_FILE.read_text(encoding="utf-8", errors="replace")), key=lambda p: p.name)
    inputs = make_inputs(tmp_path / "inputs", packages=installed, documents=500)
    assert inputs.figures["vocabulary"] >= 100_000
    before = segments()
    with ChatServer() as judge:
        arguments = [*overrides(inputs, judge.url, tmp_path / "runs", steps=2), *SMALL]
        command = [
            sys.executable,
            str(ROOT / "gumshoe.py"),
            "train",
            str(ROOT / "configs" / "real_text.yaml"),
            *arguments,
        ]
        mark = str(tmp_path)
        with (tmp_path / "console.log").open("wb") as console:
            done = subprocess.run(
                command,
                cwd=tmp_path,
                env=os.environ | {MARK: mark},
                stdout=console,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
            )
        asked = judge.asked
    said = (tmp_path / "console.log").read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, said[-4000:]
    run_dir = tmp_path / "runs" / "real_text"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    steps = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in steps] == [1, 2]
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]) for r in steps)
    assert steps[0]["gae/return_mean"] == 0, "nothing was right, and nothing had moved away from the reference"
    assert steps[1]["gae/kl_charged"] != 0 and steps[1]["value/loss"] > 0 and steps[1]["value/grad_norm"] > 0
    assert steps[0]["grad_norm"] > 0  # every answer is wrong, and yet something is trained: the entropy bonus
    for row in steps:
        books = {k.removeprefix("ledger/"): v for k, v in row.items() if k.startswith("ledger/") and k.count("/") == 1}
        admitted = books.pop("admitted")
        assert admitted == sum(books.values()) > 0, row
    assert steps[-1]["ledger/trained"] == 2 * 2 * 3
    # The first batch was sampled by the weights it trains: both sides agree on a head of 100,000 entries as well.
    assert steps[0]["staleness/max"] == 0 and abs(steps[0]["mismatch/kl_k3"]) < 1e-6

    # Every rollout was judged over HTTP, by outcome and by rubrics, and none was lost.
    assert asked["outcome"] >= 12 and asked["carr_identify"] >= 12 and "refused" not in asked
    evaluations = [r for r in rows if r["kind"] == "eval"]
    assert len(evaluations) >= 2 and all(r["success/n"] == 4 for r in evaluations)

    assert (run_dir / "report.html").stat().st_size > 10_000
    assert figures(run_dir, inputs, asked, 0.0)["steps"] == 2
    assert gold_found(inputs, tmp_path / "runs")["hops_1"] > 0.8
    for _ in range(50):  # engines end a moment after their parents
        if not (alive := left_over(mark)):
            break
        time.sleep(0.2)
    assert not alive
    assert segments() <= before
