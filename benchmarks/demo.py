"""The demo for several seeds: `python benchmarks/demo.py --seeds 0 1 2`.

A seed names the run, the worlds (training and held-out) and the order of tasks; the warmed-up checkpoint is the same. Each seed's
result is a file of its own below `benchmarks/results/demo/`; a seed that has one is skipped, so the command resumes. At the end: success before
and after per seed, and the mean difference with a 95 % interval (bootstrap over held-out tasks, seeds kept apart).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from agents.recordfile import read_records  # noqa: E402
from agents.types import Group  # noqa: E402
from benchmarks.results_file import RESULTS, write_result  # noqa: E402


def outcomes(path: Path) -> list[int]:
    """Per held-out task, in order: 1 for a right answer."""
    return [int(g.verdicts[0].parts.get("outcome") == 1.0) for g in read_records(path, Group)]


def one_seed(seed: int, storage: Path) -> dict[str, Any]:
    name = f"demo-seed{seed}"
    changes = [
        f"name={name}", f"seed={seed}", f"storage_path={storage}", f"world.synthetic.train.seed={100 + seed}",
        f"world.synthetic.held_out.seed={200 + seed}",
    ]  # fmt: skip
    command = [sys.executable, "gumshoe.py", "train", "configs/demo.yaml", *changes]
    subprocess.run(command, cwd=ROOT, check=True)
    run_dir = storage / name
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    pauses = [r["publish/pause_ms"] for r in rows if r["kind"] == "publish"]
    return {
        "seed": seed, "overrides": changes[:2] + changes[3:], "success_before": summary["success_before"],
        "success_after": summary["success_after"], "seconds": summary["seconds"], "steps": summary["steps"],
        "sampled_tokens": summary["sampled_tokens"], "pause_ms_median": float(np.median(pauses)),
        "kl_k3_max": max(r["mismatch/kl_k3"] for r in rows if r["kind"] == "train"),
        "outcomes_before": outcomes(run_dir / "eval" / "before.jsonl"), "outcomes_after": outcomes(run_dir / "eval" / "after.jsonl"),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--storage", type=Path, default=ROOT / "runs")
    arguments = parser.parse_args()
    done = []
    for seed in arguments.seeds:
        path = RESULTS / "demo" / f"seed{seed}.json"
        if not path.exists():
            write_result(f"demo/seed{seed}", one_seed(seed, arguments.storage))
        done.append(json.loads(path.read_text(encoding="utf-8"))["figures"])
    gains = [np.array(r["outcomes_after"]) - np.array(r["outcomes_before"]) for r in done]
    rng = np.random.default_rng(0)
    means = [np.mean([g[rng.integers(0, len(g), len(g))].mean() for g in gains]) for _ in range(10_000)]
    write_result(
        "demo",
        {
            "seeds": arguments.seeds,
            "success_before": [round(r["success_before"]["mean"], 3) for r in done],
            "success_after": [round(r["success_after"]["mean"], 3) for r in done],
            "gain_mean": float(np.mean([g.mean() for g in gains])),
            "gain_low": float(np.percentile(means, 2.5)),
            "gain_high": float(np.percentile(means, 97.5)),
            "training_s": [r["seconds"]["training"] for r in done],
            "pause_ms_median": [round(r["pause_ms_median"], 1) for r in done],
            "kl_k3_max": [r["kl_k3_max"] for r in done],
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
