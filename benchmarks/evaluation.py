"""Questions per minute of the evaluation runner, over those of a bare asyncio loop on the same endpoint: what the runner costs.

    python benchmarks/evaluation.py

Both play the same questions of a closed world with the same agent and the same client against one scripted endpoint, a process of its own that
takes a fixed time for every reply, with as many questions under way. The bare loop is the agent, the client and an index in one process: no Ray, no
journal, no budgets. What both keep from round to round is alike: connections stay open, indexes stay loaded, one round of each is played before
any is timed, and no searches or pages are cached on either side. They take turns, round by round, and every round is compared with the one before
it; starting Ray and the index is not counted. A row for each time of a reply: at 500 ms, a quick model's, the ratio says what an evaluation loses; at 20
and 0 ms replies hide nothing, and what is left over is the runner's own work per question (`cost_ms`), on a machine that the endpoint shares.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.chat.registry import AGENTS
from agents.types import Identity, Task, Uid
from benchmarks.results_file import write_result
from cluster.evaluation.chat import ChatEndpoint
from cluster.evaluation.config import ChatConfig, EvalConfig
from cluster.evaluation.journal import Folder, open_folder
from cluster.evaluation.plan import jobs, open_corpus, questions
from cluster.evaluation.run import Staff, Teller, staffed, work
from cluster.runlog import RunLog
from cluster.runtime import ray_session
from envs.benchmarks.base import BenchmarkConfig
from envs.sandbox import Session
from retrieval.backend import open_backend

GOAL = 0.9
AGENT = "tools"


def evaluation(folder: str, url: str, delay_ms: float, args: argparse.Namespace) -> EvalConfig:
    """What the runner is told."""
    config = EvalConfig(
        name=f"speed-{delay_ms:g}",
        storage_path=folder,
        benchmark=BenchmarkConfig(kind="world"),
        samples=args.rounds + 1,
    )
    config.world = replace(config.world, seed=5, num_entities=60, num_tasks=args.questions, hops={2: 1.0, 3: 1.0})
    config.policy.kind, config.agent.name, config.retrieval.kind = "chat", AGENT, "bm25"
    config.policy.chat = ChatConfig(base_url=url, model="agent", concurrency=args.in_flight)
    config.rollout.groups_in_flight = args.in_flight
    config.service = replace(config.service, cache_size=0, page_cache_mb=0.0)  # the bare loop has none either
    return config


class Bare:
    """Agent, client and index in one process; all of it stays open from round to round, as a worker's does."""

    def __init__(self, config: EvalConfig, index_dir: str, in_flight: int) -> None:
        self._config, self._in_flight, self._loop = config, in_flight, asyncio.Runner()
        self._backend, self._endpoint = self._loop.run(self._opened(index_dir))

    def play(self, tasks: Sequence[Task]) -> float:
        """Questions per minute."""
        began = time.perf_counter()
        right = self._loop.run(self._all(tasks))
        seconds = time.perf_counter() - began
        assert all(right), "the scripted agent answers all questions"
        return 60 * len(tasks) / seconds

    def close(self) -> None:
        self._loop.run(self._endpoint.close())
        self._loop.run(self._backend.close())
        self._loop.close()

    async def _opened(self, index_dir: str) -> tuple[Any, ChatEndpoint]:
        policy = self._config.policy
        return open_backend(self._config.retrieval, index_dir), ChatEndpoint(policy.chat, policy.temperature)

    async def _all(self, tasks: Sequence[Task]) -> list[bool]:
        room = asyncio.Semaphore(self._in_flight)

        async def one(task: Task) -> bool:
            async with room:
                box = Session(self._backend, self._config.sandbox)
                identity = Identity("bare", Uid(task.id, "g", 0), "", "", "")
                episode = await AGENTS[AGENT](task, identity, self._endpoint, box, self._config.agent.settings)
                await box.close()
                return next(episode.trajectories()).answer in task.answers

        return await asyncio.gather(*(one(task) for task in tasks))


def runner(staff: Staff, folder: Folder, teller: Teller) -> float:
    """Questions per minute of one sample of every question."""
    left = jobs(staff.config, folder, retry_errors=False)[: len(folder.tasks)]
    before, began = teller.done, time.perf_counter()
    work(staff, folder, left, teller)
    seconds = time.perf_counter() - began
    assert teller.done - before == len(left)
    return 60 * len(left) / seconds


def measured(storage: str, delay_ms: float, args: argparse.Namespace) -> dict[str, Any]:
    """One row, in an open Ray session: both sides against an endpoint that takes so long for a reply."""
    command = [
        sys.executable,
        "-m",
        "tests.support.chat_agent_server",
        "--port",
        "0",
        "--delay-s",
        str(delay_ms / 1000),
    ]
    endpoint = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parent.parent)
    rates: dict[str, list[float]] = {"bare": [], "runner": []}
    try:
        assert endpoint.stdout is not None
        config = evaluation(storage, endpoint.stdout.readline().split()[0], delay_ms, args)
        benchmark = questions(config)
        with open_folder(config, benchmark, {}) as folder:
            index_dir, _ = open_corpus(config, benchmark)
            assert index_dir is not None
            teller = Teller(RunLog(folder.path, tensorboard=False), args.questions * (args.rounds + 1), "question")
            bare = Bare(config, index_dir, args.in_flight)
            with staffed(config, folder, index_dir, args.questions) as staff:
                bare.play(benchmark.tasks)  # now connections are open and indexes loaded on both sides
                runner(staff, folder, teller)
                for _ in range(args.rounds):
                    rates["bare"].append(bare.play(benchmark.tasks))
                    rates["runner"].append(runner(staff, folder, teller))
                    print({"endpoint_ms": delay_ms} | {k: round(v[-1], 1) for k, v in rates.items()}, flush=True)
            bare.close()
    finally:
        endpoint.terminate()
        endpoint.wait(10)
    pairs = list(zip(rates["runner"], rates["bare"], strict=True))
    ratios = [r / b for r, b in pairs]
    return {
        "endpoint_ms": delay_ms,
        "ratio": round(statistics.median(ratios), 4),
        "cost_ms": round(statistics.median(60_000 / r - 60_000 / b for r, b in pairs), 3),
        "ratios": [round(r, 4) for r in ratios],
        "per_minute": {k: [round(r, 1) for r in v] for k, v in rates.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--questions", type=int, default=64, help="of a round")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument(
        "--delay-ms",
        type=float,
        nargs="+",
        default=[500.0, 20.0, 0.0],
        help="the endpoint's own time for a reply, a row each; the goal is for the first",
    )
    parser.add_argument("--no-result", action="store_true", help="print only")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as storage, ray_session(EvalConfig().ray):
        rows = [measured(storage, delay_ms, args) for delay_ms in args.delay_ms]
    for row in rows:
        print(f"replies of {row['endpoint_ms']:g} ms: ratio {row['ratio']:.3f}, {row['cost_ms']:+.2f} ms a question")
    ratio = rows[0]["ratio"]
    print(f"ratio {ratio:.3f} (goal {GOAL})")
    if not args.no_result:
        given = {"questions": args.questions, "in_flight": args.in_flight, "goal": GOAL, "ratio": ratio, "rows": rows}
        write_result("evaluation", given)
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
