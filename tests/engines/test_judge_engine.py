"""A judge engine with a real server: `vllm serve` on the CPU with a small model of random weights, whose replies only the schema shapes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from agents.types import JudgeReply, Status, Task
from cluster.judges import KEY, JudgeEngine
from rewards.judges.base import JudgeConfig, schema_problem
from rewards.outcome import OUTCOME_SCHEMA, outcome_request
from tests.runs import alive
from tests.support.reward_cases import rollout

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
ARGS = ["--max-model-len", "6144", "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "4"]
CALM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer, so that any JSON can be written, and a Qwen3 of 100,000 random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("judge")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def request(number: int) -> object:
    return outcome_request(Task("t", f"Question {number}?", ("Paris",)), rollout("## Exact Answer\nParis"))


async def test_replies_have_the_form_that_the_server_was_asked_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CALM.items():
        monkeypatch.setenv(name, value)
    # Warm, so that the random model does not repeat itself for ever inside a string.
    config = JudgeConfig(
        kind="vllm", model=str(checkpoint), num_gpus=0, engine_args=ARGS, temperature=1.0, max_tokens=3000, start_s=240, timeout_s=120,
    )  # fmt: skip
    engine = JudgeEngine(config)
    try:
        assert await engine.ready() == os.getpid()
        replies: list[JudgeReply] = await asyncio.gather(*(engine.ask(request(i)) for i in range(4)))  # type: ignore[arg-type]
        stats = await engine.stats()
        good = [r for r in replies if r.status is Status.ok]
        assert len(good) >= 3, (replies, stats)
        assert all(not schema_problem(r.value, OUTCOME_SCHEMA) and r.num_tokens > 0 for r in good)
        assert engine._judge._plain_until < time.monotonic(), "the server enforces schemas"
        assert stats["tokens_in"] > 1000 and stats["tokens_out"] > 10
    finally:
        runs = engine._server.child.poll() is None
        children = psutil.Process(engine._server.child.pid).children(recursive=True) if runs else []
        await engine.close()
        monkeypatch.delenv(KEY, raising=False)
    assert not left_of(children, 20), "its processes end with it"


def left_of(family: list[psutil.Process], within_s: float) -> list[int]:
    """Who still runs by then. Ray makes this process the parent of orphans, so the ended may stay as zombies."""
    deadline = time.monotonic() + within_s
    while (left := [p.pid for p in family if alive(p.pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def test_the_server_ends_with_the_process_that_started_it(checkpoint: Path) -> None:
    """Killed, so that it has no chance to tell."""
    code = (
        "import asyncio, json, os, sys\n"
        "from cluster.judges import JudgeEngine\n"
        "from rewards.judges.base import JudgeConfig\n"
        "async def main():\n"
        "    engine = JudgeEngine(JudgeConfig(**json.loads(sys.argv[1])))\n"
        "    await engine.ready()\n"
        "    print(engine._server.child.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    options = {"kind": "vllm", "model": str(checkpoint), "num_gpus": 0, "engine_args": ARGS, "start_s": 240}
    owner = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(options)], stdout=subprocess.PIPE, text=True, env=os.environ | CALM
    )
    try:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        family = [child, *child.children(recursive=True)]
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert not left_of(family, 40)
    finally:
        with contextlib.suppress(ProcessLookupError):
            owner.kill()
