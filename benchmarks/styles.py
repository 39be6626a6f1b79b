"""The demo's policy before and after training, evaluated on held-out closed worlds in three styles: `python benchmarks/styles.py --seeds 0 1 2`.

A seed names the demo's training run (as in `demo.py`) and the questions. Each style is a whole `gumshoe eval`, of the checkpoint that training started from and of the one
it ended with, on the same questions, with a page each and the comparison on the second page:

- `bcp`, as BrowseComp-Plus: 2- and 3-hop questions, near-names as hard negatives, judgements of evidence (so nDCG and recall);
- `webdetective`, as WebDetective: the question names its start alone, names on pages stay masked until the page before was opened;
- `parallel`, as Mind-ParaWorld: no corpus, an engine that answers who asks for one atomic fact at a time. The policy never saw such a tool.

Temperature 1, one attempt per question. Nothing was fixed beforehand: the figures say what training on citation rubrics in the demo's own world
gives elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import demo
from benchmarks.plot import Panel, Point, plot
from benchmarks.study import Figures, Lab, Plan, Study, StudyError, bootstrap, main, resolve
from cluster.evaluation.config import EvalConfig

CONFIG = "configs/eval_demo.yaml"
TASKS = 200
STYLES = {
    "bcp": (f"benchmark.options={{tasks: '{TASKS}', hops: '2-3', seed: '{{seed}}'}}",),
    "webdetective": (
        f"benchmark.options={{tasks: '{TASKS}', hops: '2-3', seed: '{{seed}}'}}",
        "sandbox.guard.answer=chain",
    ),
    "parallel": (
        f"benchmark.options={{tasks: '{TASKS}', hops: '2-3', seed: '{{seed}}', setting: C}}",
        "corpus.source=parallel_world",
    ),
}
MAIN, SHOWN = (
    "accuracy",
    ("accuracy", "evidence_recall", "citation_precision", "citation_recall", "fcr", "hit_rate"),
)


def overrides(style: str, seed: int, given: Sequence[str]) -> list[str]:
    options = [text.replace("{seed}", str(300 + seed)) for text in STYLES[style]]
    return [f"seed={seed}", f"benchmark.kind=world_{style}", *options, *given]


def scores(folder: Path) -> dict[str, float]:
    """Question -> accuracy, of questions that were judged."""
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    found = {str(row["unit"][0]): row["scores"].get(MAIN) for row in map(json.loads, lines)}
    return {task: float(score) for task, score in found.items() if score is not None}


def told(folder: Path) -> dict[str, Any]:
    """What is kept of an evaluation."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "metrics": {name: summary["metrics"][name] for name in SHOWN if name in summary["metrics"]},
        "effort": summary["effort"], "failures": summary["failures"], "units": summary["units"], "scores": scores(folder),
    }  # fmt: skip


def paired(found: Figures) -> np.ndarray:
    """After minus before, per question that both have a score for."""
    before, after = (found[moment]["scores"] for moment in ("before", "after"))
    shared = [task for task in before if task in after]
    if not shared:
        raise StudyError("before and after share no judged question")
    return np.array([after[task] - before[task] for task in shared])


def study(given: argparse.Namespace) -> int:
    lab = Lab(given.storage)
    trained: dict[int, Path] = {}

    def checkpoint(seed: int) -> Path:
        """Of the demo's run, trained once for all styles."""
        if seed not in trained:
            asked = demo.overrides(seed, [])
            name = f"demo-seed{seed}-{resolve(demo.CONFIG, asked).hash}"
            folder = lab.storage / name
            if not (folder / "summary.json").is_file():
                lab.gumshoe("train", demo.CONFIG, name, asked)
            trained[seed] = max((folder / "checkpoints").glob("step-*"))
        return trained[seed]

    def plan(style: str, seed: int) -> Plan:
        asked = overrides(style, seed, given.set)
        resolved = resolve(CONFIG, asked, EvalConfig)

        def run() -> Figures:
            after = checkpoint(seed)
            name = f"{style}-seed{seed}-{resolved.hash}"
            first = lab.gumshoe("eval", CONFIG, f"{name}-before", asked)
            then = lab.gumshoe(
                "eval", CONFIG, f"{name}-after", [*asked, f"model.path={after}", "--against", str(first)]
            )
            return {"before": told(first), "after": told(then)}

        return Plan(resolved, asked, run)

    arms = {style: (lambda seed, style=style: plan(style, seed)) for style in STYLES}
    made = Study("styles", arms, given.seeds, again=given.again, results=given.results, lab=lab)
    table = made.run()
    seeds = made.complete(table)
    if not seeds:
        raise StudyError(f"no seed succeeded; the first failure: {next(iter(made.failed.values()))}")
    figures: dict[str, Any] = {"seeds": seeds}
    for style in STYLES:
        rows = [table[style, seed] for seed in seeds]
        metrics = {
            name: {m: [round(f[m]["metrics"][name]["mean"], 3) for f in rows] for m in ("before", "after")}
            for name in SHOWN
            if all(_known(f, name) for f in rows)
        }
        calls = {m: [round(_mean(f[m]["effort"]["calls"]), 2) for f in rows] for m in ("before", "after")}
        figures[style] = {
            "metrics": metrics,
            "gain": bootstrap([paired(f) for f in rows]).as_list(),
            "calls": calls,
            "not scored": [{m: f[m]["units"]["failed"] + f[m]["units"]["unjudged"] for m in ("before", "after")} for f in rows],
        }  # fmt: skip
    print(json.dumps(figures, indent=1))
    panels = [
        Panel(
            "accuracy on held-out questions: before training (ring) and after (dot)",
            [
                (
                    f"{style} {seed}",
                    [
                        Point(m["mean"], m["low"], m["high"], i, moment == "before")
                        for moment in ("before", "after")
                        for m in [table[style, seed][moment]["metrics"][MAIN]]
                    ],
                )
                for i, style in enumerate(STYLES)
                for seed in seeds
            ],
            bounds=(0.0, 1.0),
        )
    ]
    return made.close(
        figures, plot("The demo's policy in three styles of closed worlds", panels, "temperature 1; bars: 95 %")
    )


def _known(found: Figures, name: str) -> bool:
    means = [found[m]["metrics"].get(name, {}).get("mean") for m in ("before", "after")]
    return all(mean is not None for mean in means)


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, Mapping) else value)


if __name__ == "__main__":
    sys.exit(main(study, __doc__))
