"""SLATE against what it is compared with, at equal generated tokens: `python benchmarks/slate.py --seeds 0 1 2 [--tokens 400000]`.

The demo's policy and world with questions of two to four hops, judged by the rule judge. Every arm ends with the batch that reaches the same number of
sampled tokens, those of discarded candidates included; all train 16 tasks a step.

- `slate`: truncated sampling, 5 candidates a step, step judges;
- `grpo`: Search-R1's GRPO: 5 trajectories a task, exact match;
- `stepsearch`: the same trajectories with StepSearch's reward (information gain and redundancy), GRPO in place of its PPO, so that arms differ in the reward;
- `untruncated`: 5 trajectories a task, each rewarded by the sum of its steps' judgements (no truncation);
- `unjudged`: truncated sampling in which only an answer earns, its exact match (no step judge).

Arms with truncated sampling weigh tokens as SLATE's recipe does (`sequence_mean`), the others as Search-R1's (`token_mean`); the rest is the demo's.

Fixed before any run: the claim holds if held-out success at the end (300 tasks, full trajectories, temperature 1), `slate` minus `grpo`, over the paired
held-out tasks of the seeds 0, 1 and 2 together, has a bootstrap 95 % interval above 0. It is reported either way, and so are the same differences from the
other arms, of which nothing was fixed.

Beside it: held-out success at each evaluation on the way (100 tasks) and at the end, against tokens and against seconds of training, those evaluations
included; judge calls per trained task, cache hits among them; the share of prompt tokens that the prefix cache held.

Where the signal goes: `alike` is the share of groups of the first 8 steps whose members were all rewarded alike, so that they teach nothing (of a task's
attempts, or of a step's candidates), and `entropy` the policy's, in nats per token, meanwhile; read from the runs' folders where they still are.

Tokens are those of trained batches. Of episodes that were dropped, and of those under way when the run ended, nobody counts them; `dropped episodes` says
how many were dropped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import demo
from benchmarks.plot import Curves, Line, Panel, Point, plot
from benchmarks.study import (
    Figures,
    Lab,
    Plan,
    Study,
    StudyError,
    bootstrap,
    difference,
    main,
    resolve,
    run_figures,
    values,
)
from cluster.runlog import read_metrics

K, BUDGET, TASKS = 5, 10, 16
HOPS = "{2: 1.0, 3: 1.0, 4: 1.0}"
COMMON = (
    f"world.synthetic.train.hops={HOPS}", f"world.synthetic.held_out.hops={HOPS}", "train.steps=2000", "train.max_minutes=0",
    f"buffer.groups_per_batch={TASKS}", "sandbox.max_searches=12", "sandbox.max_opens=12", "sampling.max_context=800", "engine.max_model_len=800",
    "train.eval_every=8", "train.eval_tasks_during=100", "advantage.name=grpo", "learner.max_tokens_per_microbatch=4096",
)  # fmt: skip
FULL = (f"buffer.group_size={K}", "learner.aggregation=token_mean")
STEPS = (
    "buffer.group_size=1", "sampling.sampler=steps", f"sampling.steps.k={K}", f"sampling.steps.budget={BUDGET}", "reward.name=slate",
    f"reward.slate.budget={BUDGET}", "learner.aggregation=sequence_mean",
)  # fmt: skip
ARMS = {
    "slate": STEPS,
    "grpo": (*FULL, "reward.name=outcome"),
    "stepsearch": (*FULL, "reward.name=stepsearch"),
    "untruncated": (*FULL, "reward.name=slate", f"reward.slate.budget={BUDGET}", "reward.slate.whole=steps"),
    "unjudged": (*STEPS, "reward.slate.judge=outcome"),
}
CLAIM_SEEDS = (0, 1, 2)
AXES = ("tokens", "seconds")


def overrides(arm: str, seed: int, tokens: float, given: Sequence[str]) -> list[str]:
    return demo.overrides(seed, [*COMMON, f"train.max_sampled_tokens={int(tokens)}", *ARMS[arm], *given])


def curve(folder: Path) -> dict[str, list[float]]:
    """Per evaluation: step, tokens sampled and seconds trained by then, success. Of a step that was taken twice, the last."""
    rows = read_metrics(folder)
    train = {int(r["step"]): r for r in rows if r["kind"] == "train"}
    success = {int(r["step"]): float(r["success/mean"]) for r in rows if r["kind"] == "eval"}
    steps = sorted(train)
    tokens = accumulate(train[s]["episodes"] * train[s]["episode/sampled_tokens"] for s in steps)
    seconds = accumulate(train[s].get("time/step_s", 0.0) for s in steps)
    by_then = {0: (0.0, 0.0)} | dict(zip(steps, zip(tokens, seconds, strict=True), strict=True))
    points = [(s, *by_then[s], success[s]) for s in sorted(success) if s in by_then]
    return {name: [round(p[i], 4) for p in points] for i, name in enumerate(("step", *AXES, "success"))}


def costs(folder: Path, attempts: int) -> dict[str, float]:
    """Judge calls per trained task of so many attempts, by the verdicts of what was trained; what the prefix caches held; episodes that were
    not trained."""
    train = list({int(r["step"]): r for r in read_metrics(folder) if r["kind"] == "train"}.values())
    asked = sum(r.get("reward/judge_calls", 0.0) * r.get("groups/samples", 0.0) for r in train)
    tasks = sum(r["episodes"] for r in train) / attempts
    hits = [r["engine/prefix_hits"] for r in train if "engine/prefix_hits" in r]
    shared = [r["learner/shared_tokens"] / max(1.0, r["learner/tokens"]) for r in train if "learner/shared_tokens" in r]
    return {
        "judge calls per task": round(asked / max(1.0, tasks), 1), "prefix hits": round(float(np.mean(hits)), 3) if hits else 0.0,
        "shared in the learner": round(float(np.mean(shared)), 3) if shared else 0.0,
        "dropped episodes": max((r.get("ledger/dropped", 0.0) for r in train), default=0.0),
    }  # fmt: skip


def early(folder: Path, steps: int = 8) -> dict[str, float]:
    """Of the first steps: the share of groups (of attempts, or of a step's candidates) whose rewards were all equal, and the policy's entropy.
    Nothing when the run's folder is gone."""
    rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    train = {int(r["step"]): r for r in rows if r["kind"] == "train" and r["step"] <= steps}.values()
    if not train:
        return {}
    alike, groups = (sum(r[f"groups/{key}"] for r in train) for key in ("zero_spread", "count"))
    return {
        "alike": round(alike / max(1, groups), 3),
        "entropy": round(float(np.mean([r["entropy"] for r in train])), 4),
    }


COSTS = ("judge calls per task", "prefix hits", "shared in the learner", "dropped episodes")


def reached(found: Mapping[str, Any], share: float) -> float | None:
    """Tokens at the first evaluation with that success; None if there is none."""
    return next((t for t, s in zip(found["tokens"], found["success"], strict=True) if s >= share), None)


def line(table: Mapping[tuple[str, int], Figures], arm: str, seeds: Sequence[int], axis: str) -> Line:
    """The learning curve of an arm: each seed's evaluations, and their mean where every seed has come so far, linear between evaluations."""
    found = [table[arm, seed]["curve"] for seed in seeds]
    end = min(f[axis][-1] for f in found)
    places = sorted({x for f in found for x in f[axis] if x <= end})
    mean = [(x, float(np.mean([np.interp(x, f[axis], f["success"]) for f in found]))) for x in places]
    return Line(arm, mean, [list(zip(f[axis], f["success"], strict=True)) for f in found])


def verdict(seeds: Sequence[int], interval: Sequence[float]) -> bool | str:
    """Whether the claim holds, from the interval (mean, low, high) over its seeds; undecided while one of them is missing."""
    missing = [seed for seed in CLAIM_SEEDS if seed not in seeds]
    return f"not decided: seed {missing[0]} missing" if missing else interval[1] > 0


def study(given: argparse.Namespace) -> int:
    lab = Lab(given.storage)
    names: dict[tuple[str, int], str] = {}

    def plan(arm: str, seed: int) -> Plan:
        asked = overrides(arm, seed, given.tokens, given.set)
        resolved = resolve(demo.CONFIG, asked)
        names[arm, seed] = f"slate-{arm}-seed{seed}-{resolved.hash}"

        def run() -> Figures:
            folder = lab.gumshoe("train", demo.CONFIG, names[arm, seed], asked)
            attempts = int(resolved.values["buffer.group_size"])
            return {**run_figures(folder), "curve": curve(folder), **costs(folder, attempts)}

        return Plan(resolved, asked, run)

    arms = {arm: (lambda seed, arm=arm: plan(arm, seed)) for arm in ARMS}
    made = Study("slate", arms, given.seeds, again=given.again, results=given.results, lab=lab)
    table = made.run()
    seeds = made.complete(table)
    if not seeds:
        raise StudyError(f"no seed succeeded; the first failure: {next(iter(made.failed.values()))}")

    def over(arm: str, chosen: Sequence[int]) -> list[float]:
        """success of `slate` less that of the arm, paired."""
        return bootstrap([difference(table["slate", s]["after"], table[arm, s]["after"], "outcome") for s in chosen]).as_list()  # fmt: skip

    decisive = [s for s in seeds if s in CLAIM_SEEDS] or seeds
    figures: dict[str, Any] = {
        "claim": "success at the end, slate - grpo, above 0 over the seeds 0, 1 and 2 together",
        "slate - grpo": over("grpo", decisive), "holds": verdict(seeds, over("grpo", decisive)), "seeds": seeds,
    }  # fmt: skip
    for arm in ARMS:
        found = [table[arm, seed] for seed in seeds]
        figures[arm] = {
            "success": bootstrap([values(f["after"], "outcome") for f in found]).as_list(), "slate - it": over(arm, seeds),
            "slate - it, by seed": [over(arm, [s]) for s in seeds], "tokens to 0.8": [reached(f["curve"], 0.8) for f in found],
            **{key: [f[key] for f in found] for key in ("steps", "sampled_tokens", "training_s", *COSTS)},
            "tool calls": [[round(float(np.mean(values(f[moment], "tool_calls"))), 2) for moment in ("before", "after")] for f in found],
            "first 8 steps": [early(lab.storage / names[arm, seed]) for seed in seeds],
        }  # fmt: skip
    for arm in ARMS:
        print(f"{arm:<12} " + "  ".join(f"{k} {v}" for k, v in figures[arm].items()))
    holds = {True: "holds", False: "does not hold"}
    print(f"{figures['claim']}: {figures['slate - grpo']}: {holds.get(figures['holds'], figures['holds'])}")
    rows = [(f"{arm} {seed}", table[arm, seed], i) for seed in seeds for i, arm in enumerate(ARMS)]
    gaps = [(f"slate - {arm}", [Point(*figures[arm]["slate - it"], i)]) for i, arm in enumerate(ARMS) if arm != "slate"]
    across = {"tokens": "sampled tokens of trained batches", "seconds": "seconds of training"}
    svg = plot(
        "SLATE at equal generated tokens",
        [
            *(
                Curves(f"held-out success, by {axis}: mean over seeds, seeds thin", [line(table, arm, seeds, axis) for arm in ARMS], across[axis], (0.0, 1.0))
                for axis in AXES
            ),
            demo.before_after(rows), Panel("success at the end, all seeds", gaps, zero=True),
        ],
        f"{int(given.tokens):,} sampled tokens per run; bars: 95 %",
    )  # fmt: skip
    return made.close(figures, svg)


if __name__ == "__main__":
    sys.exit(main(study, __doc__, tokens=400_000))
