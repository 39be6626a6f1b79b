"""Measured CPU runs as the simulation sees them: what is taken from a run as given, and what the model must predict.

Given: the configuration, how long episodes were (turns, tokens, their spread), how long tools and judgements answered, how long a
publish took. To be predicted, and never read by the model of another run: seconds of a step, tokens per second, staleness, share of
dropped episodes. How fast engine and learner are is fitted on the calibration runs alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.simulation import Run
from benchmarks.simulation_parts import EngineModel, Episode, Outcome, System, Turn, Workload, trimmed

SKIP = 2
"""Steps at the beginning of a run that are not compared: the pipeline fills."""
BLOCKS = 8
"""Parts of a run with lengths of their own: they change as the policy learns."""
FIGURES = ("step_s", "tokens_per_s", "staleness", "dropped")
"""What is checked. Staleness in optimiser batches; dropped: share of the admitted episodes, for being over age."""


@dataclass(frozen=True)
class Measured:
    """One run."""

    name: str
    what: str
    """How it differs from the demo, in words."""
    steps: int
    group_size: int = 8
    groups_per_batch: int = 8
    max_staleness: int = 1
    engines: int = 1
    workers: int = 1
    groups_in_flight: int = 12
    max_sequences: int = 96
    turns: tuple[float, ...] = ()
    """Policy turns of an episode, by block of steps; so the next three."""
    sampled: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    """All of an episode's tokens."""
    spread: float = 0.15
    """Coefficient of variation of the lengths within a group."""
    tool_s: float = 0.0
    """A tool call."""
    judge_s: float = 0.0
    """The judgement of a group."""
    publish_s: float = 0.07
    pause_s: float = 0.045
    found: Mapping[str, float] = field(default_factory=dict)
    """What it came to: FIGURES, and train_s, wait_s, lease_s. What was not measured is not there."""
    other_learner: bool = False
    """Its learner does other work per token than the demo's, so what it took says nothing of the machine."""
    speed_of: str = ""
    """Run of the same hour whose speed stands for this one's; empty: its own learner tells."""


def measured(folder: Path, name: str, what: str, *, other_learner: bool = False) -> Measured:
    """Reads a run's folder; of a run that was restarted, the longest stretch between two restarts.

    Raises ValueError for one that holds too little, or whose clock was set back in the stretch.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [r for r in rows if r["kind"] == "train"]
    births = [r.get("incarnation", 0.0) for r in train]
    kept = max(set(births), key=births.count)
    before = next((r for r in reversed(train) if r.get("incarnation", 0.0) < kept), None)
    train = [r for r in train if r.get("incarnation", 0.0) == kept]
    published = [r for r in rows if r["kind"] == "publish" and r["time"] >= train[0]["time"]] or [{}]
    steps = train[SKIP:]
    seconds = np.diff([r["time/elapsed_s"] for r in train[SKIP - 1 :]])

    def mean(key: str, of: Sequence[Mapping[str, Any]]) -> float:
        return float(np.mean([r[key] for r in of if r.get(key) is not None] or [0.0]))

    def blocks(key: str) -> tuple[float, ...]:
        parts = np.array_split(np.arange(len(train)), min(BLOCKS, len(train)))
        return tuple(round(mean(key, [train[i] for i in part]), 2) for part in parts)

    def since(key: str) -> float:
        return float(train[-1].get(key, 0.0)) - (float(before.get(key, 0.0)) if before else 0.0)

    if len(steps) < SKIP or seconds.min() <= 0:
        raise ValueError(f"{folder}: no stretch of more than {2 * SKIP} steps that went on without a restart")
    turns, tokens = mean("episode/turns", train), sum(r["episodes"] * r["episode/tokens"] for r in steps)
    buffer, rollout, engine = config["buffer"], config["rollout"], config["engine"]
    found = {
        "step_s": trimmed(seconds), "tokens_per_s": tokens / float(seconds.sum()),
        "staleness": sum(r["staleness/mean"] * r["episodes"] for r in steps) / sum(r["episodes"] for r in steps),
        "dropped": since("dropped/stale") / since("ledger/admitted"), "train_s": trimmed([r["time/train_s"] for r in steps]),
        "wait_s": trimmed([r["time/wait_s"] for r in steps]), "lease_s": mean("rollout/wall_s", steps) + mean("rollout/judge_s", steps),
    }  # fmt: skip
    return Measured(
        name, what, len(train), buffer["group_size"], buffer["groups_per_batch"], buffer["max_staleness"],
        config["fleet"]["num_engines"], rollout["workers"], rollout["groups_in_flight"], engine["max_num_seqs"],
        blocks("episode/turns"), blocks("episode/sampled_tokens"), blocks("episode/tokens"), _spread(folder),
        round(mean("rollout/tools_s", train) / max(1.0, turns - 1), 4), round(mean("rollout/judge_s", train), 4),
        round(float(np.median([r.get("time/publish_s", 0.07) for r in published])), 4),
        round(float(np.median([r.get("publish/pause_ms", 45.0) for r in published])) / 1000, 4),
        {k: round(v, 5) for k, v in found.items()}, other_learner,
    )  # fmt: skip


def _spread(folder: Path) -> float:
    """Coefficient of variation of an episode's turns among tasks of as many hops, in the evaluations before and after."""
    found = []
    for when in ("before", "after"):
        path, by_hops = folder / "eval" / f"{when}.jsonl", {}  # type: ignore[var-annotated]
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            group = json.loads(line)
            for member in group["members"]:
                turns = sum(t["role"] == "policy" for t in member["trajectory"]["turns"])
                by_hops.setdefault(group["task"]["meta"].get("hops"), []).append(turns)
        found += [float(np.std(v) / np.mean(v)) for v in by_hops.values() if len(v) > 10]
    return round(float(np.mean(found)), 3) if found else 0.15


def latency_cells(pipeline: Mapping[str, Any]) -> list[Measured]:
    """The cells of `benchmarks/pipeline.py`: the demo without learning, synchronous or not, with slow tools.

    It kept seconds and tokens per step alone; turns, sampled tokens and their spread are those of the untrained policy
    (evaluations before training of the demo's runs), and a tool call takes what it took the demo, and the latency.
    """
    figures, made = pipeline["figures"], []
    for ms in (0, 50, 200):
        for kind, staleness in (("asynchronous", 1), ("synchronous", 0)):
            step_s = figures[f"latency {ms} ms: {kind}, s per step"]["median"]
            tokens = figures[f"latency {ms} ms: {kind}, tokens per step"] / 64
            made.append(
                Measured(
                    f"{kind}-{ms}ms", f"{kind}, tools {ms} ms slower", 14, max_staleness=staleness, turns=(4.9,), spread=0.28,
                    sampled=(0.315 * tokens,), tokens=(tokens,), tool_s=0.05 + ms / 1000, judge_s=0.037,
                    found={"step_s": step_s, "tokens_per_s": 64 * tokens / step_s}, speed_of="asynchronous-0ms",
                )
            )  # fmt: skip
    return made


# ---------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class CpuModel:
    """How fast the tiny policy is on two cores."""

    step_s: float = 0.002
    """Engine: a decode step, and more per sequence."""
    per_sequence_s: float = 0.00022
    learner_per_token_s: float = 140e-6
    """With the machine for itself."""
    engine_cores: float = 1.6
    """Engine, its actor and the worker's part of its work ask the machine for so many cores while they work; the learner for 1."""
    turn_s: float = 0.0017
    """Engine, per request: not fitted, see `turn_seconds`."""
    cores: float = 2.0
    """Not fitted."""

    @property
    def free(self) -> dict[str, float]:
        """What is fitted."""
        return {
            k: v
            for k, v in asdict(self).items()
            if k in ("step_s", "per_sequence_s", "learner_per_token_s", "engine_cores")
        }

    def slower(self, factor: float) -> CpuModel:
        """The same on a machine that is slower by a factor, as one is that does other work too."""
        return replace(
            self, step_s=self.step_s * factor, per_sequence_s=self.per_sequence_s * factor, turn_s=self.turn_s * factor,
            learner_per_token_s=self.learner_per_token_s * factor,
        )  # fmt: skip


def turn_seconds(pipeline: Mapping[str, Any]) -> float:
    """An engine's seconds per request, from its speed with short turns and with long ones at 96 sequences."""
    figures = pipeline["figures"]
    short, long = (1 / figures[f"{shape}: ours tokens/s"]["median"] for shape in ("turns", "long"))
    per_request = {s: figures[f"{s}: tokens"] / figures[f"{s}: requests"] for s in ("turns", "long")}
    # seconds per token = decoding + turn_s / tokens per request
    return float((short - long) / (1 / per_request["turns"] - 1 / per_request["long"]))


def system_of(run: Measured, model: CpuModel) -> System:
    return System(
        EngineModel(model.step_s, model.per_sequence_s, turn_s=model.turn_s, max_sequences=run.max_sequences),
        run.group_size, run.groups_per_batch, run.max_staleness, run.engines, run.workers, run.groups_in_flight,
        learner_per_token_s=model.learner_per_token_s, publish_s=run.publish_s, pause_s=run.pause_s,
        judge_s=run.judge_s, cores=model.cores, engine_cores=model.engine_cores, lease_s=0.003,
    )  # fmt: skip


def workload_of(run: Measured) -> Workload:
    """Episodes with the run's lengths: half of the groups are of two hops, half of three, as the demo's tasks are."""

    def draw(lease: int, rng: np.random.Generator) -> list[Episode]:
        block = min(len(run.turns) - 1, lease // run.groups_per_batch * len(run.turns) // run.steps)
        turns, sampled, tokens = run.turns[block], run.sampled[block], run.tokens[block]
        hops = rng.choice([5 / 6, 7 / 6]) if turns > 1.5 else 1.0
        made: list[Episode] = []
        for length in hops * np.exp(rng.normal(-(run.spread**2) / 2, run.spread, run.group_size)):
            # a whole number of turns, the nearest or by chance its neighbour, so that the mean is kept
            number = max(1, math.floor(turns * length + rng.random())) if turns > 1.5 else 1
            share = number / turns if turns > 1.5 else length
            new, said = (tokens - sampled) * share / number, sampled * share / number
            made.append([Turn(new, said, run.tool_s)] * (number - 1) + [Turn(new, said)])
        return made

    return draw


def simulate(run: Measured, model: CpuModel, seed: int = 0, steps: int = 0) -> dict[str, float]:
    """Predicted figures of a run."""
    made: Outcome = Run(system_of(run, model), workload_of(run), steps or run.steps, seed).play()
    return made.figures(SKIP)


def fit(runs: Mapping[str, Measured], start: CpuModel, say: Callable[[str], None] = print) -> CpuModel:
    """Free parameters for the demo's step, training and lease seconds, and for synchronous over asynchronous.

    Four observables, four parameters; a search by coordinates in steps of shrinking ratios, from `start`.
    """

    def misfit(model: CpuModel) -> float:
        demo, found = runs["demo"], simulate(runs["demo"], model, steps=24)
        errors = [math.log(found[k] / demo.found[k]) for k in ("step_s", "train_s", "lease_s")]
        wait, go = runs["synchronous-0ms"], runs["asynchronous-0ms"]
        predicted = simulate(wait, model)["step_s"] / simulate(go, model)["step_s"]
        errors.append(math.log(predicted * go.found["step_s"] / wait.found["step_s"]))
        return sum(e * e for e in errors)

    best, least = start, misfit(start)
    for ratio in (1.3, 1.12, 1.05, 1.02):
        moved = True
        while moved:
            moved = False
            for name in start.free:
                for factor in (ratio, 1 / ratio):
                    tried = replace(best, **{name: getattr(best, name) * factor})
                    if (now := misfit(tried)) < least * 0.999:
                        best, least, moved = tried, now, True
                        break
        say(f"steps of {ratio}: misfit {math.sqrt(least / 4):.4f}")
    return best


def errors(run: Measured, predicted: Mapping[str, float]) -> dict[str, float]:
    """Relative for seconds and tokens per second; in batches for staleness, in share of episodes for dropped."""
    made = {}
    for name in FIGURES:
        if name in run.found:
            off = predicted[name] - run.found[name]
            made[name] = off / run.found[name] if name in ("step_s", "tokens_per_s") else off
    return made


def check(runs: Mapping[str, Measured], model: CpuModel, seed: int = 0) -> list[dict[str, Any]]:
    """Per run: measured, predicted without a look at it (`blind`), and at the speed of its own learner (`matched`).

    For `matched` everything is as much slower as the learner was; of a run with another kind of learner, the learner alone.
    """
    rows, slow = [], {}
    for name, run in runs.items():
        blind = simulate(run, model, seed)
        key = "train_s" if "train_s" in run.found else "step_s"
        slow[name] = run.found[key] / blind[key]
        factor = slow[run.speed_of or name]
        theirs = model.slower(factor)
        if run.other_learner:
            theirs = replace(model, learner_per_token_s=theirs.learner_per_token_s)
        matched = simulate(run, theirs, seed)
        rows.append(
            {
                "run": name, "what": run.what, "measured": {k: run.found[k] for k in FIGURES if k in run.found},
                "blind": {k: round(blind[k], 4) for k in FIGURES}, "matched": {k: round(matched[k], 4) for k in FIGURES},
                "slower": round(factor, 3), "blind_error": _rounded(errors(run, blind)), "matched_error": _rounded(errors(run, matched)),
            }
        )  # fmt: skip
    return rows


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in values.items()}


def load(path: Path) -> dict[str, Measured]:
    """Runs that were read before."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    listed: Any = [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    return {row["name"]: Measured(**row) for row in listed}
