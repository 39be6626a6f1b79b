"""The driver: places the actors, starts the learner, watches, evaluates before, during and after, writes the report.

This is the whole story of a run, top to bottom; everything it calls is one noun in a file of its own.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict
from typing import Any

import ray

from agents.curriculum import CURRICULA
from agents.report.build import build_report
from agents.types import Group
from cluster.actors import Actors, placed
from cluster.errors import UserError
from cluster.evaluate import Evaluation, eval_row, success
from cluster.learner import LearnerRun, Setup
from cluster.model import prepare_model
from cluster.preflight import needs, preflight
from cluster.progress import Progress
from cluster.rundir import open_run, segment_dir, write_trajectories
from cluster.runlog import RunLog
from cluster.runtime import ray_session
from cluster.schema import RunConfig
from cluster.world import open_world

POLL_S = 0.5


def run(config: RunConfig) -> dict[str, Any]:
    """Trains as `config` says. Returns what also lies in the run's `summary.json`."""
    preflight(config)
    progress = Progress(config.train.steps)
    phases = Phases(progress)
    with contextlib.ExitStack() as stack:
        run_dir = stack.enter_context(open_run(config))
        log = stack.enter_context(RunLog(run_dir))
        stack.callback(progress.close)
        with phases("world, index and model"):
            world = open_world(config.world, config.retrieval, run_dir, run_dir.parent)
            model = prepare_model(config.model, run_dir, config.seed)
        with phases("Ray, engines and actors"):
            segments = stack.enter_context(segment_dir())  # removed last: the learner may write until Ray has ended
            stack.enter_context(ray_session(config.ray, needs(config)))
            actors, speech = stack.enter_context(placed(config, model, world.index_dir))
            log.event(0, f"engines: {json.dumps(actors.engine_pids)}")
        tasks = world.eval_tasks[: config.train.eval_tasks]
        evaluation = Evaluation(actors, tasks, config.train, run_dir / "eval")
        with phases("evaluation before training"):
            before = evaluation.full("before")
        tell(log, progress, 0, before)

        with phases("training"):
            actors.open_buffer(CURRICULA[config.curriculum](world.train_tasks, config.seed))
            setup = Setup(model, config.train, config.learner, actors.buffer, actors.fleet, segments)
            learner = LearnerRun(setup, run_dir)
            step, tokens = watch(config, actors, learner, evaluation, log, progress)

        with phases("evaluation after training"):
            after = evaluation.full("after")
        tell(log, progress, step, after)
        summary = {
            "name": config.name, "steps": step, "sampled_tokens": tokens, "seconds": phases.seconds,
            "success_before": asdict(success(before)), "success_after": asdict(success(after)),
            "ledger": asdict(ray.get(actors.buffer.counts.remote())), "checkpoint": learner.checkpoint,
        }  # fmt: skip
        log.summary(summary)
        write_trajectories(run_dir, after, speech())
    return {**summary, "report": str(build_report(run_dir)), "summary": str(run_dir / "summary.json")}


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Evaluates the policy of `config` on its held-out tasks, without training. Returns the summary."""
    preflight(config)
    progress = Progress(0)
    phases = Phases(progress)
    with open_run(config) as run_dir, RunLog(run_dir) as log, ray_session(config.ray, needs(config)):
        with phases("world, index and model"):
            world = open_world(config.world, config.retrieval, run_dir, run_dir.parent)
            model = prepare_model(config.model, run_dir, config.seed)
        with placed(config, model, world.index_dir) as (actors, speech):
            evaluation = Evaluation(actors, world.eval_tasks[: config.train.eval_tasks], config.train, run_dir / "eval")
            with phases("evaluation"):
                groups = evaluation.full("eval")
            tell(log, progress, 0, groups)
            write_trajectories(run_dir, groups, speech())
        summary = {"name": config.name, "seconds": phases.seconds, "success": asdict(success(groups))}
        log.summary(summary)
    return {**summary, "report": str(build_report(run_dir)), "summary": str(run_dir / "summary.json")}


def tell(log: RunLog, progress: Progress, step: int, groups: list[Group]) -> None:
    """An evaluation, to the log and to whoever watches; a world without held-out tasks has none."""
    if groups:
        row = eval_row(groups)
        log.evaluation(step, row)
        progress.evaluation(step, row)


def watch(
    config: RunConfig, actors: Actors, learner: LearnerRun, evaluation: Evaluation, log: RunLog, progress: Progress
) -> tuple[int, int]:
    """Until training ends: log what the buffer reports, replace what died, evaluate. Returns steps and tokens trained."""
    step, tokens, last = 0, 0.0, time.time()
    while True:
        for row in ray.get(actors.buffer.rows.remote()):
            kind, at, when = row.pop("kind"), row.pop("step"), row.pop("time")
            if kind == "event":
                log.event(at, row["message"])
                progress.note(row["message"])
                continue
            if kind == "train":
                row["time/step_s"], last, step = when - last, when, at
                row["tokens_per_s"] = row["episodes"] * row["episode/tokens"] / max(row["time/step_s"], 1e-9)
                tokens += row["episodes"] * row["episode/sampled_tokens"]
                progress.update(at, row)
            log.log(kind, at, row)
        for line in actors.tend():
            log.event(step, line)
            progress.note(line)
        found = evaluation.tick(step)
        if found is not None:
            log.evaluation(*found)
            progress.evaluation(*found)
        if not learner.running:
            ray.get(actors.buffer.close.remote())
            return step, int(tokens)
        if time.time() - last > config.train.batch_timeout_s:
            counts = ray.get(actors.buffer.counts.remote())
            raise UserError(
                f"no optimiser batch within {config.train.batch_timeout_s:g} s; the ledger holds {counts}; look at samplers "
                "and judge in metrics.jsonl, or raise train.batch_timeout_s"
            )
        time.sleep(POLL_S)


class Phases:
    """Seconds per named phase of the run, told as they pass."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._name = ""
        self._began = 0.0

    def __call__(self, name: str) -> Phases:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._progress.note(f"{self._name} ...")

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = round(time.monotonic() - self._began, 1)
