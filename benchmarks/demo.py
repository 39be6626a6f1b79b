"""The demo for several seeds: `python benchmarks/demo.py --seeds 0 1 2`.

A seed names the run, the worlds (training and held-out) and the order of tasks; the warmed-up checkpoint is the same. At the end: success
before and after per seed, and the mean gain with a 95 % interval (bootstrap over held-out tasks, seeds kept apart).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plot import Panel, Point, plot
from benchmarks.study import Figures, Lab, Plan, Study, StudyError, bootstrap, difference, main, training

CONFIG = "configs/demo.yaml"


def overrides(seed: int, given: Sequence[str]) -> list[str]:
    worlds = [f"world.synthetic.train.seed={100 + seed}", f"world.synthetic.held_out.seed={200 + seed}"]
    return [f"seed={seed}", *worlds, *given]


def plan(lab: Lab, seed: int, given: Sequence[str]) -> Plan:
    return training(lab, CONFIG, f"demo-seed{seed}", overrides(seed, given))


def success_point(found: Mapping[str, Any], colour: int = 0, before: bool = False) -> Point:
    return Point(found["mean"], found["low"], found["high"], colour, before)


def before_after(rows: Sequence[tuple[str, Figures, int]]) -> Panel:
    """Success before and after training: (label, figures of the run, colour)."""
    return Panel(
        "success on held-out tasks: before (ring) and after (dot)",
        [
            (label, [success_point(f["success_before"], c, True), success_point(f["success_after"], c)])
            for label, f, c in rows
        ],
        bounds=(0.0, 1.0),
    )


def study(given: argparse.Namespace) -> int:
    lab = Lab(given.storage)
    arms = {"": lambda seed: plan(lab, seed, given.set)}
    made = Study("demo", arms, given.seeds, again=given.again, results=given.results, lab=lab)
    table = made.run()
    seeds = made.complete(table)
    if not seeds:
        raise StudyError(f"no seed succeeded; the first failure: {next(iter(made.failed.values()))}")
    done = [table["", seed] for seed in seeds]
    gain = bootstrap([difference(f["after"], f["before"], "outcome") for f in done])
    figures = {
        "seeds": seeds,
        "success_before": [round(f["success_before"]["mean"], 3) for f in done],
        "success_after": [round(f["success_after"]["mean"], 3) for f in done],
        "gain_mean": gain.mean, "gain_low": gain.low, "gain_high": gain.high,
        "steps": [f["steps"] for f in done], "training_s": [f["training_s"] for f in done],
        "pause_ms_median": [round(f["pause_ms_median"], 1) for f in done], "kl_k3_max": [f["kl_k3_max"] for f in done],
    }  # fmt: skip
    for seed, before, after in zip(seeds, figures["success_before"], figures["success_after"], strict=True):
        print(f"seed {seed}: success {before:.3f} -> {after:.3f}")
    print(f"gain: {gain}")
    rows = [(f"seed {seed}", f, 0) for seed, f in zip(seeds, done, strict=True)]
    svg = plot(
        "The demo", [before_after(rows), Panel("gain, all seeds", [("", [Point(gain.mean, gain.low, gain.high)])], zero=True)],
        f"{len(done[0]['after']['task'])} held-out tasks per seed, temperature 1; bars: 95 %",
    )  # fmt: skip
    return made.close(figures, svg)


if __name__ == "__main__":
    sys.exit(main(study, __doc__))
