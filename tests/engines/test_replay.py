"""A recorded run of SLATE: its candidates are trained and told of; replayed, the same algorithm gives the same losses, another one
others, and no sampler is started."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from agents.advantages import AdvantageConfig
from agents.curriculum import Uniform
from agents.learning.config import LearnerConfig
from agents.learning.learner import Learner
from agents.learning.model import load_model
from agents.types import Task, Version
from cluster.buffer import Buffer, BufferConfig, BufferSetup
from cluster.config import ROOT, load_config
from cluster.record import Recording, recorded, recorded_batches
from cluster.replay import Replay
from cluster.schema import RunConfig
from tests.builders import a_group
from tests.learning_tools import tiny_qwen3
from tests.runs import SMALL, below, finished, gumshoe, rows, wait_for

STEPS, K, BUDGET = 4, 3, 4
SLATE = (
    *SMALL, "buffer.group_size=1", f"train.steps={STEPS}", "train.eval_tasks=1", "buffer.max_staleness=0", "reward.name=slate",
    "learner.loss.entropy_coef=0.01", "advantage.name=grpo", "sampling.sampler=steps", f"sampling.steps.k={K}",
    f"sampling.steps.budget={BUDGET}", f"reward.slate.budget={BUDGET}",
)  # fmt: skip
POLICY = ROOT / "envs" / "world" / "policy"


MOVES = 6
"""Steps of the run that went back."""


async def take(source: Any, learner: Learner, incarnation: int, step: int) -> float:
    """One optimiser step from a buffer or a replay; returns its loss."""
    batch = await source.next_batch(incarnation, step)
    loss = learner.step(list(batch.shards[0]))["loss"]
    await source.settle(incarnation, step, {})
    await source.published(incarnation, step + 1, {})
    return loss


async def test_a_run_that_went_back_replays_what_it_trained_in_the_end(tmp_path: Path) -> None:
    """Groups come back out of order, and steps 2 and 3 are trained twice, the second time on other groups."""
    tasks = [Task(f"t{i}", "question?", ("x",)) for i in range(40)]
    setup = BufferSetup(
        BufferConfig(1, 2, 3), AdvantageConfig(name="c_grpo"), MOVES, journal=str(tmp_path / "ledger.jsonl"),
        record=str(tmp_path / "groups"),
    )  # fmt: skip
    buffer, learner = Buffer(setup, Uniform(tasks, seed=3)), Learner(tiny_qwen3(), LearnerConfig(lr=1e-3))
    incarnation = await buffer.enter(None)
    await buffer.published(incarnation, 0, {})

    async def play(step: int) -> None:
        leases = []
        while (lease := await buffer.lease("w", 0.01)) is not None:
            leases.append(lease)
        for number, lease in enumerate(reversed(leases)):
            seed, version = int(lease.task.id[1:]), Version(incarnation, step)
            rewards = (1.0, 0.0, float(seed % 2))
            group = a_group(
                rewards, task=lease.task.id, group=lease.id, version=version, seed=seed + 100 * step + number
            )
            assert await buffer.put(lease.id, [group])

    losses: dict[int, float] = {}
    saved, weights = None, None
    step = 0
    while step < MOVES:
        await play(step)
        losses[step] = await take(buffer, learner, incarnation, step)
        step += 1
        if step == 2 and saved is None:
            saved, weights = await buffer.state(), copy.deepcopy(learner.state_dict())
            await buffer.checkpointed(incarnation, 2)
        if step == 4 and incarnation == 0:  # the learner dies
            learner = Learner(tiny_qwen3(), LearnerConfig(lr=1e-3))
            learner.load_state_dict(weights)
            incarnation, step = await buffer.enter(saved), 2
            await buffer.published(incarnation, 2, {})
    await buffer.close()

    replay, again = Replay(setup, str(tmp_path)), Learner(tiny_qwen3(), LearnerConfig(lr=1e-3))
    replayed = await replay.enter(None)
    found = [await take(replay, again, replayed, step) for step in range(MOVES)]
    assert found == pytest.approx([losses[step] for step in range(MOVES)], abs=1e-6)
    assert len({round(loss, 6) for loss in found}) == MOVES, "every step is another one"


def train(tmp_path: Path, name: str, *more: str) -> tuple[Path, set[str]]:
    """A small run to its end; returns its folder and the titles of all its processes seen on the way."""
    log, run_dir, seen = tmp_path / f"{name}.log", tmp_path / name, set[str]()
    command = ("train", "configs/demo.yaml", f"name={name}", f"storage_path={tmp_path}", *SLATE, *more)
    with gumshoe(*command, log=log) as process:

        def look() -> bool:
            seen.update(below(process.pid).values())
            return process.poll() is not None

        wait_for(look, process, log, 300)
        finished(process, log, 1)
    return run_dir, seen


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir, "train")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir, seen = train(tmp_path_factory.mktemp("live"), "live", "--record")
    assert any(title.startswith("VLLM") for title in seen), "what the replay must not show would not be seen"
    return run_dir


def test_a_live_run_records_every_group_it_trains(live: Path) -> None:
    recording = Recording(live)
    assert recording.missing == 0 and len(recording) == 2 * STEPS
    assert [entry.step for entry in recording.entries] == [step for step in range(STEPS) for _ in range(2)]
    assert all(v is not None for group in recorded(live) for v in group.verdicts)
    assert recording.manifest["protocol"] == next(recorded(live)).members[0].trajectory.identity.protocol


def test_candidates_are_trained_and_episodes_are_counted(live: Path) -> None:
    steps = rows(live, "train")
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)) and steps[-1]["ledger/trained"] == 2 * STEPS
    for row, (_, groups) in zip(steps, recorded_batches(live), strict=True):
        candidates = sum(len(step.members) for group in groups for step in group.steps)
        assert row["groups/samples"] == candidates and candidates % K == 0 and row["episodes"] == 2
        assert row["staleness/max"] == 0 and abs(row["mismatch/kl_k3"]) < 1e-6
        assert row["learner/shared_tokens"] > 0
    assert max(row["grad_norm"] for row in steps) > 0


def test_the_cost_of_judging_and_the_candidates_are_told(live: Path) -> None:
    judge = json.loads((live / "summary.json").read_text())["judge"]
    assert judge["judge/questions_steps"] >= 4
    assert 0 < judge["judge/asked_steps"] <= 2 * K * BUDGET * judge["judge/questions_steps"]
    page = (live / "report.html").read_text()
    assert f"{K} candidates, number " in page and "sampled step by step" in page


def test_the_same_algorithm_gives_the_same_losses(live: Path, tmp_path: Path) -> None:
    same, seen = train(tmp_path, "same", "--replay", str(live))
    assert losses(same) == pytest.approx(losses(live), abs=1e-5)
    assert any(loss != 0 for loss in losses(live))
    players = ("VLLM", "ray::Sampler", "ray::Rollout", "ray::Retrieval", "ray::Reward", "ray::Fleet")
    assert not [title for title in seen if title.startswith(players)]
    assert any(title.startswith("ray::Replay") for title in seen)

    summary = json.loads((same / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["ledger"]["trained"] == 2 * STEPS and summary["checkpoint"]
    assert all(row["staleness/max"] == 0 for row in rows(same, "train"))
    assert (same / "report.html").exists()


async def test_another_algorithm_trains_otherwise_on_the_same_groups(live: Path) -> None:
    """In this process: the learner's side is the same, and the command was seen above."""
    config = load_config("demo", list(SLATE), RunConfig)
    setup = BufferSetup(config.buffer, AdvantageConfig(name="dr_grpo"), STEPS)
    replay, learner = Replay(setup, str(live)), Learner(load_model(str(POLICY), config.learner), config.learner)
    incarnation = await replay.enter(None)
    other = [await take(replay, learner, incarnation, step) for step in range(STEPS)]
    assert other != pytest.approx(losses(live), abs=1e-5)
