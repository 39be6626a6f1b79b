"""Any actor of a run may die at any time: one run in which one after another does, and the run that goes on from it.

Two engines and two rollout workers, so that there is always somebody left to go on while a successor comes up. After each death
the run takes more optimiser steps than were under way, which new rollouts alone can feed. The run is synchronous: every trained
token carries the learner's version, and a successor that held other weights than the learner would be seen by their
probabilities. At last the driver dies, and all it had started must be gone. `resume=auto` finishes the run, past a checkpoint that
was damaged meanwhile, and asynchronously. In the end the journal proves, move by move, that relative to the restored weights
nothing was trained twice (`tests/books.py`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.books import Books, journal, replayed
from tests.runs import (
    ACTORS,
    SMALL,
    actors,
    balanced,
    end,
    events,
    finished,
    gumshoe,
    kill_driver,
    rows,
    rows_since,
    wait_for,
)

RUN = (
    "train", "configs/demo.yaml", "name=kill", "resume=auto", *SMALL, "train.checkpoint_every=3",
    "learner.lr=1e-5", "train.keep_checkpoints=3", "train.verify_every=1", "watch.silent_s=3", "watch.replace_s=10",
)  # fmt: skip
SYNCHRONOUS, ASYNCHRONOUS = "buffer.max_staleness=0", "buffer.max_staleness=1"
STEPS = 2
"""Optimiser steps after a death: only the first can be of episodes that were rolled out before it."""


@dataclass
class Killed:
    """A run that goes on while its actors are killed."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    log: Path

    def kill(self, kind: str, sign: int = signal.SIGKILL) -> int:
        """Kills (or stops) the oldest actor of that kind, as soon as there is one; returns its pid."""
        (pid, *_) = self.until(lambda: actors(self.process.pid, ACTORS[kind]))
        os.kill(pid, sign)
        return pid

    def until(self, what: Any, timeout_s: float = 240) -> Any:
        return wait_for(what, self.process, self.log, timeout_s)

    def says(self, pattern: str) -> None:
        """Waits for an event like `pattern`."""
        self.until(lambda: any(re.search(pattern, line) for line in events(self.run_dir)))

    def goes_on(self, steps: int = STEPS) -> None:
        """Waits until that many optimiser steps were taken from now on."""
        now = time.time()
        moves = self.run_dir / "ledger.jsonl"
        self.until(lambda: sum(m["op"] == "settle" and m["time"] > now for m in journal(moves)) >= steps)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run whose every actor was killed, and at last its driver."""
    storage = tmp_path_factory.mktemp("matrix")
    run_dir, log = storage / "kill", storage / "log"
    more = (f"storage_path={storage}", "fleet.num_engines=2", "rollout.workers=2", "train.steps=1000", SYNCHRONOUS)
    with gumshoe(*RUN, *more, log=log) as process:
        run = Killed(process, run_dir, log)
        run.until(lambda: rows(run_dir, "train"), 400)
        run.kill("sampler")
        run.goes_on()
        run.kill("rollout")
        run.says(r"rollout-\d+ died, and another took its place")
        run.goes_on()
        for kind in ("reward", "retrieval"):
            run.kill(kind)
            run.says(f"{kind} died")
            run.goes_on()
        run.kill("buffer")
        run.says("the buffer came back from its journal")
        run.goes_on()
        run.says("sampler-2 took its place")
        run.kill("engine")
        run.goes_on()
        stopped = [run.kill("rollout", signal.SIGSTOP), run.kill("retrieval", signal.SIGSTOP)]
        run.says(r"rollout-\d has not answered for \d+ s")
        run.says(r"retrieval has not answered for \d+ s")
        run.goes_on()
        assert not end(stopped, 20), "a stopped actor was replaced and not ended"
        run.says("sampler-3 took its place")
        run.kill("learner")
        run.until(lambda: actors(process.pid, ACTORS["learner"]))  # the next one comes up
        run.kill("sampler")
        run.says("learner 1 begins")
        run.goes_on()
        assert not kill_driver(process, 15), "the killed driver left actors behind"
    yield run_dir


def test_every_death_is_told_and_the_books_balance(killed):
    said = "\n".join(events(killed))
    for pattern in (r"sampler-\d+ was fenced", r"rollout-\d died with \d+ leases", r"reward died", r"retrieval died"):
        assert re.search(pattern, said), f"nothing says {pattern!r}:\n{said}"
    trained = rows(killed, "train")
    assert all(balanced(r) and r["staleness/max"] == 0 for r in trained)
    assert all(r["mismatch/kl_k3"] < 1e-6 for r in trained), "a sampler held other weights than the learner"
    books = replayed(journal(killed / "ledger.jsonl"))
    assert books.restores >= 1
    assert books.counts().get("dropped: worker_lost"), "the stopped worker held leases for sure"
    assert_rows_stand_in_the_journal(killed)


def test_it_is_resumed_past_a_damaged_checkpoint_and_ends(killed):
    """Asynchronously, and on fewer actors."""
    saved = sorted((killed / "checkpoints").glob("step-*"))
    weights = saved[-1] / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[len(whole) // 2] ^= 1
    weights.write_bytes(whole)
    learners = replayed(journal(killed / "ledger.jsonl")).incarnation + 1
    steps = int(saved[-2].name.removeprefix("step-")) + 6
    log = killed.parent / "log-resumed"
    resumed = (f"storage_path={killed.parent}", f"train.steps={steps}", ASYNCHRONOUS)
    with gumshoe(*RUN, *resumed, log=log) as process:
        output = finished(process, log, 400)
    assert saved[-1].name in output and "damaged" in output
    assert (saved[-1].parent / f"damaged-{saved[-1].name}").is_dir()
    after = rows_since(killed, f"learner {learners} begins")
    assert [r["step"] for r in after] == list(range(steps - 5, steps + 1)), "it went on from the checkpoint before"
    assert all(r["staleness/max"] <= 1 and balanced(r) for r in after) and any(r["staleness/max"] for r in after)
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["steps"] == steps and Path(summary["checkpoint"]).name == f"step-{steps:06d}"
    books = replayed(journal(killed / "ledger.jsonl"))
    books.agrees(summary["ledger"])
    assert len(books.trained_at) * 4 == summary["ledger"]["trained"] == steps * 8
    assert books.incarnation == learners and "dropped: lineage" in books.counts()
    assert_rows_stand_in_the_journal(killed)
    assert (killed / "report.html").exists()


def assert_rows_stand_in_the_journal(run_dir: Path) -> None:
    """Every train row tells of a step that the journal has settled, with as many episodes trained as it says."""
    books, settled = Books(), set()
    for move in journal(run_dir / "ledger.jsonl"):
        books.move(move)
        if move["op"] == "settle":
            settled.add((books.step, books.counts()["trained"]))
    assert {(row["step"], row["ledger/trained"]) for row in rows(run_dir, "train")} <= settled
