"""Judge engines without Ray and without vLLM: the actor's class around a child that speaks the same protocol."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from agents.types import Status, Task
from cluster import nodecache
from cluster.judges import JudgeEngine, checkpoint, hosted, place
from cluster.nodecache import ship
from cluster.nodes import Answer, Node
from rewards.judges.base import JudgeConfig, JudgeError, make_judge
from rewards.judges.chat import ChatJudge
from rewards.outcome import outcome_request
from tests.support.reward_cases import rollout

CHILD = (sys.executable, "-m", "tests.support.chat_server")
REQUEST = outcome_request(Task("t", "Capital of France?", ("Paris",)), rollout("## Exact Answer\nParis"))


def config(**options: Any) -> JudgeConfig:
    return JudgeConfig(**({"kind": "vllm", "model": "models/judge", "num_gpus": 0.0, "start_s": 60.0} | options))


async def test_an_engine_starts_judges_and_ends() -> None:
    engine = JudgeEngine(config(), CHILD)
    early = await engine.ask(REQUEST)
    assert (early.status, early.cause) == (Status.unavailable, "judge_engine_starting")
    assert (await engine.pulse())[0] == "its engine to start"
    assert await engine.ready() == os.getpid() and (await engine.pulse())[0] == ""
    replies = await asyncio.gather(engine.ask(REQUEST), engine.ask(REQUEST))
    assert all(
        r.status is Status.ok and r.value["correct"] and r.prompt_hash.endswith("@models/judge") for r in replies
    )
    assert (await engine.stats())["requests"] == 1
    child = engine._server.child.pid
    await engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not engine._server.log.exists()


async def test_an_engine_that_does_not_start_is_one_line() -> None:
    engine = JudgeEngine(config(), (sys.executable, "-c", "raise ValueError('no such checkpoint: models/judge')"))
    with pytest.raises(
        JudgeError, match=r"the judge engine for models/judge did not start: .*; mend judge.model or judge.engine_args"
    ):
        await engine.ready()
    await engine.close()
    slow = JudgeEngine(config(start_s=0.5), (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(JudgeError, match=r"was not up within judge.start_s=0.5"):
        await slow.ready()
    await slow.close()


async def test_a_judge_folder_comes_to_a_node_that_does_not_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUMSHOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nodecache, "_held", {})
    folder, storage, gone = tmp_path / "judge", str(tmp_path / "storage"), tmp_path / "not mounted here"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    nodes = [Node(name * 32, name, {}, {}) for name in "ab"]
    blind: Any = lambda nodes, work, *_: [Answer(node, "") for node in nodes]  # noqa: E731
    source = ship(checkpoint(config(model=str(folder))), nodes, storage, ask=blind)
    folder.rename(gone)  # as another node has it
    told = tmp_path / "told"
    script = f"import json, sys; json.dump(sys.argv[1:], open({str(told)!r}, 'w')); raise ValueError('enough')"
    engine = JudgeEngine(config(model=str(folder)), (sys.executable, "-c", script), source)
    with pytest.raises(JudgeError, match="enough"):
        await engine.ready()
    await engine.close()
    served, _, name, *_ = json.loads(told.read_text())
    assert name == str(folder) and Path(served, "config.json").read_text() == '{"model_type": "qwen3"}'
    other = ChatJudge(replace(config(model=str(folder)), kind="vllm", base_url="http://x/v1"))
    assert engine._judge._identity != other._identity, "other weights under that name would be the same judge"

    shutil.rmtree(tmp_path / "storage")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(nodecache, "_held", {})  # as in another process
    with pytest.raises(JudgeError, match=rf"judge.model {folder}: this node sees neither .*; mount one of them"):
        JudgeEngine(config(model=str(folder)), CHILD, source)
    with pytest.raises(JudgeError, match=r"is no folder of node .*; mount it there, or keep judges off that node"):
        JudgeEngine(config(model=str(folder)), CHILD)
    assert not checkpoint(config()) and not checkpoint(config(model=str(gone), replay="traffic.jsonl"))


async def test_what_a_server_that_was_killed_leaves_behind_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("cluster.hosted.os._exit", lambda status: ended.set())
    script = "import runpy, subprocess; subprocess.Popen(['sleep', '60']); runpy.run_module('tests.support.chat_server', run_name='__main__')"
    engine = JudgeEngine(config(), (sys.executable, "-c", script))
    await engine.ready()
    child = psutil.Process(engine._server.child.pid)
    [left] = [c for c in child.children() if c.name() == "sleep"]
    child.kill()
    assert await asyncio.to_thread(ended.wait, 10)
    assert psutil.wait_procs([left], 10)[0] or left.status() == psutil.STATUS_ZOMBIE
    await engine.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "1"),
        ({"engine_args": ["--kv-cache-memory-bytes=2000"]}, "None"),
        ({"engine_args": ["--gpu-memory-utilization", "0.3"]}, "None"),
        ({"num_gpus": 1.0}, "None"),
    ],
)
async def test_an_engine_on_the_cpu_takes_a_modest_share_of_memory_unless_told(
    options: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    script = "import os; raise ValueError('space ' + str(os.environ.get('VLLM_CPU_KVCACHE_SPACE')))"
    engine = JudgeEngine(config(**options), (sys.executable, "-c", script))
    with pytest.raises(JudgeError, match=f"space {said}"):
        await engine.ready()
    await engine.close()


def test_only_hosted_judges_need_engines() -> None:
    assert place(JudgeConfig()) == [] and hosted(JudgeConfig(), []) is None
    assert place(config(replay="traffic.jsonl")) == []
    with pytest.raises(JudgeError, match=r"judge.kind vllm needs engines, which a training run hosts"):
        make_judge(config())
