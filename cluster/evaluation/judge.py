"""The judge stage: every unit that was played gets a verdict, by the reward and the judge of the configuration.

Invariants: trajectories are only read; a verdict is kept under the hash of reward, judge and prompts, so judging again with another judge adds
verdicts and changes none; one that nobody could give is not written, so the next time asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace

from agents.types import BackendInfo, Group, Member, Verdict
from cluster.actors import came_up
from cluster.errors import UserError
from cluster.evaluation.config import EvalConfig
from cluster.evaluation.journal import VERDICTS, Folder
from cluster.evaluation.records import Judged, Played, State
from cluster.judges import place as place_judges
from cluster.model import resolve
from cluster.retrieval_actors import place as place_retrieval
from cluster.services import RewardServer
from envs.journal import digest
from rewards.judges.base import JudgeConfig
from rewards.judges.identity import fingerprint
from rewards.judges.templates import FOLDER as PROMPTS

READS_PAGES = frozenset({"stepsearch"})
"""Rewards that look documents up."""
Tell = Callable[[int, int, dict[str, float]], None]
"""Called with verdicts so far, verdicts to give, and what is known."""


def judge_hash(config: EvalConfig) -> str:
    """12 hex digits over reward, judge and every prompt."""
    prompts = {p.name: digest(p.read_text(encoding="utf-8")) for p in sorted(PROMPTS.glob("*.md"))}
    prompts = {} if config.judge.kind == "rule" else prompts
    return digest([asdict(config.reward), fingerprint(config.judge), prompts])[:12]


def judge_name(config: EvalConfig) -> str:
    """The judge in words."""
    where = {"chat": f"{config.judge.model} at {config.judge.base_url}", "vllm": config.judge.model}
    return f"{config.reward.name} by {where.get(config.judge.kind, config.judge.kind)}"


def needs_ray(config: EvalConfig) -> bool:
    """Whether judging takes more processes than this one."""
    return (config.judge.kind == "vllm" and not config.judge.replay) or _reads_pages(config)


def to_judge(config: EvalConfig, folder: Folder) -> list[tuple[str, int, str]]:
    """Units that were played and have no verdict of this judge: (task, sample, probe)."""
    judge = judge_hash(config)
    have = {(j.unit.task, j.unit.sample, j.probe) for j in folder.judged() if j.judge == judge}
    done = (key for key, state in folder.keys().items() if state is State.done)
    return [key for key in done if key not in have and key[0] in folder.tasks]


async def judge(config: EvalConfig, folder: Folder, index_dir: str | None, tell: Tell) -> dict[str, int]:
    """Judges what has no verdict yet. Returns how many could not be judged, by cause. Raises UserError when nobody judges any more."""
    wanted = set(to_judge(config, folder))
    total, told, in_a_row = len(wanted), Counter[str](), 0
    room = asyncio.Semaphore(max(8, 2 * config.judge.concurrency))
    lost: Counter[str] = Counter()
    judge_id = judge_hash(config)
    if not wanted:
        return {}
    async with _server(config, index_dir) as server:
        with folder.writer(VERDICTS) as writer:

            async def one(played: Played) -> None:
                nonlocal in_a_row
                try:
                    verdict = await _verdict(server, folder, played, config.rollout.score_timeout_s)
                finally:
                    room.release()
                told["done"] += 1
                if verdict.masked:
                    cause = next(iter(verdict.causes.values()), "unavailable")
                    lost[cause] += 1
                    in_a_row += 1
                    if in_a_row >= config.patience:
                        raise UserError(
                            f"{in_a_row} verdicts in a row could not be given, the last for {cause}; look at the judge, then give the same "
                            "command with --stage judge,score,report"
                        )
                    return
                in_a_row = 0
                told["given"] += not played.probe
                told["right"] += verdict.parts.get("outcome") == 1.0 and not played.probe
                writer.write(Judged(played.unit, judge_id, verdict, played.probe))
                writer.sync()
                tell(told["done"], total, {"success": told["right"] / told["given"]} if told["given"] else {})

            try:
                async with asyncio.TaskGroup() as group:
                    for played in folder.played():
                        if (
                            played.unit.task,
                            played.unit.sample,
                            played.probe,
                        ) in wanted and played.trajectory is not None:
                            await room.acquire()
                            group.create_task(one(played))
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None
    return dict(lost)


async def _verdict(server: RewardServer, folder: Folder, played: Played, timeout_s: float) -> Verdict:
    assert played.trajectory is not None
    name = f"{played.unit.task}/{played.unit.sample}{'/' + played.probe if played.probe else ''}"
    task = folder.tasks[played.unit.task]
    try:
        async with asyncio.timeout(timeout_s):
            (verdict,) = await server.score(Group(name, task, (Member(replace(played.trajectory, verdict=None)),)))
    except TimeoutError:
        return Verdict.unavailable("reward", "score_timeout")
    return verdict


@contextlib.asynccontextmanager
async def _server(config: EvalConfig, index_dir: str | None) -> AsyncIterator[RewardServer]:
    """The reward in this process, with engines and retrieval as actors where they are needed."""
    judge = _whole(config.judge)
    engines = place_judges(judge)
    retrieval, info = None, BackendInfo("none", 0, "")
    handles = list(engines)
    if _reads_pages(config) and index_dir is not None:
        retrieval, others = place_retrieval(config.retrieval, config.service, index_dir)
        handles += [retrieval, *others.values()]
        info = (await asyncio.to_thread(came_up, "retrieval", retrieval.ready.remote(), config.watch.start_s))[1]
    server = RewardServer(config.reward, judge, engines, retrieval, info, config.rollout.search_timeout_s)
    try:
        await server.ready()
        yield server
    finally:
        with contextlib.suppress(Exception):
            await server.close()
        for handle in handles:
            import ray

            with contextlib.suppress(Exception):
                ray.kill(handle)


def _whole(judge: JudgeConfig) -> JudgeConfig:
    """With paths that mean the same everywhere."""
    whole = lambda path: str(resolve(path)) if path else ""  # noqa: E731
    return replace(judge, cache_dir=whole(judge.cache_dir), record=whole(judge.record), replay=whole(judge.replay))


def _reads_pages(config: EvalConfig) -> bool:
    return bool({config.reward.name, *config.reward.combine.rewards} & READS_PAGES)
