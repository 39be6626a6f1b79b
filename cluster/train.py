"""The driver: places the actors, starts the learner, watches, evaluates before, during and after, writes the report.

This is the whole story of a run, top to bottom; everything it calls is one noun in a file of its own. A run that was
killed anywhere in it goes on with `resume=`: what was done is on disk, and is not done again.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict
from typing import Any

from agents.report.build import build_report
from cluster.actors import placed
from cluster.buffer import BufferSetup
from cluster.evaluate import Evaluation, success
from cluster.journal import close_books
from cluster.layout import arranged, turns_of
from cluster.learner import LearnerRun, Setup, TrainConfig, call_s, patient
from cluster.model import prepare_model
from cluster.preflight import needs, preflight
from cluster.rundir import RunFolder, open_run, segment_dir, write_tasks, write_trajectories
from cluster.runlog import read_metrics
from cluster.runtime import ray_session
from cluster.schema import RunConfig
from cluster.watch import Teller, watch
from cluster.world import open_world


def run(config: RunConfig) -> dict[str, Any]:
    """Trains as `config` says. Returns what also lies in the run's `summary.json`."""
    if config.replay:
        from cluster.replay import run_replay

        return run_replay(config)
    config = arranged(config)
    preflight(config)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_run(config))
        if (done := over(folder, config.train)) is not None:
            return done
        run_dir = folder.path
        teller = stack.enter_context(
            Teller(folder, config.train.steps, wandb=config.train.wandb, monitor=config.monitor)
        )
        with teller.phase("world, index and model"):
            world = open_world(config.world, config.retrieval, run_dir, run_dir.parent)
            model = prepare_model(config.model, run_dir, config.seed)
        with teller.phase("Ray, engines and actors"):
            segments = stack.enter_context(segment_dir())  # removed last: the learner may write until Ray has ended
            stack.enter_context(ray_session(config.ray, needs(config)))
            actors, speech = stack.enter_context(placed(config, model, world.index_dir, run_dir, segments))
            teller.event(f"engines: {json.dumps(actors.engine_pids)}")
        tasks = world.eval_tasks[: config.train.eval_tasks]
        evaluation = Evaluation(actors, tasks, config.train, run_dir / "eval", teller.step, teller.event)
        with teller.phase("evaluation before training"):
            before, fresh = evaluation.once("before")
        if fresh:
            teller.evaluation(0, before)

        with teller.phase("training"):
            if folder.resumed:
                close_books(folder.journal)
            spoken = speech()
            setup = BufferSetup(
                config.buffer, config.advantage, config.train.steps, config.curriculum, write_tasks(run_dir, world.train_tasks),
                config.seed, ends_at(config, folder), max_learner_failures=config.train.max_failures, journal=str(folder.journal), record=str(run_dir / "groups") if config.record else "",
                about={
                    "protocol": spoken.name, "tokenizer": spoken.tokenizer_fingerprint, "template": spoken.template_fingerprint,
                }, shaper=config.shaper, mask=config.mask, max_sampled_tokens=config.train.max_sampled_tokens,
                sampled_tokens=tokens_by_step(folder),
            )  # fmt: skip
            actors.open_buffer(setup)
            learner = LearnerRun(
                Setup(
                    actors.model, config.train, config.learner, actors.buffer, actors.fleet, segments, str(folder.checkpoints), turns_of(config),
                    actors.learner_place, folder.uri, folder.token, call_s(config.fleet, config.engine),
                ),
                run_dir,
            )  # fmt: skip
            watch(
                actors,
                learner,
                teller,
                patient(config.watch, config.fleet),
                config.train.batch_timeout_s,
                load=actors.load,
                evaluation=evaluation,
            )

        with teller.phase("evaluation after training"):
            after = evaluation.full("after")
        teller.evaluation(teller.step, after)
        summary = {
            "name": config.name, "steps": teller.step, "sampled_tokens": sampled_tokens(folder), "seconds": teller.seconds,
            "success_before": asdict(success(before)), "success_after": asdict(success(after)),
            "ledger": asdict(actors.up("the buffer", actors.buffer.counts.remote())), "checkpoint": newest(folder),
            "judge": actors.up("the reward", actors.reward.load.remote()),  # all it was asked, evaluations included
        }  # fmt: skip
        teller.log.summary(summary)
        write_trajectories(run_dir, after, spoken, actors.up("the buffer", actors.buffer.stepped.remote()))
    return result(folder, summary)


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Evaluates the policy of `config` on its held-out tasks, without training. Returns the summary."""
    preflight(config)
    with open_run(config) as folder, Teller(folder, 0) as teller, ray_session(config.ray, needs(config)):
        with teller.phase("world, index and model"):
            world = open_world(config.world, config.retrieval, folder.path, folder.path.parent)
            model = prepare_model(config.model, folder.path, config.seed)
        with placed(config, model, world.index_dir, folder.path) as (actors, speech):
            tasks = world.eval_tasks[: config.train.eval_tasks]
            with teller.phase("evaluation"):
                groups = Evaluation(actors, tasks, config.train, folder.path / "eval").full("eval")
            teller.evaluation(0, groups)
            write_trajectories(folder.path, groups, speech())
        summary = {"name": config.name, "seconds": teller.seconds, "success": asdict(success(groups))}
        teller.log.summary(summary)
    return result(folder, summary)


def over(folder: RunFolder, train: TrainConfig) -> dict[str, Any] | None:
    """The result of a resumed run that has come to its end, else None."""
    done = folder.finished if folder.resumed else None
    if done is None:
        return None
    limit = "steps" if train.steps <= int(done.get("steps", 0)) else ""
    if not limit and 0 < train.max_sampled_tokens <= sampled_tokens(folder):
        limit = "max_sampled_tokens"
    if folder.lines and not limit:  # told to go on
        (folder.path / "summary.json").unlink()
        return None
    return result(folder, done) | {
        "note": f"finished after {done['steps']} steps; raise train.{limit or 'steps'} to go on"
    }


def result(folder: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary, and where to look."""
    return {**summary, "report": str(build_report(folder.path)), "summary": str(folder.path / "summary.json")}


def ends_at(config: RunConfig, folder: RunFolder) -> float:
    """Unix time after which no further batch ships: what earlier starts of the run have trained counts."""
    if not config.train.max_minutes:
        return float("inf")
    return time.time() + 60 * config.train.max_minutes - sum(r.get("time/step_s", 0.0) for r in _steps(folder))


def newest(folder: RunFolder) -> str:
    """The newest checkpoint's folder."""
    from agents.learning.checkpoint import checkpoints
    from cluster.mirror import newest_checkpoint

    if folder.uri:
        return newest_checkpoint(f"{folder.uri}/checkpoints")
    return str(next(reversed(checkpoints(folder.checkpoints)), ""))


def sampled_tokens(folder: RunFolder) -> int:
    """Tokens sampled for the batches that were trained, each step counted once."""
    return round(sum(tokens_by_step(folder).values()))


def tokens_by_step(folder: RunFolder) -> dict[int, float]:
    """The same by optimiser step, from 1."""
    return {int(r["step"]): r.get("episodes", 0) * r.get("episode/sampled_tokens", 0) for r in _steps(folder)}


def _steps(folder: RunFolder) -> list[dict[str, Any]]:
    """The row of each optimiser step; of one that was taken again after a restore, the last."""
    return list({r["step"]: r for r in read_metrics(folder.path) if r["kind"] == "train"}.values())
