"""`gumshoe eval` on a closed world, as a user calls it: a checkpoint through vLLM, and a chat agent over HTTP."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.runs import Tail, below, end, events, finished, gumshoe, wait_for
from tests.support.chat_agent_server import AgentServer, Fault


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_shipped_checkpoint_is_evaluated_and_judged_again(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "look"
    command = (
        "eval", "eval_demo", "name=look", f"storage_path={tmp_path}", "ray.object_store_mb=128", "world.num_entities=60", "world.num_tasks=16",
        "engine.max_num_seqs=32", "probes=[oracle]", "budget.calls=14",
    )  # fmt: skip
    with gumshoe(*command, log=log) as process:
        output = finished(process, log, 240)
    units = rows(folder / "units.jsonl")
    assert (
        len(units) == 32 and {u["state"] for u in units} == {"done"} and {u["probe"] for u in units} == {"", "oracle"}
    )
    said = [t for u in units for t in u["trajectory"]["turns"] if t["role"] == "policy"]
    assert all(t["text"] and t["usage"]["tokens_out"] == len(t["token_ids"]) for t in said)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["units"] == {"scored": 16, "unjudged": 0, "failed": 0, "missing": 0}
    assert 0 < summary["metrics"]["accuracy"]["mean"] < 1 and summary["factorised"] is not None
    assert (folder / "report.html").stat().st_size > 10_000 and "accuracy" in output

    before = (folder / "units.jsonl").read_bytes()
    with gumshoe(*command, "reward.name=outcome", "--stage", "judge,score", log=log) as process:
        finished(process, log, 120)
    assert (folder / "units.jsonl").read_bytes() == before
    judges = {row["judge"] for row in rows(folder / "verdicts.jsonl")}
    assert len(judges) == 2 and json.loads((folder / "summary.json").read_text())["judge_hash"] in judges


def test_a_chat_agent_is_evaluated_over_http(tmp_path: Path) -> None:
    path, log, folder = tmp_path / "e.yaml", tmp_path / "log", tmp_path / "chat"
    with AgentServer(faults=[Fault("500", rate=0.1), Fault("drop", rate=0.1, salt="x")]) as server:
        path.write_text(
            f"name: chat\nstorage_path: {tmp_path}\nbenchmark: {{kind: world}}\n"
            "world: {seed: 2, split: heldout, num_entities: 60, num_tasks: 10, hops: {2: 1.0}}\nretrieval: {kind: bm25}\n"
            f"policy: {{kind: chat, chat: {{base_url: '{server.url}', model: agent, backoff_s: 0.05, price_in: 1.0, price_out: 2.0}}}}\n"
            "agent: {name: react}\nprobes: [closed_book]\nrollout: {workers: 2}\nray: {object_store_mb: 128}\n"
        )
        with gumshoe("eval", str(path), log=log) as process:
            finished(process, log, 200)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["accuracy"]["mean"] == 1.0 and summary["cost"]["total"] > 0
    units = rows(folder / "units.jsonl")
    assert len(units) == 20 and all(u["trajectory"]["identity"]["protocol"].startswith("chat:") for u in units)


def test_a_served_checkpoint_that_is_killed_under_way_costs_no_question_anything(tmp_path: Path) -> None:
    """The server alone is killed: what it leaves behind ends too, its actor starts another, and questions wait for that."""
    log, folder, questions = tmp_path / "log", tmp_path / "killed", 24
    command = (
        "eval", "eval_demo", "name=killed", f"storage_path={tmp_path}", "agent.name=react", "agent.settings.reserve_tokens=64",
        "agent.settings.max_reply_tokens=32", "engine.max_model_len=2048", "world.num_entities=60", f"world.num_tasks={questions}",
        "retrieval.kind=bm25", "rollout.groups_in_flight=3", "reward.name=outcome", "ray.object_store_mb=128",
    )  # fmt: skip
    with gumshoe(*command, log=log) as process:
        units, seen = Tail(folder / "units.jsonl"), list[Any]()

        def some() -> bool:
            seen.extend(units.new())
            return len(seen) >= 4

        wait_for(some, process, log, 180)
        [server] = [pid for pid, title in below(process.pid).items() if "cluster.vllm.serve" in title]
        family = list(below(server))
        os.kill(server, signal.SIGKILL)
        assert family and not end(family, 10)
        finished(process, log, 240)
    played = rows(folder / "units.jsonl")
    assert sorted(u["unit"][0] for u in played) == sorted({t["id"] for t in rows(folder / "tasks.jsonl")})
    assert len(played) == questions and {(u["state"], u["tries"]) for u in played} == {("done", 1)}
    assert all(t["usage"]["tokens_out"] for u in played for t in u["trajectory"]["turns"] if t["role"] == "policy")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["units"] == {"scored": questions, "unjudged": 0, "failed": 0, "missing": 0}
    assert summary["metrics"]["accuracy"]["n"] == questions
    assert any("chat engine 0 died" in line for line in events(folder))
