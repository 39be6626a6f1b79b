"""Scale by simulation: fitted on measured CPU runs, checked against others, then asked about GPUs: `python benchmarks/simulate.py`.

Parts, in this order; each writes its file below `benchmarks/results/simulate/` and reads those of the parts before it:
- fit: the CPU model's four free numbers, on the demo's run of seed 0 and on synchronous over asynchronous of `pipeline.json`.
- check: every other run, predicted and compared; the errors are printed. `blind`: at the fitted speed; `matched`: at the
  speed of the run's own learner, for the machine did other work too, and not always as much.
- control: what the central actors' code costs on this CPU.
- predict: throughput, staleness and drop share for 8 to 1,024 GPUs, and the part whose doubled speed gains most. No GPU was
  measured: cards are data sheets and the rest are the assumptions printed with the result (`--assume mfu=0.4 judge_s=5`).
`--read NAME FOLDER WHAT` first takes a run's folder into `runs.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gumshoe  # noqa: E402

if __name__ == "__main__":
    os.environ.update(gumshoe.child_env() | {"OMP_NUM_THREADS": "1"})

import numpy as np  # noqa: E402

from benchmarks.plot import Curves, Line, plot  # noqa: E402
from benchmarks.results_file import RESULTS, about, write_json, write_result  # noqa: E402
from benchmarks.simulation import Run  # noqa: E402
from benchmarks.simulation_control import measure_control  # noqa: E402
from benchmarks.simulation_gpus import (  # noqa: E402
    CARDS,
    Assumptions,
    Card,
    Control,
    Layout,
    Policy,
    faster,
    gpu_system,
    gpu_workload,
    grown,
)  # fmt: skip
from benchmarks.simulation_parts import System  # noqa: E402
from benchmarks.simulation_runs import CpuModel, check, fit, latency_cells, load, measured, turn_seconds  # noqa: E402

PARTS = ("fit", "check", "control", "predict")
FITTED_ON = ("demo", "asynchronous-0ms", "synchronous-0ms")
GPUS = (8, 32, 128, 512, 1024)
FIXED, EACH = 256, 8
"""Episodes of a batch whatever the GPUs, and per GPU where the batch grows."""
SCENARIOS = {
    "batch of 256": (lambda gpus: FIXED, True),
    "batch of 256, own shards": (lambda gpus: FIXED, False),
    "batch of 8 per GPU": (lambda gpus: EACH * gpus, True),
    "batch of 8 per GPU, own shards": (lambda gpus: EACH * gpus, False),
}
"""Episodes of a batch by GPUs; whether each learner rank is sent the whole batch; a run sends each its own part."""
LARGEST = 512
"""Episodes of a batch up to which every part is tried at twice its speed: beyond it a run takes minutes."""


def predict(system: System, a: Assumptions, steps: int, seed: int) -> dict[str, Any]:
    """Figures of a simulated run on GPUs; its first third fills the pipeline."""
    made = Run(system, gpu_workload(a), steps, seed).play()
    found = made.figures(max(1, steps // 3))
    return {k: round(v, 5) for k, v in found.items()} | {
        "busy": {k: round(v, 3) for k, v in made.busy.items()}, "sequences": round(made.batch_mean, 1), "paced": round(made.paced, 3),
    }  # fmt: skip


def best_share(policy: Policy, card: Card, a: Assumptions, control: Control, steps: int, seed: int) -> float:
    """Share of 64 GPUs for the learner with the most tokens per second."""
    speeds = {}
    for eighths in range(1, 8):
        layout = grown(64, eighths / 8, FIXED, whole_batch=False)
        speeds[eighths / 8] = predict(gpu_system(layout, policy, card, a, control), a, steps, seed)["tokens_per_s"]
    return max(speeds, key=lambda share: speeds[share])


IDLE = 0.05
"""A part that works for less of the time is not tried at twice its speed: it cannot gain more than this."""
WORKS = {
    "learner": ("learner",), "publish": ("publish",), "search servers": ("tools",), "batch assembly": ("buffer",),
    "central actors": ("buffer", "fleet", "workers"),
}  # fmt: skip
"""What must be busy for a part to be tried; the other parts always are, for their latency counts whether or not they are busy."""


def gains(system: System, a: Assumptions, steps: int, seed: int, found: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per second more, as a share, with each part at twice its speed."""
    base, busy = found["tokens_per_s"], found["busy"]
    return {
        part: round(predict(changed, a, steps, seed)["tokens_per_s"] / base - 1, 3)
        for part, changed in faster(system).items()
        if part not in WORKS or max(busy[name] for name in WORKS[part]) >= IDLE
    }


def scale(
    gpus: Sequence[int], policy: Policy, card: Card, a: Assumptions, control: Control, steps: int, seed: int
) -> dict[str, Any]:
    """Rows per scenario and number of GPUs, and the layout that all have in common."""
    share = best_share(policy, card, a, control, steps, seed)
    print(f"learner's share of the GPUs (best of eighths at 64): {share:g}", flush=True)
    rows = []
    for scenario, (batch, whole) in SCENARIOS.items():
        for number in gpus:
            layout: Layout = grown(number, share, batch(number), whole_batch=whole)
            system = gpu_system(layout, policy, card, a, control)
            began = time.monotonic()
            found = predict(system, a, steps, seed)
            row = {"scenario": scenario, "gpus": number, "episodes": layout.batch_episodes, **found}
            if layout.batch_episodes <= LARGEST:
                row["gains"] = gains(system, a, steps, seed, found)
                row["held_up_by"] = max(row["gains"], key=lambda part: row["gains"][part])
            else:
                row["held_up_by"] = max(found["busy"], key=lambda part: found["busy"][part]) + " (busiest)"
            rows.append(row)
            print(
                f"{scenario}, {number} GPUs: {found['tokens_per_s'] / number:,.0f} tokens/s/GPU, step {found['step_s']:.1f} s, "
                f"staleness {found['staleness']:.2f}, dropped {found['dropped']:.2%}, held up by {row['held_up_by']} "
                f"[{time.monotonic() - began:.0f} s]", flush=True,
            )  # fmt: skip
    return {"share": share, "rows": rows}


def drawn(rows: Sequence[Mapping[str, Any]], title: str, note: str) -> str:
    """Three panels: tokens per second and GPU, staleness, drop share."""

    least = min(r["gpus"] for r in rows)
    across = f"doublings of {least} GPUs"

    def lines(value: Any) -> list[Line]:
        return [
            Line(name, [(math.log2(r["gpus"] / least), value(r)) for r in rows if r["scenario"] == name])
            for name in SCENARIOS
            if any(r["scenario"] == name for r in rows)
        ]

    speed = [r["tokens_per_s"] / r["gpus"] for r in rows]
    drops = [100 * r["dropped"] for r in rows]
    return plot(title, [
        Curves("trained tokens per second and GPU", lines(lambda r: r["tokens_per_s"] / r["gpus"]), across, (0.0, 1.1 * max(speed))),
        Curves("staleness, optimiser batches (mean)", lines(lambda r: r["staleness"]), across, (0.0, 1.1)),
        Curves("episodes dropped for age, %", lines(lambda r: 100 * r["dropped"]), across, (0.0, max(1.0, 1.1 * max(drops)))),
    ], note)  # fmt: skip


def show_check(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prints the errors of runs the model was not fitted on, and returns what they come to."""
    print(
        f"{'run':<22}{'slower':>7}  step s: measured blind matched   tokens/s: blind matched   staleness: measured matched   dropped"
    )
    for r in rows:
        m, b, x = r["measured"], r["blind_error"], r["matched_error"]
        old = (
            f"{m['staleness']:.2f} {r['blind']['staleness']:.2f} {r['matched']['staleness']:.2f}"
            if "staleness" in m
            else "- - -"
        )
        lost = (
            f"{m['dropped']:.2%} {r['blind']['dropped']:.2%} {r['matched']['dropped']:.2%}"
            if "dropped" in m
            else "- - -"
        )
        print(
            f"{r['run']:<22}{r['slower']:>7.2f}  {m['step_s']:>8.2f} {b['step_s']:>+8.1%} {x['step_s']:>+8.1%}   "
            f"{b['tokens_per_s']:>+8.1%} {x['tokens_per_s']:>+8.1%}   {old:>15}   {lost:>19}{'   fitted on' if r['run'] in FITTED_ON else ''}"
        )
    made: dict[str, Any] = {}
    others = [r for r in rows if r["run"] not in FITTED_ON]
    for kind in ("blind", "matched"):
        for name in ("step_s", "tokens_per_s", "staleness", "dropped"):
            off = [abs(r[f"{kind}_error"][name]) for r in others if name in r[f"{kind}_error"]]
            made[f"{kind}: |error| of {name}"] = {
                "median": round(float(np.median(off)), 4), "worst": round(max(off), 4), "runs": len(off),
            }  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--read", nargs=3, action="append", metavar=("NAME", "FOLDER", "WHAT"), default=[])
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument(
        "--shape", type=Path, default=ROOT / "configs" / "shapes" / "qwen3_4b.json", help="config.json of the policy"
    )
    parser.add_argument(
        "--assume", nargs="+", default=[], metavar="NAME=NUMBER", help="see simulation_gpus.Assumptions"
    )
    parser.add_argument("--steps", type=int, default=5, help="optimiser batches of a predicted run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    try:
        assumed, policy = Assumptions().with_(arguments.assume), Policy.of(arguments.shape)
        if min(arguments.gpus) < 2 or arguments.steps < 3:
            raise ValueError("--gpus must be at least 2 (one samples, one learns) and --steps at least 3")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    folder = arguments.results / "simulate"
    runs_file = folder / "runs.json"
    if arguments.read:
        runs = load(runs_file) if runs_file.is_file() else {}
        for name, run_dir, what in arguments.read:
            try:
                runs[name] = measured(Path(run_dir), name, what)
            except (OSError, ValueError, KeyError, IndexError) as error:
                parser.error(
                    f"--read {name}: {run_dir} is not the folder of a training run that can be compared: {error!r}"
                )
        write_json(runs_file, {"runs": [asdict(r) for r in runs.values()]})
    pipeline = json.loads((RESULTS / "pipeline.json").read_text(encoding="utf-8"))
    runs = {r.name: r for r in latency_cells(pipeline)} | load(runs_file)
    if "fit" in arguments.parts:
        model = fit(runs, CpuModel(turn_s=turn_seconds(pipeline)))
        write_json(folder / "model.json", {**about(), "fitted_on": FITTED_ON, "model": asdict(model)})
    model = CpuModel(**_read(folder / "model.json")["model"])
    if "check" in arguments.parts:
        rows = check(runs, model, arguments.seed)
        write_json(folder / "check.json", {**about(), "errors": show_check(rows), "rows": rows})
    if "control" in arguments.parts:
        write_json(folder / "control.json", {**about(), "seconds": measure_control(8)})
    if "predict" in arguments.parts:
        control = control_of(_read(folder / "control.json")["seconds"], pipeline)
        card = CARDS[arguments.card]
        made = scale(arguments.gpus, policy, card, assumed, control, arguments.steps, arguments.seed)
        inputs = {
            "never run on a GPU": True, "card (data sheet)": {arguments.card: asdict(card)}, "policy (its config.json)": asdict(policy),
            "assumed": asdict(assumed), "measured on CPU": asdict(control),
        }  # fmt: skip
        write_json(folder / "scale.json", {**about(), "inputs": inputs, **made})
        note = "Simulated; no GPU was measured. Assumptions: docs/scale.md"
        picture = drawn(made["rows"], f"{policy.name} on {arguments.card}", note)
        (arguments.results / "simulate.svg").write_text(picture, encoding="utf-8")
    if (folder / "check.json").is_file() and (folder / "scale.json").is_file():
        write_result(
            "simulate", summed_up(_read(folder / "check.json"), _read(folder / "scale.json")), arguments.results
        )
    return 0


def summed_up(checked: Mapping[str, Any], scaled: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `simulate.json`."""
    figures = dict(checked["errors"])
    for row in scaled["rows"]:
        figures[f"{row['scenario']}, {row['gpus']} GPUs (predicted)"] = {
            "tokens/s/GPU": round(row["tokens_per_s"] / row["gpus"]), "step_s": round(row["step_s"], 1),
            "staleness": round(row["staleness"], 3), "dropped": round(row["dropped"], 4), "held up by": row["held_up_by"],
        }  # fmt: skip
    return figures | {"inputs of the predictions": scaled["inputs"]}


def control_of(seconds: Mapping[str, float], pipeline: Mapping[str, Any]) -> Control:
    """The worker's and client's way of a turn from two lengths of turns, the buffer's from its own code."""
    figures = pipeline["figures"]
    per_turn = {
        shape: figures[f"{shape}: processor time per token, us"]["client"] * 1e-6 * figures[f"{shape}: tokens"] / figures[f"{shape}: requests"]
        for shape in ("turns", "long")
    }  # fmt: skip
    lengths = {shape: figures[f"{shape}: tokens"] / figures[f"{shape}: requests"] for shape in ("turns", "long")}
    per_token = max(0.0, (per_turn["long"] - per_turn["turns"]) / (lengths["long"] - lengths["turns"]))
    once = max(0.0, per_turn["turns"] - per_token * lengths["turns"]) + seconds["prompt_s"]
    kept = {k: seconds[k] for k in ("lease_s", "put_s", "ship_s", "pickle_s", "shard_s")}
    return replace(Control(**kept, turn_s=0.0, turn_per_token_s=per_token), turn_s=once)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SystemExit(f"{path} is not there; run the part that writes it first (--parts {path.stem})")
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
