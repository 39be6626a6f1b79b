"""How an engine is brought up, and what is told when it dies."""

from __future__ import annotations

from pathlib import Path

from cluster.vllm.engine import PolicyEngine
from cluster.vllm.options import EngineConfig, batched_tokens

_LOG = """\
(EngineCore pid=7) ERROR 11-22 10:26:46 [core.py:1512] EngineCore encountered a fatal error.
(EngineCore pid=7) ERROR 11-22 10:26:46 [core.py:1512]     gen.set_offset(gen.get_offset() - 4)
(EngineCore pid=7) ERROR 11-22 10:26:46 [core.py:1512] RuntimeError: CPU Generator does not use offset
"""


def test_an_engine_that_died_says_what_of(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: of the start, which succeeded\n")
    engine = PolicyEngine(EngineConfig("nowhere"))
    engine._said = log.open()
    engine._said.readlines()
    with log.open("a") as more:
        more.write(_LOG)
    said = str(engine._translate(type("EngineDeadError", (Exception,), {})("gone"), "request"))
    assert said == "the engine's process has died: CPU Generator does not use offset"
    engine._said.close()
    assert str(engine._death()) == said, "also after it was shut down"


def test_an_engine_that_was_killed_has_nothing_to_say() -> None:
    assert str(PolicyEngine(EngineConfig("nowhere"))._death()) == "the engine's process has died"


def test_on_cpu_a_step_has_room_for_the_longest_prompt() -> None:
    few = EngineConfig("m", max_model_len=4096, max_num_batched_tokens=512)
    assert batched_tokens(few, on_cpu=True) == 4096 and batched_tokens(few, on_cpu=False) == 512
    assert batched_tokens(EngineConfig("m"), on_cpu=True) is None, "vLLM then takes enough by itself"
