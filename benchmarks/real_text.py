"""Train on real text by configuration alone: `python benchmarks/real_text.py` (on Debian or Ubuntu).

Makes corpus, tasks, tokenizer and model shape from the packages this machine knows (`tests/support/real_text.py`), starts
a local chat endpoint as judge (`tests/support/chat_server.py`), runs `gumshoe train configs/real_text.yaml` as a user would,
and writes the figures to `benchmarks/results/real_text.json`. The policy is a randomly initialised Qwen3, so no learning is
claimed; what is shown is that nothing but configuration is needed. Further `key=value` arguments go to `gumshoe train`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agents.types import Hit, Query  # noqa: E402
from benchmarks.results_file import write_result  # noqa: E402
from envs.jsonl import read_tasks  # noqa: E402
from retrieval.backend import BackendConfig, build_backend  # noqa: E402
from tests.support.chat_server import ChatServer  # noqa: E402
from tests.support.real_text import Inputs, InputsError, make_inputs  # noqa: E402


def overrides(inputs: Inputs, judge_url: str, storage: Path, steps: int) -> list[str]:
    """What this machine's run differs in from `configs/real_text.yaml`: where things lie, and how long."""
    return [
        f"storage_path={storage}",
        f"model.path={inputs.model}",
        f"world.jsonl.corpus={json.dumps([str(inputs.corpus)])}",
        f"world.jsonl.tasks={inputs.tasks}",
        f"world.jsonl.eval_tasks={inputs.eval_tasks}",
        f"judge.base_url={judge_url}",
        f"train.steps={steps}",
    ]


def train(arguments: Sequence[str], timeout_s: float | None = None) -> tuple[int, float]:
    """`gumshoe train configs/real_text.yaml` in a process of its own: its exit status and seconds."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "gumshoe.py"), "train", str(ROOT / "configs" / "real_text.yaml"), *arguments]
    return subprocess.run(command, cwd=ROOT, timeout=timeout_s).returncode, time.monotonic() - began


def figures(run_dir: Path, inputs: Inputs, asked: dict[str, int], seconds: float) -> dict[str, Any]:
    """What the run showed, from its own files."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [r for r in rows if r["kind"] == "train"]
    publishes = [r for r in rows if r["kind"] == "publish"]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))

    def middle(key: str, of: list[dict[str, Any]]) -> float | None:
        found = sorted(float(r[key]) for r in of if r.get(key) is not None)
        return round(found[len(found) // 2], 6) if found else None

    def ends(key: str) -> list[float | None]:
        return [round(float(r[key]), 6) if r.get(key) is not None else None for r in (steps[0], steps[-1])]

    return {
        "inputs": dict(inputs.figures),
        "steps": len(steps),
        "seconds": {"command": round(seconds, 1), **summary.get("seconds", {})},
        "median": {
            key: middle(key, of)
            for key, of in (
                ("time/step_s", steps), ("time/train_s", steps), ("tokens_per_s", steps), ("mismatch/kl_k3", steps),
                ("ratio/p99", steps), ("staleness/mean", steps), ("publish/pause_ms", publishes), ("time/publish_s", publishes),
            )
        },
        "first_and_last": {key: ends(key) for key in ("loss", "entropy", "grad_norm")},
        "ledger": {k.split("/", 1)[1]: v for k, v in steps[-1].items() if k.startswith("ledger/")},
        "success_before": summary.get("success_before"),
        "success_after": summary.get("success_after"),
        "judge_requests": asked,
    }  # fmt: skip


def gold_found(inputs: Inputs, storage: Path, k: int = 5) -> dict[str, float]:
    """Share of tasks whose first gold document is among the first `k` hits of the question, by hops.

    A random policy never searches, so this asks the run's index what a policy would have found.
    """
    index_dir = next((storage / "indexes").glob(f"bm25-{inputs.corpus.stem}-*"))
    backend = build_backend(BackendConfig(kind="bm25"), directory=index_dir)
    tasks = read_tasks(inputs.tasks)

    async def ask() -> list[list[Hit]]:
        try:
            return await backend.search([Query(t.question, k=k) for t in tasks])
        finally:
            await backend.close()

    found = [t.gold_docs[0] in {h.doc_id for h in hit} for t, hit in zip(tasks, asyncio.run(ask()), strict=True)]
    by_hops = {h: [f for t, f in zip(tasks, found, strict=True) if t.meta["hops"] == h] for h in (1, 2)}
    return {f"hops_{h}": round(sum(rows) / len(rows), 3) for h, rows in by_hops.items() if rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps (20)")
    parser.add_argument("--documents", type=int, default=4000, help="documents of the corpus (4000)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "real_text_inputs", help="where inputs are kept")
    parser.add_argument("--storage", type=Path, default=ROOT / "runs", help="where the run goes")
    arguments, more = parser.parse_known_args(argv)
    try:
        inputs = make_inputs(arguments.folder.absolute(), documents=arguments.documents)
    except InputsError as error:
        print(f"real_text: {error}", file=sys.stderr)
        return 2
    storage = arguments.storage.absolute()
    print(f"inputs in {arguments.folder}: {inputs.figures}", flush=True)
    with ChatServer() as judge:
        code, seconds = train([*overrides(inputs, judge.url, storage, arguments.steps), *more])
        asked = judge.asked
    if code:
        return code
    found = figures(storage / "real_text", inputs, asked, seconds)
    found["gold_in_top_5"] = gold_found(inputs, storage)
    print(f"figures in {write_result('real_text', found)}")
    print(f"report in {storage / 'real_text' / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
