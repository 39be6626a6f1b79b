"""Our parts against TRL's GRPO, the peer that trains without a GPU: `python benchmarks/peer_trl.py`, about 8 minutes.

One workload for both: the demo's tiny policy in float32, 8 prompts of 128 tokens, 8 completions of 128 tokens each (no stop token
counts), a reward that counts tokens, one AdamW step per batch of 64 sequences in micro-batches of 8, no KL, the new weights used for
the next batch. Both have this machine's cores and take turns, each side in a process of its own.

Four sides: `trl`; `ours`, `PolicyEngine`, `Learner` and the publish in a plain loop, in lockstep as TRL is; `ours-ahead`, which samples the
next batch while it trains this one, as our pipeline does (`max_staleness: 1`); and `trl-vllm`, TRL with vLLM in its process, where that runs:
with vLLM's CPU build it does not (weights cannot be loaded one by one once they are packed), and the result says so.

What is equal: model, prompts (token for token), lengths, batch, micro-batch, number of optimiser steps, precision, cores.
What is not: TRL generates with transformers inside the trainer's process, we with vLLM in a process of its own, to which the weights are
published, and we record every token's log-prob and version. `ours-ahead` trains on tokens that are up to one step old, which TRL does not
offer; there engine and learner have one thread each, elsewhere every computation has all cores. TRL has its defaults except where they
would slow it down here (gradient checkpointing and bfloat16 are off, nothing is logged or saved). TRL has neither actors nor tools in
this trainer's plain form, so they are left out on our side too.

TRL is installed beside our environment, never into it; this is what the benchmark does on its first run:
    python -m venv runs/trl && echo "$PWD/.venv/lib/python3.11/site-packages" > runs/trl/lib/python3.11/site-packages/ours.pth
    runs/trl/bin/python -m pip install trl==1.16.0
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gumshoe  # noqa: E402

THREADS = os.cpu_count() or 1
if __name__ == "__main__":  # before numpy and torch read it
    threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    os.environ.update(gumshoe.child_env() | threads)

import numpy as np  # noqa: E402

from benchmarks.results_file import write_result  # noqa: E402
from benchmarks.work import POLICY, spread, traces  # noqa: E402

TRL = "trl==1.16.0"
PROMPTS, ATTEMPTS, LENGTH, MICRO = 8, 8, 128, 8
WARM_UP = 3
LR = 1e-5


def prompts() -> list[list[int]]:
    """The first tokens of what the policy was taught: real text of the demo's world, all of one length."""
    long = (t.token_ids.tolist() for t in traces(8 * PROMPTS) if len(t.token_ids) >= LENGTH)
    return [ids[:LENGTH] for ids, _ in zip(long, range(PROMPTS), strict=False)]


def reward(token_ids: Sequence[int]) -> float:
    """Something that differs between completions and costs nothing: the share of even token ids."""
    return sum(1 for i in token_ids if i % 2 == 0) / max(1, len(token_ids))


# ---------------------------------------------------------------------------------------------------------- sides


@dataclass
class Times:
    """What a side's clock saw."""

    ends: list[float] = field(default_factory=list)
    """The start where it is known, then the end of every optimiser step."""
    generate: list[float] = field(default_factory=list)
    """Per step, seconds of waiting for completions."""


def run_trl(steps: int, use_vllm: bool = False) -> Times:
    """Times of TRL's trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.padding_side = "left"
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in prompts()]
    assert [tokenizer(t, add_special_tokens=False).input_ids for t in texts] == prompts(), (
        "the prompts read differently"
    )
    times, lengths = Times(), list[int]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.ends.append(time.perf_counter())

    def count(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    # a fixed number of tokens, whatever they are
    fixed = {"ignore_eos": True} if use_vllm else {"min_new_tokens": LENGTH, "eos_token_id": None}
    model: Any = POLICY if use_vllm else AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=MICRO, gradient_accumulation_steps=PROMPTS * ATTEMPTS // MICRO,
            num_generations=ATTEMPTS, max_completion_length=LENGTH, generation_kwargs=fixed, temperature=1.0, beta=0.0, learning_rate=LR,
            lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, seed=0, use_vllm=use_vllm, vllm_mode="colocate", vllm_max_model_length=2 * LENGTH,
            **({"model_init_kwargs": {"dtype": "float32"}} if use_vllm else {}),
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": text} for text in texts] * (steps + 1))
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=count,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        inner = trainer._generate_single_turn

        def timed(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            made = inner(*arguments, **more)
            times.generate.append(time.perf_counter() - began)
            return made

        trainer._generate_single_turn = timed
        trainer.train()
    assert set(lengths) == {LENGTH}, f"TRL's completions have {sorted(set(lengths))} tokens"
    return times


def run_ours(steps: int, ahead: bool) -> Times:
    """Times of the same loop over our engine and learner. `ahead`: the next batch is sampled while this one is trained."""
    return asyncio.run(_ours(steps, ahead))


async def _ours(steps: int, ahead: bool) -> Times:
    from agents.advantages import AdvantageConfig, grpo
    from agents.learning.config import LearnerConfig, LossConfig
    from agents.learning.learner import Learner
    from agents.learning.model import load_model
    from agents.types import Sample, Version
    from cluster.vllm.engine import EngineConfig, PolicyEngine
    from cluster.vllm.segment import ShmWriter
    from cluster.vllm.transfer import ShmTransport, publish

    threads = 1 if ahead else THREADS  # both at once, or one after the other: never more threads than cores
    config = LearnerConfig(
        lr=LR, weight_decay=0.0, threads=threads, max_tokens_per_microbatch=MICRO * 2 * LENGTH, loss=LossConfig()
    )
    learner = Learner(load_model(POLICY, config), config)
    engine = PolicyEngine(
        EngineConfig(
            POLICY, max_model_len=2 * LENGTH + 1, max_num_seqs=PROMPTS * ATTEMPTS, kv_cache_gb=0.25, threads=threads, version="0.0"
        )
    )  # fmt: skip
    asked, nothing = prompts(), np.zeros(LENGTH)
    serial = itertools.count()

    async def sample() -> list[Any]:
        jobs = (
            engine.generate(ids, request_id=str(next(serial)), max_tokens=LENGTH)
            for ids in asked
            for _ in range(ATTEMPTS)
        )
        return list(await asyncio.gather(*jobs))

    def train(made: Sequence[Any], step: int) -> None:
        rewards = np.array([reward(m.token_ids) for m in made]).reshape(PROMPTS, ATTEMPTS)
        advantages = np.concatenate([grpo(r, AdvantageConfig()) for r in rewards])
        samples = []
        for i, m in enumerate(made):
            versions = [Version.parse(label).step for start, end, label in m.version_spans for _ in range(start, end)]
            samples.append(
                Sample(
                    np.concatenate([asked[i // ATTEMPTS], m.token_ids]), np.concatenate([nothing, nothing + 1]),
                    np.concatenate([nothing, m.logprobs]), np.concatenate([nothing, nothing + advantages[i]]),
                    np.concatenate([nothing - 1, versions]), np.ones(2 * LENGTH), f"{step}-{i // ATTEMPTS}", f"{step}-{i}", 0.0,
                )
            )  # fmt: skip
        learner.step(samples)

    await engine.start()
    memory = Path("/dev/shm")
    times = Times([time.perf_counter()])
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        writer = ShmWriter(Path(folder))
        coming = asyncio.create_task(sample()) if ahead else None
        for step in range(steps):
            began = time.perf_counter()
            made = await (coming or sample())
            assert {len(m.token_ids) for m in made} == {LENGTH}
            times.generate.append(time.perf_counter() - began)
            if ahead:
                coming = asyncio.create_task(sample())
            await asyncio.to_thread(train, made, step)
            report = await publish({"0": engine}, ShmTransport(writer.write(learner.weights())), f"0.{step + 1}")
            assert report.ok, report.results
            times.ends.append(time.perf_counter())
        if coming:
            await coming
        writer.close()
    await engine.shutdown()
    return times


Seconds = dict[str, list[float]]
"""`step` and `generate`, per step."""

SIDES: dict[str, Callable[[int], Times]] = {
    "trl": run_trl,
    "trl-vllm": lambda steps: run_trl(steps, use_vllm=True),
    "ours": lambda steps: run_ours(steps, ahead=False),
    "ours-ahead": lambda steps: run_ours(steps, ahead=True),
}


# ----------------------------------------------------------------------------------------------------------- main


def trl_python(folder: Path) -> Path:
    """A Python that sees TRL and, behind it, our environment. Made on first use."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        place = folder / "lib" / version / "site-packages" / "ours.pth"
        place.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    if subprocess.run([python, "-c", "import trl"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRL], check=True)
    return python


def one_side(side: str, steps: int, python: Path, timeout_s: float) -> Seconds | str:
    """Seconds after the warm-up, or what the side ended with."""
    with tempfile.TemporaryDirectory(prefix="gumshoe-bench-") as folder:
        out = Path(folder) / "seconds.json"
        command = [str(python), str(Path(__file__).resolve()), "--one", side, "--steps", str(steps), "--out", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"no result within {timeout_s:g} s"
        if done.returncode or not out.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()
            return (lines or [f"exit code {done.returncode}"])[-1].removeprefix("[rank0]: ")[:300]
        return after_warm_up(Times(**json.loads(out.read_text(encoding="utf-8"))))


def after_warm_up(times: Times) -> Seconds:
    """Seconds of every step that counts, and those of them that went into completions."""
    step = np.diff(times.ends).tolist()[WARM_UP:]
    return {"step": step, "generate": times.generate[-len(step) :]}


def figures(seconds: dict[str, Seconds], failed: dict[str, str]) -> dict[str, Any]:
    """The table: step time and tokens per second of every side, and ours over each of TRL's."""
    tokens = PROMPTS * ATTEMPTS * 2 * LENGTH
    found: dict[str, Any] = {"sequences per step": PROMPTS * ATTEMPTS, "tokens per sequence": f"{LENGTH} + {LENGTH}"}
    for side, values in seconds.items():
        found[f"{side}: s per step"] = spread(values["step"])
        found[f"{side}: of that waiting for completions, s"] = spread(values["generate"])
        found[f"{side}: tokens/s"] = round(tokens / float(np.median(values["step"])), 1)
        found[f"{side}: steps measured"] = len(values["step"])
    for ours in ("ours", "ours-ahead"):
        for peer in ("trl", "trl-vllm"):
            if ours in seconds and peer in seconds:
                ratio = np.median(seconds[peer]["step"]) / np.median(seconds[ours]["step"])
                found[f"tokens/s of {ours} over {peer}"] = round(float(ratio), 2)
    return found | {f"{side}: did not run": why for side, why in failed.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["trl", "ours", "ours-ahead", "trl-vllm"])
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns (2)")
    parser.add_argument(
        "--steps", type=int, default=13, help=f"optimiser steps of a round, the first {WARM_UP} not counted (13)"
    )
    parser.add_argument("--environment", type=Path, default=ROOT / "runs" / "trl", help="where TRL is installed")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        arguments.out.write_text(json.dumps(asdict(SIDES[arguments.one](arguments.steps))), encoding="utf-8")
        return 0
    python = trl_python(arguments.environment.absolute())
    seconds: dict[str, Seconds] = {}
    failed: dict[str, str] = {}
    for number in range(arguments.rounds):
        for side in arguments.sides:
            if side in failed:
                continue
            made = one_side(side, arguments.steps, Path(sys.executable) if side.startswith("ours") else python, 600)
            if isinstance(made, str):
                failed[side] = made
            else:
                for what, values in made.items():
                    seconds.setdefault(side, {}).setdefault(what, []).extend(values)
            print(f"round {number + 1}, {side}: {made if isinstance(made, str) else spread(made['step'])}", flush=True)
    write_result("peer_trl", {"peer": TRL, **figures(seconds, failed)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
