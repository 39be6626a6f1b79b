"""An evaluation whose runner is killed twice mid-way: what was played is not played again, and the numbers are those of a calm run."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from tests.runs import Tail, finished, gumshoe, kill_driver, wait_for
from tests.support.chat_agent_server import AgentServer, Fault

QUESTIONS = 40
CONFIG = """
name: NAME
storage_path: FOLDER
benchmark: {kind: world}
world: {seed: 5, split: heldout, num_entities: 60, num_tasks: 40, hops: {2: 1.0, 3: 1.0}}
retrieval: {kind: bm25}
policy: {kind: chat, chat: {base_url: URL, model: agent-mixed, backoff_s: 0.05}}
agent: {name: tools}
rollout: {groups_in_flight: 4}
reward: {name: carr, lazy_rubrics: false}
ray: {object_store_mb: 128}
"""
GRACE_S = 30.0


def config(folder: Path, name: str, url: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.replace("NAME", name).replace("FOLDER", str(folder)).replace("URL", url))
    return str(path)


def scores(folder: Path) -> dict[str, Any]:
    """Scores and timeless facts by question."""
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == QUESTIONS
    for row in rows:
        row["facts"].pop("seconds")
    return {row["unit"][0]: row for row in rows}


def test_a_runner_that_is_killed_twice_gives_the_numbers_of_a_calm_run(tmp_path: Path) -> None:
    with AgentServer(delay_s=0.15, faults=[Fault("503", rate=0.05)], model="agent-mixed") as server:
        killed, log = config(tmp_path, "killed", server.url), tmp_path / "log"
        for at_least in (8, 20):
            with gumshoe("eval", killed, log=log) as process:
                units = Tail(tmp_path / "killed" / "units.jsonl")
                seen: list[Any] = []

                def enough(units: Tail = units, seen: list[Any] = seen, at_least: int = at_least) -> bool:
                    seen.extend(units.new())
                    return len(seen) >= at_least

                wait_for(enough, process, log, 150)
                assert process.poll() is None and not kill_driver(process, GRACE_S)
                assert process.returncode == -signal.SIGKILL
        with gumshoe("eval", killed, log=log) as process:
            output = finished(process, log, 150)
        with gumshoe("eval", config(tmp_path, "calm", server.url), log=tmp_path / "calm.log") as process:
            finished(process, tmp_path / "calm.log", 150)

    assert "units were played before and stay as they are" in output
    units = [json.loads(line)["unit"] for line in (tmp_path / "killed" / "units.jsonl").read_text().splitlines()]
    assert len(units) == QUESTIONS and set(Counter(map(tuple, units)).values()) == {1}, "each unit once"
    assert scores(tmp_path / "killed") == scores(tmp_path / "calm")
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("killed", "calm")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"] and summaries[0]["units"]["scored"] == QUESTIONS
    assert 0 < summaries[0]["metrics"]["accuracy"]["mean"] < 1
