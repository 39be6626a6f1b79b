"""Learners on 1, 2 and 3 gloo ranks, for `tests/engines/test_learner_ranks.py`: `python -m tests.support.learner_ranks FOLDER`.

Everything is imported once and every rank is a fork of that, because importing takes longer than all the steps. Two rounds: every
number of ranks trains and saves, then every number of ranks loads what each of them saved and goes on. Rank 0 writes what it
measured to `FOLDER/<round>-<ranks>.pt`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.models.auto.modeling_auto  # what transformers would import late, in every fork
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

from agents.learning import agreement, sharded
from agents.learning import model as model_file
from agents.learning.checkpoint import load_checkpoint, save_checkpoint
from agents.learning.config import CriticConfig, LearnerConfig, LoraConfig, LossConfig
from agents.learning.critic import load_critic
from agents.learning.learner import Learner
from agents.learning.loading import load_sharded
from agents.learning.model import load_model
from agents.learning.scorer import ReferenceScorer
from agents.learning.weights import local
from agents.sharding import shard
from agents.types import Sample
from cluster.vllm.buckets import learn_layout
from cluster.vllm.senders import IpcSender
from tests.learning_tools import random_samples, rewarded

WORLDS = (1, 2, 3)
# AdamW divides small gradients by their size, which would blow rounding errors up: a larger epsilon keeps comparisons sharp.
BASE = LearnerConfig(max_tokens_per_microbatch=100, adam_eps=1e-5, lr=1e-3)
CRITIC = CriticConfig(lr=1e-2, gamma=0.9, lam=0.8)
CONFIGS = {
    "plain": replace(BASE, grad_clip=0.5),
    "recomputed": replace(BASE, gradient_checkpointing=True, loss=LossConfig(kl_coef=0.05)),
    "lora": replace(BASE, lora=LoraConfig(rank=2, alpha=4.0), lr=1e-2),
    "head": replace(BASE, critic=replace(CRITIC, kind="head", pretrain_steps=1)),
    "model": replace(BASE, critic=replace(CRITIC, kind="model", pretrain_steps=1)),
    "everything": replace(
        BASE, gradient_checkpointing=True, lora=LoraConfig(rank=2), critic=replace(CRITIC, kind="model"),
        layout="packed", attention="varlen",
    ),
    "bfloat16": replace(BASE, dtype="bfloat16"),
}  # fmt: skip
"""What is trained on every number of ranks, and must come out alike."""
REPLICAS = ("plain", "head", "model")
"""Of these also with whole copies on each rank."""
CONTEXT = ("plain", "everything", "head")
"""Of these also with both of 2 ranks on each row."""
SAVED = ("plain", "everything")
"""Of these what is saved and loaded."""
FOLDERS = ("whole-2", "sharded-1", "sharded-2", "sharded-3")
"""How it was saved, and on how many ranks."""


def make(folder: Path, config: LearnerConfig, *, whole: bool = False) -> Learner:
    """A learner as the cluster makes it. `whole`: every rank holds all weights."""
    source = folder / "model"
    apart = dist.is_initialized() and not whole
    model = load_sharded(source, config) if apart else load_model(source, config)
    critic = None
    if config.critic.kind == "model":
        critic = load_sharded(source, config, critic=True) if apart else load_critic(source, config)
    return Learner(model, config, critic=critic)


def batch(config: LearnerConfig, seed: int) -> list[Sample]:
    return (random_samples if config.critic.kind == "none" else rewarded)(9, seed=seed)


def mine(samples: list[Sample], config: LearnerConfig) -> list[Sample]:
    """This rank's part; ranks of one context have one part together."""
    if not dist.is_initialized():
        return samples
    size = config.context_parallel
    return shard(samples, dist.get_rank() // size, dist.get_world_size() // size)


def steps(folder: Path, learner: Learner) -> dict[str, Any]:
    """Three steps, in the last of which the first rank has everything and the others nothing."""
    config, rows = learner.config, []
    reference = None
    if config.loss.kl_coef:
        plain = replace(config, loss=LossConfig())
        model = (load_sharded if dist.is_initialized() else load_model)(folder / "model", plain)
        reference = ReferenceScorer(model)
    for seed in range(3):
        samples = batch(config, seed)
        if seed == 1:
            learner.score(mine(samples, config))  # a forward-only pass in between must leave no stale weights
        if seed < 2 or config.context_parallel > 1:
            samples = mine(samples, config)
        elif dist.is_initialized() and dist.get_rank() > 0:
            samples = []
        rows.append(learner.step(reference(samples) if reference else samples))
    critic = learner.critic.state_dict()["model"] if learner.critic else {}
    return {"metrics": rows, "weights": _copied(learner.weights()), "critic": critic}


def train(folder: Path, rank: int, world: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        learner = make(folder, config)
        out[name] = steps(folder, learner)
        held = sum(local(p).numel() for p in learner.model.parameters())
        whole = sum(p.numel() for p in learner.model.parameters())
        out[name]["share"] = held / whole
        out[name]["adapters"] = _copied(learner.adapters())
        assert {p.dtype for p in learner.model.parameters()} == {torch.float32}
        assert all(p.grad is None or p.grad.dtype is torch.float32 for p in learner.model.parameters())
        if name in SAVED:
            for kind in ("whole", "sharded"):
                if f"{kind}-{world}" in FOLDERS:
                    learner.config = replace(config, sharded_checkpoints=kind == "sharded")
                    save_checkpoint(folder / f"{name}-{kind}-{world}", learner, extra={"step": 3})
            out[name]["next"] = learner.step(mine(batch(config, 3), config))
            out[name]["after"] = _copied(learner.weights())
    for name in REPLICAS if world == 2 else ():
        out[f"replicas {name}"] = steps(folder, make(folder, CONFIGS[name], whole=True))
    for name in CONTEXT if world == 2 else ():
        config = replace(CONFIGS[name], layout="auto", attention="auto", context_parallel=2)
        out[f"context {name}"] = steps(folder, make(folder, config))
    if world == 2:
        out["full disk"] = full_disk(folder, make(folder, replace(BASE, sharded_checkpoints=True)), rank)
        out["no gather"] = no_gather(folder, make(folder, replace(BASE, sharded_checkpoints=True)), rank)
    return out


def load(folder: Path, rank: int, world: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in SAVED:
        for saved in FOLDERS:
            learner = make(folder, CONFIGS[name])
            assert load_checkpoint(folder / f"{name}-{saved}", learner) == {"step": 3}
            row = learner.step(mine(batch(learner.config, 3), learner.config))
            out[f"{name}-{saved}"] = {"next": row, "after": _copied(learner.weights())}
    return out


def full_disk(folder: Path, learner: Learner, rank: int) -> list[str]:
    """What each rank says when the second one cannot write its part."""
    path, said = folder / "full" / "step-000001", "nothing"
    path.parent.mkdir(exist_ok=True)
    kept = sharded.save_file

    def refuses(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    sharded.save_file = refuses if rank == 1 else kept
    try:
        save_checkpoint(path, learner)
    except OSError as error:
        said = str(error)
    finally:
        sharded.save_file = kept
    left = sorted(p.name for p in path.parent.iterdir()) if rank == 0 else []
    return [*sharded.everybody(said), *left]


def no_gather(folder: Path, learner: Learner, rank: int) -> dict[str, list[str]]:
    """What each rank says when the second one cannot do its part in gathering: before the others wait for it, or behind them; while they
    publish in turns of their own (CUDA IPC), or save."""
    layout = learn_layout(learner.weights())
    ipc = IpcSender(rank, torch.device("cpu"), agreement.everybody, lambda buffer: (f"gpu-{rank}", []))

    def by_ipc() -> None:
        with agreement.to_the_end(learner.weights()) as given:
            ipc.send(given, layout, 3000, lambda piece: None)

    ways: dict[str, Callable[[], Any]] = {
        "publish": lambda: list(learner.weights()),
        "ipc": by_ipc,
        "save": lambda: save_checkpoint(folder / "torn" / "step-000001", learner),
    }
    said: dict[str, list[str]] = {}
    for where, (module, name) in {"room": (agreement, "_try_room"), "after": (model_file, "unstack")}.items():
        for way, work in ways.items():
            text, whole, calls = "nothing", getattr(module, name), []

            def fails(*args: Any, whole: Any = whole, calls: list[int] = calls) -> Any:
                calls.append(1)
                if len(calls) == 4 and rank == 1:
                    raise RuntimeError("CUDA out of memory")
                return whole(*args)

            setattr(module, name, fails)
            began = time.monotonic()
            try:
                work()
            except agreement.GatherError as error:
                text = str(error)
            finally:
                setattr(module, name, whole)
            assert time.monotonic() - began < 20
            said[f"{where}, {way}"] = agreement.everybody(text)
    assert len(list(learner.weights())) == len(layout), "the ranks are no longer in step"
    return said


def _copied(weights: Any) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in weights}


def _rank(folder: Path, task: Callable[[Path, int, int], dict[str, Any]], rank: int, world: int) -> None:
    """Runs in a fork, and ends it."""
    try:
        torch.set_num_threads(1)
        if world > 1:
            meet = f"file://{folder}/meet-{task.__name__}-{world}"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
        out = task(folder, rank, world)
        if rank == 0:
            torch.save(out, folder / f"{task.__name__}-{world}.pt")
        if world > 1:
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # gloo's threads may abort an interpreter that unwinds; what is tested is done


def main(folder: Path) -> None:
    for task in (train, load):
        for world in WORLDS:
            ranks = []
            for rank in range(world):
                pid = os.fork()
                if pid == 0:
                    _rank(folder, task, rank, world)
                ranks.append(pid)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
            if any(codes):
                raise SystemExit(f"{task.__name__} on {world} rank(s) ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
