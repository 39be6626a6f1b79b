"""What the judge layer adds to a request: `python benchmarks/judge_layer.py [--rounds 6] [--requests 640] [--memory-only]`.

64 requests in flight at a local endpoint in another process, which answers each after a time between half of `--delay-ms` and one
and a half. Raw httpx and the judge (prompt from its file, data blocks, hash, cache look-up on disk, limits, breaker, reading and
checking the reply, cache write) take turns, so that a busy machine hurts both. Two sizes: an outcome judgement (a message of
4 kB) and a support judgement (pages of 40 kB).

`added_ms`: time inside `ask` outside of the HTTP exchange, per request. `difference_ms`: percentile of the judge less that of raw httpx;
it also holds what the layer's computing does to the HTTP client beside it. `cpu_ms`: CPU time of this process per request.
`--memory-only` leaves the cache on disk out (its result file has `_memory` in its name).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.types import JudgeRequest, Status, Task
from benchmarks.results_file import RESULTS, about, write_json
from rewards.carr import support_request
from rewards.evidence import Page
from rewards.judges.base import JudgeConfig
from rewards.judges.chat import ChatJudge
from rewards.judges.endpoint import Endpoint
from rewards.outcome import OUTCOME_SCHEMA
from tests.support.chat_double import Answer, serve, verdict

IN_FLIGHT = 64
LIMIT_MS = 5.0


def endpoint_process(delay_s: float, pipe: Connection) -> None:
    """Answers whatever schema is asked for with True, until it is told to end."""

    def handler(body: dict[str, Any], n: int) -> Answer:
        if "S1" in body["messages"][1]["content"]:
            return verdict({f"S{i}": True for i in range(1, 11)})
        return verdict({"extracted_answer": "Paris", "correct": True})

    async def run() -> None:
        async with serve(handler, delay_s=(0.5 * delay_s, 1.5 * delay_s)) as endpoint:
            pipe.send(endpoint.url)
            while not pipe.poll():
                endpoint.requests.clear()
                endpoint.headers.clear()
                endpoint.texts.clear()
                await asyncio.sleep(0.2)

    asyncio.run(run())


def outcome(number: int) -> JudgeRequest:
    message = f"Request {number}. " + "The capital of France is Paris [1](p). " * 100
    return JudgeRequest(
        "outcome", {"question": "Capital?", "message": message, "answer": "Paris", "answers": ["Paris"]}, OUTCOME_SCHEMA
    )


def support(number: int) -> JudgeRequest:
    pages = [
        Page(i, f"doc{i}", "Title", "2020-01-01", f"Request {number}. " + "France borders Spain and Italy.\n" * 125)
        for i in range(1, 11)
    ]
    task = Task("t", "Q?", ("Paris",), tuple(f"<E0> is fact {i}." for i in range(10)))
    return support_request(task, {i: f"Paris is fact {i}." for i in range(10)}, {"E0": "Paris"}, pages)


async def in_flight(work: Any, numbers: range) -> list[float]:
    """Seconds of every call of `work`, with IN_FLIGHT of them under way; they do not begin all at once."""
    left, took_s = iter(numbers), []

    async def worker(place: int) -> None:
        await asyncio.sleep(place / IN_FLIGHT)
        for number in left:
            began = time.perf_counter()
            await work(number)
            took_s.append(time.perf_counter() - began)

    await asyncio.gather(*(worker(i) for i in range(IN_FLIGHT)))
    return took_s


async def measure(url: str, make: Any, rounds: int, requests: int, folder: str) -> dict[str, Any]:
    bodies: list[Any] = []
    exchange_s: dict[int, float] = {}
    asked_s: dict[int, float] = {}
    real = Endpoint._exchange

    async def timed(self: Endpoint, body: Any) -> Any:
        if len(bodies) < 64:
            bodies.append(body)
        began = time.perf_counter()
        try:
            return await real(self, body)
        finally:
            number = re.search(r"Request (-?\d+)\.", body["messages"][1]["content"])
            exchange_s[int(number[1]) if number else 0] = time.perf_counter() - began

    config = JudgeConfig(
        kind="chat", base_url=url, model="judge", concurrency=IN_FLIGHT, cache_dir=folder, requests_per_minute=10**6, tokens_per_minute=10**9,
    )  # fmt: skip
    judge = ChatJudge(config)
    cpu_s = {"raw": 0.0, "judge": 0.0}
    raw_s: list[float] = []
    layer_s: list[float] = []
    Endpoint._exchange = timed  # type: ignore[method-assign]
    try:
        async with httpx.AsyncClient(
            timeout=60, limits=httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        ) as client:

            async def ask(number: int) -> None:
                request = make(number)
                began = time.perf_counter()
                reply = await judge.ask(request)
                asked_s[number] = time.perf_counter() - began
                assert reply.status is Status.ok, reply

            async def post(number: int) -> None:
                response = await client.post(f"{url}/chat/completions", json=bodies[number % len(bodies)])
                assert response.is_success and response.json()

            await in_flight(ask, range(-IN_FLIGHT, 0))  # warm, and it leaves bodies for the others
            await in_flight(post, range(IN_FLIGHT))
            for turn in range(rounds):
                for name, work, took in (("raw", post, raw_s), ("judge", ask, layer_s)):
                    began = time.process_time()
                    took += await in_flight(work, range(turn * requests, (turn + 1) * requests))
                    cpu_s[name] += time.process_time() - began
    finally:
        Endpoint._exchange = real  # type: ignore[method-assign]
        await judge.close()
    added_s = [asked_s[number] - exchange_s[number] for number in range(rounds * requests)]
    raw_ms, layer_ms, added_ms = (1000 * np.array(v) for v in (raw_s, layer_s, added_s))
    row = {"requests": len(layer_s), "body_kb": round(len(str(bodies[0])) / 1000, 1)}
    for name, values in (("raw_ms", raw_ms), ("judge_ms", layer_ms), ("added_ms", added_ms)):
        row[name] = {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (50, 95, 99)}
    row["difference_ms"] = {p: round(row["judge_ms"][p] - row["raw_ms"][p], 2) for p in ("p50", "p95", "p99")}
    row["cpu_ms"] = {name: round(1000 * seconds / len(layer_s), 2) for name, seconds in cpu_s.items()}
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=640, help="of each kind in a round")
    parser.add_argument("--delay-ms", type=float, default=1000.0, help="the endpoint's own time")
    parser.add_argument("--memory-only", action="store_true", help="no cache on disk")
    parser.add_argument("--no-result", action="store_true", help="print only")
    args = parser.parse_args(argv)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=endpoint_process, args=(args.delay_ms / 1000, there), daemon=True
    )
    process.start()
    url = here.recv()
    rows = {}
    try:
        for name, make in (("outcome", outcome), ("support", support)):
            with tempfile.TemporaryDirectory() as folder:
                cache_dir = "" if args.memory_only else folder
                rows[name] = asyncio.run(measure(url, make, args.rounds, args.requests, cache_dir))
            print(name, rows[name], flush=True)
    finally:
        here.send("end")
        process.join(10)
    worst = max(row["added_ms"]["p99"] for row in rows.values())
    print(f"added p99 at {IN_FLIGHT} in flight: {worst:.2f} ms (limit {LIMIT_MS} ms)")
    if not args.no_result:
        figures = {
            "in_flight": IN_FLIGHT,
            "endpoint_ms": args.delay_ms,
            "limit_ms": LIMIT_MS,
            **rows,
            "added_p99_ms": worst,
        }
        name = "judge_layer_memory.json" if args.memory_only else "judge_layer.json"
        write_json(RESULTS / name, {**about(), **figures})
    return 0 if worst < LIMIT_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
