"""Publishing weights into two real engines under load: `python benchmarks/publish.py`.

Two engines with the tiny policy's shape, 16 generations in flight in each, 20 publishes of changed weights. Measured: the pause in
which nothing is sampled (goal: under 100 ms), whether every generation in flight finished, and the difference between the
engines' log-probs and transformers' float32 forward pass of the published weights, for fresh prompts and for a prompt that was
cached before the publish.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gumshoe  # noqa: E402

os.environ.update(gumshoe.child_env() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.results_file import write_result  # noqa: E402
from cluster.vllm.engine import EngineConfig, PolicyEngine  # noqa: E402
from cluster.vllm.segment import ShmWriter  # noqa: E402
from cluster.vllm.transfer import ShmTransport, publish  # noqa: E402

POLICY = ROOT / "envs" / "world" / "policy"
PUBLISHES, IN_FLIGHT, LENGTH = 20, 16, 600


def difference(model: Any, prompt: list[int], made: Any) -> np.ndarray:
    """|log-prob of the engine - log-prob of transformers in float32| of every sampled token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *made.token_ids]])).logits[0, len(prompt) - 1 : -1]
    mine = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(made.token_ids)[:, None])[:, 0]
    return (mine - torch.tensor(made.logprobs)).abs().numpy()


async def measure(folder: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
    config = EngineConfig(str(POLICY), max_model_len=1024, kv_cache_gb=0.2, version="0.0")
    engines = {name: PolicyEngine(config) for name in ("a", "b")}
    began = time.perf_counter()
    for engine in engines.values():
        await engine.start()
    start_s = (time.perf_counter() - began) / len(engines)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size

    def prompt() -> list[int]:
        return [int(i) for i in rng.integers(10, vocab - 10, 64)]

    async def fly(engine: PolicyEngine, number: int) -> str:
        made = await engine.generate(prompt(), request_id=f"flight-{number}", max_tokens=LENGTH)
        return "finished" if len(made.token_ids) == LENGTH else made.finish_reason

    cached = prompt()
    for engine in engines.values():
        await engine.generate(cached, request_id=f"cache-{engine.pids}", max_tokens=8)
    writer = ShmWriter(folder)
    pauses, totals, flights, fresh, again = [], [], [], [], []
    for step in range(1, PUBLISHES + 1):
        flying = [asyncio.create_task(fly(e, i * 100 + step)) for e in engines.values() for i in range(IN_FLIGHT)]
        await asyncio.sleep(0.3)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(
                    0.01 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim > 1 else 0.0
                )
        report = await publish(engines, ShmTransport(writer.write(model.named_parameters())), f"0.{step}")
        assert report.ok, report.results
        pauses += [r.pause_ms for r in report.results.values()]
        totals.append(report.seconds * 1e3)
        flights += await asyncio.gather(*flying)
        for name, engine in engines.items():
            for kind, tokens, into in (("fresh", prompt(), fresh), ("cached", cached, again)):
                made = await engine.generate(tokens, request_id=f"{kind}-{name}-{step}", max_tokens=64)
                assert {label for _, _, label in made.version_spans} == {f"0.{step}"}
                into.append(difference(model, tokens, made))
    sums = [await e.checksums() for e in engines.values()]
    for engine in engines.values():
        await engine.shutdown()
    writer.close()
    return {
        "publishes": PUBLISHES, "engines": 2, "in flight": 2 * IN_FLIGHT, "engine start, s": start_s,
        "pause median, ms": float(np.median(pauses)), "pause p90, ms": float(np.percentile(pauses, 90)), "pause max, ms": max(pauses),
        "publish median, ms": float(np.median(totals)), "in flight that finished": f"{flights.count('finished')}/{len(flights)}",
        "log-prob difference max, fresh prompt": float(np.concatenate(fresh).max()),
        "log-prob difference mean, fresh prompt": float(np.concatenate(fresh).mean()),
        "log-prob difference max, cached prompt": float(np.concatenate(again).max()),
        "log-prob difference mean, cached prompt": float(np.concatenate(again).mean()),
        "engines received the same bytes": len({s.received for s in sums}) == 1,
    }  # fmt: skip


def main() -> int:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="gumshoe-bench-", dir=memory if memory.is_dir() else None) as folder:
        write_result("publish", asyncio.run(measure(Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
