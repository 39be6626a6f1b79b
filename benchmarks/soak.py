"""A run under fire: `python benchmarks/soak.py --minutes 30 --every 20`.

The demo trains while every 20 seconds a random process of it gets SIGKILL: a sampler, its engine, a rollout worker, the reward, the
retrieval, the buffer, the learner, or the driver, after which the same command goes on with what is there (`resume=auto`). Once a
second the journal and the log are read: the ledger must balance in every row, and every move must follow from the ones before
(`tests/books.py`: no episode is trained twice relative to the restored weights). When the minutes are over nobody is killed
any more, the run is told how many steps it has, and ends. Then the same number of steps is trained undisturbed, and the two
policies are compared on the same held-out tasks. Figures: `benchmarks/results/soak.json`.

A start takes most of a minute on two cores, and a start that is killed again and again trains nothing; so nobody is killed before the first step
after a start (`passed_over` counts these), unless `--at-start` is given.

Invariants: the order of victims follows from the seed (who is there when it is their turn does not); what was started is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results_file import RESULTS, write_result  # noqa: E402
from cluster.ledger import audit  # noqa: E402
from tests.books import Books, journal  # noqa: E402
from tests.runs import ACTORS, Tail, actors, balanced, gumshoe, kill_driver  # noqa: E402

KINDS = (*ACTORS, "driver")
PATIENT = (
    "resume=auto", "train.eval_every=0", "train.max_minutes=0", "train.max_failures=1000", "fleet.max_restarts=10000",
    "rollout.max_restarts=10000", "buffer.max_failures_in_a_row=10000",
)  # fmt: skip
"""What a person would call a crash loop is what this benchmark makes."""
RETURNS = re.compile(r"took its place|answers again|came back|learner \d+ begins")
GONE_S = 30.0
"""A killed driver's actors and engines must be gone after so long."""


@dataclass
class Watched:
    """What is read of a run while it goes on, and what was found wrong."""

    folder: Path
    books: Books = field(default_factory=Books)
    step: int = 0
    seen: float = 0.0
    """Unix time of the newest train row."""
    samples: int = 0
    rows: int = 0
    returns: int = 0
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._log, self._journal = Tail(self.folder / "metrics.jsonl"), Tail(self.folder / "ledger.jsonl")

    def look(self) -> None:
        self.samples += 1
        for row in self._log.new():
            if row["kind"] == "train":
                self.rows, self.step, self.seen = self.rows + 1, int(row["step"]), float(row["time"])
                if not balanced(row):
                    self.wrong.append(f"the ledger of step {row['step']} does not balance: {row}")
            elif row["kind"] == "event":
                self.returns += bool(RETURNS.search(row["message"]))
        for move in self._journal.new():
            try:
                self.books.move(move)
            except AssertionError as error:
                self.wrong.append(str(error))


@dataclass
class Soak:
    """One run under fire."""

    command: Sequence[str]
    watched: Watched
    log: Path
    rng: random.Random
    every_s: float
    at_start: bool
    kills: Counter[str] = field(default_factory=Counter)
    passed_over: int = 0
    legs: int = 0
    ended_itself: list[str] = field(default_factory=list)
    """How legs ended that nobody had killed."""
    gone_s: list[float] = field(default_factory=list)
    """Seconds until a killed driver's processes were gone."""

    def run(self, minutes: float) -> None:
        """Legs, one after the other, until the time is over; the last one is ended like the others, by SIGKILL."""
        ends = time.monotonic() + 60 * minutes
        while time.monotonic() < ends:
            self.legs += 1
            steps = self.watched.step
            with gumshoe(*self.command, log=self.log) as process:
                if not self._leg(process, ends):
                    self.ended_itself.append(last_line(self.log))
                    say(f"the run ended itself: {self.ended_itself[-1]}")
            if len(self.ended_itself) >= 5 and self.watched.step == steps:
                raise SystemExit(f"soak: the run does not go on: {self.ended_itself[-1]}; its log: {self.log}")

    def _leg(self, process: subprocess.Popen[bytes], ends: float) -> bool:
        """From one start to the death of the driver. False: it ended by itself."""
        began, next_kill = time.time(), time.monotonic() + self.every_s
        while process.poll() is None:
            time.sleep(1.0)
            self.watched.look()
            now = time.monotonic()
            if now >= ends:
                self._kill_driver(process)
                return True
            if now < next_kill:
                continue
            next_kill = now + self.every_s
            if self.watched.seen < began and not self.at_start:
                self.passed_over += 1
                continue
            kind = self._kill(process)
            say(f"step {self.watched.step:4}  {kind or 'nobody found'}")
            if kind == "driver":
                return True
        return False

    def _kill(self, process: subprocess.Popen[bytes]) -> str:
        """Kills one of the first kind, in random order, of which somebody is there; returns the kind."""
        for kind in self.rng.sample(KINDS, len(KINDS)):
            if kind == "driver":
                self._kill_driver(process)
                self.kills[kind] += 1
                return kind
            there = actors(process.pid, ACTORS[kind])
            if there:
                try:
                    os.kill(self.rng.choice(there), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.kills[kind] += 1
                return kind
        return ""

    def _kill_driver(self, process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        if left := kill_driver(process, GONE_S):
            self.watched.wrong.append(f"{left} outlived their driver by {GONE_S:g} s")
        self.gone_s.append(time.monotonic() - began)
        self.watched.look()


def finish(command: Sequence[str], steps: int, log: Path, watched: Watched, limit_s: float) -> dict[str, Any]:
    """Runs to the end without a disturbance. Returns the run's summary."""
    ends = time.monotonic() + limit_s
    with gumshoe(*command, f"train.steps={steps}", log=log) as process:
        while process.poll() is None:
            time.sleep(1.0)
            watched.look()
            if time.monotonic() > ends:
                raise SystemExit(f"soak: step {watched.step} of {steps} after {limit_s:.0f} s; its log: {log}")
        if process.returncode:
            raise SystemExit(f"soak: the run ended with {process.returncode}: {last_line(log)}")
    watched.look()
    return dict(json.loads((watched.folder / "summary.json").read_text(encoding="utf-8")))


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")[:300]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def shown(success: dict[str, float]) -> str:
    return f"{success['mean']:.3f} [{success['low']:.3f}, {success['high']:.3f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long somebody is killed")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0, help="of the order of victims")
    parser.add_argument("--at-start", action="store_true", help="kill also before a start has led to a step")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "soak")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of both runs, such as train.checkpoint_every=5"
    )
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended, as after Ctrl-C
    stamp = time.strftime("%Y%m%d-%H%M%S")
    storage: Path = arguments.storage.absolute() / stamp
    storage.mkdir(parents=True)

    def command(name: str) -> list[str]:
        every = ("train.checkpoint_every=5", "train.keep_checkpoints=3")
        return [
            "train",
            arguments.config,
            f"name={name}",
            f"storage_path={storage}",
            *PATIENT,
            *every,
            *arguments.overrides,
        ]

    began = time.monotonic()
    watched = Watched(storage / "disturbed")
    soak = Soak(
        [*command("disturbed"), "train.steps=100000"], watched, storage / "disturbed.log", random.Random(arguments.seed),
        arguments.every, arguments.at_start,
    )  # fmt: skip
    soak.run(arguments.minutes)
    steps = watched.step + 5
    say(f"nobody is killed any more; the run is to end at step {steps}")
    disturbed = finish(command("disturbed"), steps, soak.log, watched, 1800)
    minutes = (time.monotonic() - began) / 60
    proof = audit(move for move in journal(watched.folder / "ledger.jsonl") if move["op"] != "order")
    try:
        watched.books.agrees(disturbed["ledger"])
    except AssertionError as error:
        watched.wrong.append(f"the summary's ledger is not the journal's: {error}")

    say("the same number of steps, undisturbed")
    calm = Watched(storage / "undisturbed")
    began = time.monotonic()
    undisturbed = finish(command("undisturbed"), steps, storage / "undisturbed.log", calm, 600 + 60 * steps)
    before, after, alone = disturbed["success_before"], disturbed["success_after"], undisturbed["success_after"]
    within = alone["low"] <= after["mean"] <= alone["high"]
    write_result(
        "soak",
        {
            "minutes": round(minutes, 1), "kill_every_s": arguments.every, "seed": arguments.seed, "overrides": arguments.overrides,
            "kills": sum(soak.kills.values()), "kills_by_kind": dict(soak.kills), "passed_over": soak.passed_over,
            "driver_starts": soak.legs + 1, "ended_itself": soak.ended_itself, "returns_told": watched.returns,
            "gone_after_driver_s_max": round(max(soak.gone_s), 1),
            "steps": disturbed["steps"], "steps_trained": watched.books.steps_settled,
            "steps_lost_to_rewinds": watched.books.steps_settled - disturbed["steps"], "rewinds": watched.books.restores,
            "groups_returned": watched.books.returned, "episodes_by_place": watched.books.counts(),
            "samples": watched.samples, "rows_balanced": watched.rows, "moves_audited": proof["moves"],
            "wrong": watched.wrong[:10],
            "success_before": shown(before), "success_after": shown(after), "success_undisturbed": shown(alone),
            "within_undisturbed_interval": within, "minutes_undisturbed": round((time.monotonic() - began) / 60, 1),
        },
        arguments.results,
    )  # fmt: skip
    for line in watched.wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if watched.wrong or not within else 0


if __name__ == "__main__":
    sys.exit(main())
