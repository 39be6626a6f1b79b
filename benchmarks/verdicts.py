"""Nuggets and a trained verifier as the reward of the tiny policy: `python benchmarks/verdicts.py --seeds 0 1 2`.

Per seed, in this order:

- `taught`: reinforcement learning of the tiny verifier (`configs/verifier_tiny_rl.yaml`) from one supervised checkpoint that all seeds share
  (`configs/verifier_tiny.yaml`, made first). Its labels against the rule judge's on held-out passages, before and after: F1 per fact, with intervals,
  and the label terms of the published reward; beside them what the run's own evaluations say of replies that are sampled.
- `nugget`: the demo with the reward `nugget` (GRPO), labels by the rule judge.
- `verifier`: the same with labels by the verifier that `taught` made, hosted in the run as a judge engine. Every group is recorded; afterwards
  the rule judge labels the same messages: agreement (share and Cohen's kappa), and the two rewards' correlation, over the thirds of the run.

Success is the exact answer by rule in all arms, so no arm is measured by its own reward. Fixed beforehand: nuggets train, and so does the
verifier, if the mean gain over all seeds (bootstrap over held-out tasks, seeds kept apart) has a 95 % interval above 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from agents.learning.checkpoint import checkpoint_name
from agents.types import Group, Trajectory
from benchmarks import demo
from benchmarks.plot import Panel, Point, plot
from benchmarks.study import (
    Figures,
    Lab,
    Plan,
    Resolved,
    Study,
    StudyError,
    bootstrap,
    difference,
    main,
    resolve,
    run_figures,
)
from cluster.record import Recording
from cluster.runlog import read_metrics
from cluster.verifier import VerifierRun
from envs.jsonl import read_rows
from rewards.guards.agreement import agreement
from rewards.judges.rule import RuleJudge
from rewards.nugget import CONTRADICTION, NOT, judge_nuggets
from rewards.nuggets.config import NuggetConfig
from rewards.verifier.config import VerifierConfig
from rewards.verifier.reward import batch_f1

VERIFIER, RL = "configs/verifier_tiny.yaml", "configs/verifier_tiny_rl.yaml"
REWARD = ("reward.name=nugget", "reward.nugget.partial=0", "advantage.name=grpo", "train.max_minutes=0")
HOSTED = (
    "reward.nugget.prompt=nugget_verifier_tiny", "judge.kind=vllm", "judge.num_gpus=0", "judge.max_tokens=256", "judge.structured=false",
    'judge.engine_args=[--max-model-len,"1024",--dtype,float32,--enforce-eager,--max-num-seqs,"16"]', "record=true",
)  # fmt: skip


class School:
    """The verifier's data, its supervised checkpoint, and evaluations, each made once."""

    def __init__(self, lab: Lab, given: Sequence[str]) -> None:
        self._lab = lab
        self.config = resolve(VERIFIER, [f"warmup.{key}" for key in given], VerifierRun)
        self.home = lab.storage / f"verifier-{self.config.hash}"
        self._keys = [f"folder={self.home}/data", f"out={self.home}/sft", "rl=''", *(f"warmup.{key}" for key in given)]

    def supervised(self) -> Path:
        """Its checkpoint."""
        for step, made in (("data", "data/report.json"), ("train", "sft/warmup.json")):
            if not (self.home / made).is_file():
                self._call(step, [])
        return self.home / "sft"

    def labels(self, checkpoint: Path, name: str) -> dict[str, Any]:
        """Its scores per fact of held-out passages."""
        report = self.home / "data" / name / "report.json"
        if not report.is_file() or json.loads(report.read_text(encoding="utf-8")).get("unavailable"):
            self._call("eval", [f"eval.out={name}", f"eval.judge.model={checkpoint}"])
        found = json.loads(report.read_text(encoding="utf-8"))["rubric"]
        return {key: found[key] for key in ("n", "failed", "accuracy", "by_label", "macro", "weighted")}

    def terms(self, name: str) -> float:
        """Mean label terms of the replies that `labels` scored under that name."""
        return round(label_terms(self.home / "data" / name / "predictions.jsonl"), 4)

    def reinforced(self, name: str, overrides: Sequence[str]) -> Path:
        """Folder of the finished run."""
        return self._lab.gumshoe("train", RL, name, overrides)

    def rl_overrides(self, seed: int) -> list[str]:
        data = self.home / "data"
        files = [f"world.jsonl.{key}={data}/{key}.jsonl" for key in ("tasks", "eval_tasks")]
        return [f"seed={seed}", f"model.path={self.home}/sft", f"world.jsonl.corpus=[{data}/corpus.jsonl]", *files]

    def _call(self, step: str, more: Sequence[str]) -> None:
        command = [sys.executable, "gumshoe.py", "verifier", step, VERIFIER, *self._keys, *more]
        self._lab.call(command, self._lab.storage / f"{self.home.name}.log")


def newest(run: Path) -> Path:
    """The run's last checkpoint."""
    return max((run / "checkpoints").glob("step-*"))


def evaluations(run: Path) -> list[dict[str, Any]]:
    """A run's evaluations of held-out tasks, in order: step, success with its interval, tasks, mean parts of the verdicts."""
    rows = {row["step"]: row for row in read_metrics(run) if row["kind"] == "eval"}  # a run that went on repeats a step
    return [
        {
            "step": step, "success": [round(row[f"success/{key}"], 4) for key in ("mean", "low", "high")], "n": row["success/n"],
            "parts": {k.removeprefix("parts/"): round(v, 4) for k, v in row.items() if k.startswith("parts/") and v is not None},
        }
        for step, row in sorted(rows.items())
    ]  # fmt: skip


def label_terms(predictions: Path) -> float:
    """Mean over passages of what the published reward pays for labels, 0.35 F1 + 0.35 exact; 0 for a reply that could not be read."""
    config = VerifierConfig()
    replies: dict[tuple[str, str], list[tuple[str, str | None]]] = {}
    for _, row in read_rows(predictions, "predictions"):
        replies.setdefault((row["question"], row["passage"]), []).append((row["gold"], row["predicted"][0]))
    paid = []
    for pairs in replies.values():
        gold, found = [g for g, _ in pairs], [f for _, f in pairs if f is not None]
        read = len(found) == len(gold)
        f1 = batch_f1(gold, found, config.absent) if read else 0.0
        paid.append(config.f1_weight * f1 + config.exact_weight * float(read and found == gold))
    return sum(paid) / len(paid)


def lessons_figures(lessons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the arm `taught`, per seed and before and after RL: greedy macro F1, success of sampled replies, greedy label terms."""
    moments = {"before": 0, "after": -1}
    return {
        "verifier F1": {m: [[round(f[m]["macro"][key], 4) for key in ("f1", "f1_low", "f1_high")] for f in lessons] for m in moments},
        "verifier sampled": {m: [f["evaluations"][i]["success"] for f in lessons] for m, i in moments.items()},
        "verifier label terms": {m: [f["label_terms"][m] for f in lessons] for m in moments},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ agreement


def judged(trajectory: Trajectory) -> list[str]:
    """The labels that a recorded verdict says its judge gave."""
    verdict = trajectory.verdict
    rows = [row for row in (verdict.evidence if verdict else ()) if "nugget" in row]
    return [NOT if row["label"] == CONTRADICTION else str(row["label"]) for row in rows]


async def beside(groups: Sequence[Group]) -> tuple[list[str], list[str], list[tuple[float, float]]]:
    """(labels as recorded, labels of the rule judge, both rewards) of all rollouts that were judged."""
    rule, config = RuleJudge(), NuggetConfig(partial=0.0)
    ours: list[str] = []
    theirs: list[str] = []
    rewards = []
    for group in groups:
        for trajectory in group.trajectories:
            found = judged(trajectory)
            if not found or trajectory.verdict is None or trajectory.verdict.masked:
                continue
            part = await judge_nuggets(group.task, trajectory.message, trajectory.answer, rule, config)
            rule_labels = [str(row["label"]) for row in part.evidence if "nugget" in row]
            ours += found
            theirs += [NOT if label == CONTRADICTION else label for label in rule_labels]
            rewards.append((trajectory.verdict.reward, part.value))
    return ours, theirs, rewards


def over_the_run(run: Path, parts: int = 3) -> list[dict[str, float]]:
    """Agreement of the recorded judge with the rule judge, by third of the run."""
    entries = Recording(run).entries
    found = []
    for third in np.array_split(np.arange(len(entries)), parts):
        ours, theirs, rewards = asyncio.run(beside([entries[i].frame.read(Group) for i in third]))
        if not ours:
            continue
        both = agreement(ours, theirs)
        pairs = np.array(rewards)
        varied = bool((pairs.std(axis=0) > 0).all())
        found.append(
            {
                "labels": both.n, "share": both.share, "share_low": both.share_low, "share_high": both.share_high, "kappa": both.kappa,
                "kappa_low": both.kappa_low, "kappa_high": both.kappa_high, "reward": float(pairs[:, 0].mean()),
                "rule_reward": float(pairs[:, 1].mean()), "correlation": float(np.corrcoef(pairs.T)[0, 1]) if varied else float("nan"),
            }
        )  # fmt: skip
    return [{key: round(value, 4) for key, value in row.items()} for row in found]


# ----------------------------------------------------------------------------------------------------------- study


def _at(storage: Path, value: Any) -> Any:
    """`value` with the folder of runs by a name that is the same on every machine."""
    if isinstance(value, list):
        return [_at(storage, inner) for inner in value]
    return value.replace(str(storage), "STORAGE") if isinstance(value, str) else value


def study(given: argparse.Namespace) -> int:
    lab = Lab(given.storage)
    schools: dict[str, School] = {}

    def school() -> School:
        return schools.setdefault("", School(lab, []))

    def neutral(resolved: Resolved) -> Resolved:
        """The same config wherever runs lie, and whether or not what it begins with was made already (its name says what that is)."""
        kept = {key: _at(lab.storage, value) for key, value in resolved.values.items()}
        for key, value in resolved.values.items():
            if str(value).startswith(str(lab.storage)):
                kept.pop(f"{key} sha256", None)
        return Resolved(kept, resolved.defaults)

    def verifier_run(seed: int) -> tuple[str, list[str], Resolved]:
        asked = school().rl_overrides(seed)
        resolved = neutral(resolve(RL, asked))
        return f"taught-seed{seed}-{resolved.hash}", asked, resolved

    def taught(seed: int) -> Plan:
        name, asked, resolved = verifier_run(seed)

        def run() -> Figures:
            before = school().labels(school().supervised(), "before")  # first: the run begins with that checkpoint
            folder = school().reinforced(name, asked)
            after = school().labels(newest(folder), f"after-{name}")
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            return {
                "before": before,
                "after": after,
                "evaluations": evaluations(folder),
                "label_terms": {"before": school().terms("before"), "after": school().terms(f"after-{name}")},
                "steps": summary["steps"],
                "training_s": round(summary["seconds"]["training"], 1),
            }

        return Plan(resolved, [_at(lab.storage, text) for text in asked], run)

    def policy(arm: str, seed: int) -> Plan:
        asked = demo.overrides(seed, [*REWARD, *(HOSTED if arm == "verifier" else ()), *given.set])
        if arm == "verifier":
            name, _, learned = verifier_run(seed)
            judge = lab.storage / name / "checkpoints" / checkpoint_name(learned.values["train.steps"])
            asked.append(f"judge.model={judge}")
        resolved = neutral(resolve(demo.CONFIG, asked))

        def run() -> Figures:
            if arm == "verifier" and not judge.is_dir():
                raise StudyError(
                    f"the verifier of seed {seed} is not here ({judge}); make it by --again taught verifier"
                )
            folder = lab.gumshoe("train", demo.CONFIG, f"{arm}-seed{seed}-{resolved.hash}", asked)
            return {**run_figures(folder), **({"agreement": over_the_run(folder)} if arm == "verifier" else {})}

        return Plan(resolved, [_at(lab.storage, text) for text in asked], run)

    arms = {"taught": taught, **{arm: (lambda seed, arm=arm: policy(arm, seed)) for arm in ("nugget", "verifier")}}
    made = Study("verdicts", arms, given.seeds, again=given.again, results=given.results, lab=lab)
    table = made.run()
    seeds = made.complete(table)
    if not seeds:
        raise StudyError(f"no seed succeeded; the first failure: {next(iter(made.failed.values()))}")
    figures: dict[str, Any] = {"seeds": seeds}
    gains = {}
    for arm in ("nugget", "verifier"):
        found = [table[arm, seed] for seed in seeds]
        gains[arm] = bootstrap([difference(f["after"], f["before"], "outcome") for f in found])
        figures[arm] = {
            "before": [round(f["success_before"]["mean"], 3) for f in found], "after": [round(f["success_after"]["mean"], 3) for f in found],
            "gain": gains[arm].as_list(), "training_s": [f["training_s"] for f in found], "held": gains[arm].low > 0,
        }  # fmt: skip
    lessons = [table["taught", seed] for seed in seeds]
    figures |= lessons_figures(lessons)
    figures["agreement"] = [table["verifier", seed]["agreement"] for seed in seeds]
    print(json.dumps(figures, indent=1))
    rows = [(f"{arm} {seed}", table[arm, seed], i) for seed in seeds for i, arm in enumerate(gains)]
    scores = [
        (
            f"seed {seed}",
            [Point(f[m]["macro"]["f1"], f[m]["macro"]["f1_low"], f[m]["macro"]["f1_high"], 0, m == "before") for m in ("before", "after")],
        )
        for seed, f in zip(seeds, lessons, strict=True)
    ]  # fmt: skip
    panels = [
        demo.before_after(rows),
        Panel("verifier's F1 against the rule judge: before (ring) and after its RL stage", scores, bounds=(0.0, 1.0)),
    ]
    svg = plot("Nuggets, and a trained verifier, as the reward", panels, "held-out tasks, temperature 1; bars: 95 %")
    return made.close(figures, svg)


if __name__ == "__main__":
    sys.exit(main(study, __doc__))
