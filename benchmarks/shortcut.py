"""A shortcut world, C-GRPO against outcome-only GRPO: `python benchmarks/shortcut.py --seeds 0 1 2 [--share 1]`.

The world (`configs/shortcut.yaml`) names the answer under "See also" of the first page for about 60 % of the questions; with `--share 1` for
nearly all, so that guessing pays at least as well as following the trail (a study of its own, `shortcut_1`). Both arms start from
the same checkpoint and take the same number of optimiser steps on the same tasks; they differ in the key `advantage.name` alone:

- `c_grpo`: the outcome, and for right answers the share of rubrics that cited pages support and that hang together with the answer;
- `grpo`: the outcome alone (`Verdict.reward` with reward carr and `reward.reward=outcome` is the outcome).

Rubrics are judged in both arms and for every attempt (`lazy_rubrics: false`), so what one arm is not paid for is measured all the same.

Fixed before any run: the claim holds if the difference in mean |R_connect| (rubrics of the answer that are named, supported and
connected, a count per task), C-GRPO minus GRPO, over the paired held-out tasks after training, has a bootstrap 95 % interval above 0 in
each of the seeds 0, 1 and 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.plot import Panel, Point, plot
from benchmarks.study import Lab, Plan, Study, StudyError, Table, bootstrap, difference, main, training, values
from envs.world import WorldConfig, build_world

CONFIG = "configs/shortcut.yaml"
ARMS = ("c_grpo", "grpo")
PARTS = {
    "outcome": "success", "identified": "|R_identify|", "supported": "|R_support|", "connected": "|R_connect|",
    "cited_pages": "cited pages", "tool_calls": "tool calls",
}  # fmt: skip
CLAIM, CLAIM_SEEDS = "connected", (0, 1, 2)
SHARE = 0.7
"""Of the first questions about a start, in `configs/shortcut.yaml`."""


def overrides(arm: str, seed: int, given: list[str]) -> list[str]:
    worlds = [f"world.synthetic.train.seed={300 + seed}", f"world.synthetic.held_out.seed={400 + seed}"]
    return [f"seed={seed}", *worlds, f"advantage.name={arm}", *given]


def with_share(given: argparse.Namespace) -> tuple[str, list[str]]:
    """The study's name and the overrides of all its arms."""
    if given.share == SHARE:
        return "shortcut", given.set
    return f"shortcut_{given.share:g}", [
        f"world.synthetic.{w}.shortcut={given.share:g}" for w in ("train", "held_out")
    ] + given.set


def guessable(seed: int, given: list[str]) -> dict[str, bool]:
    """Held-out task id -> does the first page's "See also" name the answer?"""
    from cluster.config import load_config
    from cluster.schema import RunConfig

    config: WorldConfig = load_config(CONFIG, overrides(ARMS[0], seed, given), RunConfig).world.synthetic.held_out
    world = build_world(config)
    return {t.id: world.entities[t.meta["start"]].see_also in t.answers for t in world.tasks}


def summary(table: Table, seeds: list[int], given: list[str]) -> dict[str, Any]:
    """Means per arm and seed, and paired differences C-GRPO - GRPO with their intervals."""
    figures: dict[str, Any] = {"seeds": seeds, "tasks": [len(table[ARMS[0], s]["after"]["task"]) for s in seeds]}
    easy = {seed: guessable(seed, given) for seed in seeds}
    figures["guessable_share"] = [
        round(float(np.mean([easy[s][t] for t in table[ARMS[0], s]["after"]["task"]])), 3) for s in seeds
    ]
    for moment in ("before", "after"):
        figures[moment] = {
            arm: {part: [round(float(values(table[arm, s][moment], part).mean()), 3) for s in seeds] for part in PARTS}
            for arm in ARMS
        }
        for arm in ARMS:
            figures[moment][arm] |= _without_evidence([table[arm, s][moment] for s in seeds], [easy[s] for s in seeds])
    figures["difference"] = {
        part: [
            bootstrap([difference(table["c_grpo", s]["after"], table["grpo", s]["after"], part)]).as_list()
            for s in seeds
        ]
        for part in PARTS
    }
    figures["claim"] = "difference in mean |R_connect| above 0, 95 % interval, in each of the seeds 0, 1, 2"
    figures["holds"] = verdict(seeds, figures["difference"][CLAIM])
    figures["steps"] = {arm: [table[arm, s]["steps"] for s in seeds] for arm in ARMS}
    figures["training_s"] = {arm: [table[arm, s]["training_s"] for s in seeds] for arm in ARMS}
    return figures


def verdict(seeds: Sequence[int], found: Sequence[Sequence[float]]) -> bool | str:
    """Whether the claim holds, from the interval (mean, low, high) of each seed; undecided while one of its seeds is missing."""
    low = {seed: interval[1] for seed, interval in zip(seeds, found, strict=True)}
    missing = [str(seed) for seed in CLAIM_SEEDS if seed not in low]
    if missing:
        return f"not decided: seed {', '.join(missing)} missing"
    return all(low[seed] > 0 for seed in CLAIM_SEEDS)


def _without_evidence(tables: list[Any], easy: list[dict[str, bool]]) -> dict[str, list[float]]:
    """Success where the answer can be guessed and where it cannot; share of right answers with a rubric that lacks evidence."""
    found: dict[str, list[float]] = {"success_guessable": [], "success_other": [], "right_without_evidence": []}
    for table, known in zip(tables, easy, strict=True):
        columns = (table[k] for k in ("task", "outcome", "connected", "num_rubrics"))
        rows = [row for row in zip(*columns, strict=True) if row[1] is not None]
        for key, kept in (("success_guessable", True), ("success_other", False)):
            found[key].append(_mean([right for task, right, *_ in rows if known[task] is kept]))
        found["right_without_evidence"].append(_mean([c < n for _, right, c, n in rows if right]))
    return found


def _mean(numbers: list[Any]) -> float:
    return round(float(np.mean(numbers)), 3) if numbers else 0.0


def draw(table: Table, figures: dict[str, Any]) -> str:
    seeds = figures["seeds"]

    def interval(part: str, arm: str, seed: int, colour: int) -> Point:
        found = bootstrap([values(table[arm, seed]["after"], part)])
        return Point(found.mean, found.low, found.high, colour)

    first = Panel(
        "mean |R_connect|, C-GRPO - GRPO (fixed beforehand: above 0 in every seed)",
        [(f"seed {s}", [Point(*figures["difference"][CLAIM][i])]) for i, s in enumerate(seeds)], zero=True,
    )  # fmt: skip
    rest = [
        Panel(
            title,
            [(f"{arm} seed {s}", [interval(part, arm, s, colour)]) for s in seeds for colour, arm in enumerate(ARMS)],
        )
        for part, title in PARTS.items()
    ]
    note = f"{figures['tasks'][0]} held-out tasks per seed after {figures['steps']['grpo'][0]} steps, temperature 1; bars: 95 %"
    return plot("Shortcut world: citation rubrics against outcome only", [first, *rest], note)


def study(given: argparse.Namespace) -> int:
    lab = Lab(given.storage)
    name, changes = with_share(given)

    def plan(arm: str, seed: int) -> Plan:
        return training(lab, CONFIG, f"{name}-{arm}-seed{seed}", overrides(arm, seed, changes))

    made = Study(
        name, {arm: lambda seed, arm=arm: plan(arm, seed) for arm in ARMS}, given.seeds,
        again=given.again, results=given.results, lab=lab,
    )  # fmt: skip
    table = made.run()
    seeds = made.complete(table)
    if not seeds:
        raise StudyError(f"no seed has both arms; the first failure: {next(iter(made.failed.values()))}")
    figures = summary(table, seeds, changes)
    for part, title in PARTS.items():
        for s, *found in zip(
            seeds, *([figures["after"][a][part] for a in ARMS]), figures["difference"][part], strict=True
        ):
            mine, theirs, (mean, low, high) = found
            print(
                f"{title:<14} seed {s}: c_grpo {mine:.3f}  grpo {theirs:.3f}  difference {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    print(f"{figures['claim']}: {({True: 'holds', False: 'does not hold'}).get(figures['holds'], figures['holds'])}")
    return made.close(figures, draw(table, figures))


if __name__ == "__main__":
    sys.exit(main(study, __doc__, share=SHARE))
