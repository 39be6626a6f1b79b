"""What else could have been done with the same checkpoint and the same time: `python benchmarks/controls.py --seeds 0 1 2`.

Three arms start from the shipped warm-up checkpoint and train for the same wall time on two cores:

- `rl`: the demo as it is (C-GRPO). Its training seconds are the measure.
- `sft`: continued supervision on expert traces alone, in fresh worlds of the train split, on questions as long as the demo's. Both threads
  train. The learning rate is the better of two from the warm-up's own schedule, tried on a seed that is not part of the study (`controls_rate`).
- `rft`: rejection-sampling fine-tuning, the same pipeline as `rl` with the advantage `raft`: the policy's own right rollouts, weight 1, no
  baseline. Config limits: the time, not the steps.

All arms are measured before and after on the same 300 held-out tasks per seed, one attempt each at temperature 1. Reported: the gain per arm,
and `rl - sft` and `rl - rft` of success after training, paired by task, with 95 % bootstrap intervals over tasks (seeds kept apart).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import demo
from benchmarks.plot import Panel, Point, plot
from benchmarks.study import (
    Figures,
    Interval,
    Lab,
    Plan,
    Resolved,
    Study,
    StudyError,
    Table,
    bootstrap,
    difference,
    episodes,
    main,
    resolve,
    training,
)  # fmt: skip

ARMS = ("rl", "sft", "rft")
POLICY = "envs/world/policy"
RATES = (6.0e-4, 1.5e-3)
"""Peaks of the warm-up's last two stages."""
FINAL_RATE = 2.0e-5
RATE_STUDY, RATE_SEED, RATE_SECONDS = "controls_rate", 7, 300.0
"""The trial of rates: its seed, and about as long as the demo trains."""


def lesson(seed: int, seconds: float, rate: float) -> list[str]:
    """`gumshoe warmup configs/warmup.yaml` with these goes on from the shipped checkpoint with expert traces alone."""
    stage = f"{{name: expert, steps: 1000000, lr: {rate:g}, final_lr: {FINAL_RATE:g}, rise_steps: 10, max_seconds: {seconds:g}}}"
    return [
        f"warmup.base={POLICY}",
        f"warmup.seed={100 + seed}",  # other worlds than the ones the checkpoint was made in
        f"warmup.stages=[{stage}]",
        "warmup.report_every=1000000",
        "scripts.expert.world.hops={2: 1.0, 3: 1.0}",
        "scripts.expert.world.unanswerable=0",
    ]


def sft(lab: Lab, name: str, seed: int, seconds: float, rate: float, given: Sequence[str]) -> Plan:
    """Continued supervision, between two evaluations of the demo's held-out tasks."""
    from cluster.warmup import WarmupRun

    taught, judged = lesson(seed, seconds, rate), demo.overrides(seed, given)
    teaching = resolve("configs/warmup.yaml", taught, WarmupRun)
    asking = resolve(demo.CONFIG, judged)
    config = Resolved(
        {**{f"warm-up {k}": v for k, v in teaching.values.items()}, **asking.values},
        {**{f"warm-up {k}": v for k, v in teaching.defaults.items()}, **asking.defaults},
    )

    def run() -> Figures:
        stem = f"{name}-{config.hash}"
        before = lab.gumshoe("eval", demo.CONFIG, f"{stem}-before", judged)
        weights = lab.folder(f"{stem}-weights")
        if not (weights / "warmup.json").is_file():
            command = [sys.executable, "gumshoe.py", "warmup", "configs/warmup.yaml", *taught, f"out={weights}"]
            lab.call(command, lab.storage / f"{stem}.log")
        report = json.loads((weights / "warmup.json").read_text(encoding="utf-8"))
        after = lab.gumshoe("eval", demo.CONFIG, f"{stem}-after", [*judged, f"model.path={weights}"])
        return {
            "success_before": _success(before), "success_after": _success(after), "training_s": round(report["seconds"], 1),
            "rate": rate, "steps": report["step"], "trained_tokens": report["tokens"],
            "before": episodes(before / "eval" / "eval.jsonl"), "after": episodes(after / "eval" / "eval.jsonl"),
        }  # fmt: skip

    return Plan(config, [*taught, *judged], run)


def _success(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["success"])


def rft(lab: Lab, name: str, seed: int, seconds: float, given: Sequence[str]) -> Plan:
    """The demo's pipeline with accepted samples in place of advantages, as long as `seconds`."""
    limits = ["train.steps=100000", f"train.max_minutes={seconds / 60:.3f}"]
    # one optimiser step per batch and no correction weights: exactly the log-likelihood of the accepted samples
    return training(
        lab, demo.CONFIG, name,
        [*demo.overrides(seed, given), *limits, "advantage.name=raft", "learner.loss.mismatch=none"],
    )  # fmt: skip


def again_for(again: Sequence[str] | None, arms: Collection[str]) -> list[str] | None:
    """What `--again` means to a study of `arms`: the trial's arms are run again by name, with `sft`, and with all."""
    if again is None or not again:
        return None if again is None else []
    if "sft" in again and "sft" not in arms:
        return []
    return [name for name in again if name in arms or not (name in ARMS or name.startswith("sft-"))] or None


def better_rate(lab: Lab, given: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """The rate whose trial ended with more success, and what both reached. A study of its own: `controls_rate`."""
    if RATE_SEED in given.seeds:
        raise StudyError(f"seed {RATE_SEED} chooses the learning rate of sft, so it cannot be part of the study")
    names = {f"sft-{rate:g}": rate for rate in RATES}
    seconds = given.rate_seconds
    arms = {
        name: lambda seed, name=name, rate=rate: sft(lab, f"rate-{name}", seed, seconds, rate, given.set)
        for name, rate in names.items()
    }
    trial = Study(RATE_STUDY, arms, [RATE_SEED], again=again_for(given.again, names), results=given.results, lab=lab)
    table = trial.run()
    if trial.failed:
        raise StudyError(f"the trial of learning rates failed: {'; '.join(trial.failed.values())}")
    reached = {name: table[name, RATE_SEED]["success_after"]["mean"] for name in names}
    best = max(names, key=lambda name: (reached[name], -names[name]))
    return names[best], {"seed": RATE_SEED, "seconds": seconds, "success_after": reached, "taken": names[best]}


def summary(table: Table, seeds: Sequence[int]) -> dict[str, Any]:
    """Per arm: success before and after, gain. Then what `rl` has over each control."""
    figures: dict[str, Any] = {"seeds": list(seeds), "tasks": [len(table["rl", s]["after"]["task"]) for s in seeds]}
    for arm in ARMS:
        runs = [table[arm, s] for s in seeds]
        figures[arm] = {
            "success_before": [round(f["success_before"]["mean"], 3) for f in runs],
            "success_after": [round(f["success_after"]["mean"], 3) for f in runs],
            "gain": bootstrap([difference(f["after"], f["before"], "outcome") for f in runs]).as_list(),
            "training_s": [f["training_s"] for f in runs],
            "steps": [f["steps"] for f in runs],
        }
    for control in ARMS[1:]:
        per_seed = [difference(table["rl", s]["after"], table[control, s]["after"], "outcome") for s in seeds]
        figures[f"rl - {control}"] = {
            "all_seeds": bootstrap(per_seed).as_list(),
            "per_seed": [bootstrap([d]).as_list() for d in per_seed],
        }
    return figures


def draw(table: Table, figures: dict[str, Any]) -> str:
    seeds = figures["seeds"]
    rows = [(f"{arm} seed {s}", table[arm, s], colour) for s in seeds for colour, arm in enumerate(ARMS)]
    panels = [demo.before_after(rows)]
    for colour, control in enumerate(ARMS[1:], start=1):
        found = figures[f"rl - {control}"]
        lines = [(f"seed {s}", [Point(*d, colour)]) for s, d in zip(seeds, found["per_seed"], strict=True)]
        panels.append(
            Panel(
                f"success after training, rl - {control}",
                [*lines, ("all seeds", [Point(*found["all_seeds"], colour)])],
                zero=True,
            )
        )
    note = f"{figures['tasks'][0]} held-out tasks per seed, temperature 1, equal training time; bars: 95 %"
    return plot("Reinforcement learning and two controls from the same checkpoint", panels, note)


def study(given: argparse.Namespace) -> int:
    lab = Lab(given.storage)
    rate, trial = better_rate(lab, given)

    def seconds(seed: int) -> float:
        return float(made.figures("rl", seed)["training_s"])

    arms = {
        "rl": lambda seed: demo.plan(lab, seed, given.set),
        "sft": lambda seed: sft(lab, f"controls-sft-seed{seed}", seed, seconds(seed), rate, given.set),
        "rft": lambda seed: rft(lab, f"controls-rft-seed{seed}", seed, seconds(seed), given.set),
    }
    made = Study("controls", arms, given.seeds, again=again_for(given.again, ARMS), results=given.results, lab=lab)
    table = made.run()
    seeds = made.complete(table)
    if not seeds:
        raise StudyError(f"no seed has all arms; the first failure: {next(iter(made.failed.values()))}")
    figures = {**summary(table, seeds), "rate_of_sft": trial}
    for arm in ARMS:
        f = figures[arm]
        shown = "  ".join(f"{b:.3f} -> {a:.3f}" for b, a in zip(f["success_before"], f["success_after"], strict=True))
        print(f"{arm:<4} {shown}   gain {Interval(*f['gain'])}   training s {f['training_s']}")
    for control in ARMS[1:]:
        print(f"rl - {control}: {Interval(*figures[f'rl - {control}']['all_seeds'])}")
    return made.close(figures, draw(table, figures))


if __name__ == "__main__":
    sys.exit(main(study, __doc__, rate_seconds=RATE_SECONDS))
