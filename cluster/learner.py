"""The learner's loop inside Ray Train: pull a batch, take an optimiser step, publish, checkpoint, again.

Every rank runs `train_loop`. Invariants:
- All ranks take the same decisions from the same batch; rank 0 alone talks to the fleet and settles the ledger.
- A batch is settled only after its optimiser step; admission moves on only after its weights were published.
- Learner and ledger are saved together, and go back together (`ray.train.get_checkpoint`).
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agents.learning.config import LearnerConfig, LoraConfig
from agents.types import Version
from cluster.runtime import environment


@dataclass
class TrainConfig:
    """How long to train, and what to do on the way."""

    steps: int = 100
    """Optimiser batches."""
    max_minutes: float = 0.0
    """Wall-clock limit of training; 0: none."""
    eval_every: int = 25
    """Optimiser batches between evaluations during training; 0: only before and after."""
    eval_tasks: int = 200
    """Held-out tasks in the evaluation before and after."""
    eval_tasks_during: int = 64
    """Held-out tasks in each evaluation during training (the first of the same frozen set)."""
    eval_attempts: int = 1
    """Attempts at each held-out task."""
    eval_temperature: float = 1.0
    """Sampling temperature of evaluations."""
    checkpoint_every: int = 50
    """Optimiser batches between checkpoints; the last one is always saved."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    verify_every: int = 10
    """Publishes between checksum comparisons of all engines; 0: never."""
    num_workers: int = 1
    """Learner processes (Ray Train workers)."""
    worker_cpus: float = 0.5
    """Ray CPUs a learner process asks for (placement only; its threads are `learner.threads`)."""
    worker_gpus: float = 0.0
    """Ray GPUs a learner process asks for."""
    max_failures: int = 3
    """Restarts of the learner from its last checkpoint before the run stops."""
    batch_timeout_s: float = 1800.0
    """How long a run may go without an optimiser batch before it stops, saying where its episodes are."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name in ("steps", "eval_tasks", "eval_attempts", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Setup:
    """What `train_loop` needs, in one value that crosses processes."""

    model: str
    """Folder of the checkpoint training starts from."""
    train: TrainConfig
    learner: LearnerConfig
    buffer: Any
    fleet: Any
    segments: str
    """Folder for published weights, in memory where the machine has one."""


def train_loop(config: dict[str, Any]) -> None:
    """Runs in each Ray Train worker. `config["setup"]` is a Setup."""
    import ray
    import ray.train
    import ray.train.torch
    import torch

    from agents.learning.checkpoint import load_checkpoint, save_checkpoint
    from agents.learning.learner import Learner
    from agents.learning.model import load_model
    from agents.learning.scorer import ReferenceScorer
    from agents.learning.shard import apply_fsdp
    from cluster.vllm.segment import ShmWriter

    setup: Setup = config["setup"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device() if setup.train.worker_gpus else "cpu"
    model = load_model(setup.model, setup.learner, device)
    learner = Learner(apply_fsdp(model) if world > 1 else model, setup.learner)
    # The reference for the KL is the checkpoint training starts from; every rank scores its own samples with a whole copy.
    reference = None
    if setup.learner.loss.kl_coef > 0:
        reference = ReferenceScorer(load_model(setup.model, replace(setup.learner, lora=LoraConfig()), device))
    extra: dict[str, Any] = {}
    saved = ray.train.get_checkpoint()
    if saved is not None:
        with saved.as_directory() as folder:
            extra = load_checkpoint(folder, learner)
    step = int(extra.get("step", 0))
    publisher = None
    if rank == 0:
        incarnation = ray.get(setup.buffer.enter.remote(extra.get("buffer")))
        publisher = Publisher(setup, incarnation, ShmWriter(setup.segments, prefix=f"weights-{incarnation}"))
    if context.get_world_size() > 1:
        torch.distributed.barrier()  # nobody asks for a batch before the ledger went back
    _publish(publisher, learner, step)  # also at the very start: it proves the way to every engine
    began = time.monotonic()
    while True:
        asked = time.monotonic()
        batch = _next_batch(setup, step, world)
        wait_s = time.monotonic() - asked
        samples = list(batch.shards[rank])
        metrics = learner.step(reference(samples) if reference else samples)
        step += 1
        if publisher is not None:
            times = {"time/wait_s": wait_s, "time/elapsed_s": time.monotonic() - began}
            ray.get(setup.buffer.settle.remote(step - 1, {**metrics, **times}))
        _publish(publisher, learner, step)
        every = setup.train.checkpoint_every
        if batch.last or (every and step % every == 0):
            with tempfile.TemporaryDirectory(prefix="gumshoe-checkpoint-") as folder:
                state = {"step": step, "buffer": ray.get(setup.buffer.state.remote())}
                path = save_checkpoint(Path(folder) / "checkpoint", learner, setup.model, state)
                kept = ray.train.Checkpoint.from_directory(str(path)) if rank == 0 else None
                ray.train.report({"step": step}, checkpoint=kept)
        if batch.last:
            return


def _next_batch(setup: Setup, step: int, world: int) -> Any:
    """Waits for the batch. The driver, which sees everything, decides when waiting has taken too long."""
    import ray

    while True:
        batch = ray.get(setup.buffer.next_batch.remote(step, world))
        if batch is not None:
            return batch


class Publisher:
    """Rank 0's way to the samplers: a segment in memory, the fleet, then the ledger."""

    def __init__(self, setup: Setup, incarnation: int, writer: Any) -> None:
        self.incarnation = incarnation
        self._setup = setup
        self._writer = writer

    def publish(self, weights: Iterable[tuple[str, Any]], step: int) -> None:
        import ray

        setup, began = self._setup, time.monotonic()
        manifest = self._writer.write(weights)
        label = Version(self.incarnation, step).label
        report = ray.get(setup.fleet.publish.remote(manifest.to_dict(), label))
        if setup.train.verify_every and step % setup.train.verify_every == 0:
            ray.get(setup.fleet.verify.remote())
            report["publish/verified"] = 1.0
        report["time/publish_s"] = time.monotonic() - began
        ray.get(setup.buffer.published.remote(step, report))


def _publish(publisher: Publisher | None, learner: Any, step: int) -> None:
    """Every rank joins the gathering of weights; rank 0 publishes them."""
    if publisher is None:
        for _ in learner.weights():
            pass
    else:
        publisher.publish(learner.weights(), step)


class LearnerRun:
    """The Ray Train run in a thread of the driver, since `TorchTrainer.fit` blocks."""

    def __init__(self, setup: Setup, run_dir: Path) -> None:
        self._setup = setup
        self._run_dir = run_dir
        self._error: BaseException | None = None
        self.checkpoint: str = ""
        self._thread = threading.Thread(target=self._fit, name="learner", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """False once training has ended. Raises what it ended with, if that was an error."""
        alive = self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return alive

    def _fit(self) -> None:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        train = self._setup.train
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"setup": self._setup},
            torch_config=TorchConfig(backend="nccl" if train.worker_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=train.num_workers,
                use_gpu=train.worker_gpus > 0,
                resources_per_worker={
                    "CPU": train.worker_cpus,
                    **({"GPU": train.worker_gpus} if train.worker_gpus else {}),
                },
            ),
            run_config=RunConfig(
                name="checkpoints",
                storage_path=str(self._run_dir),
                failure_config=FailureConfig(max_failures=train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
                worker_runtime_env={"env_vars": environment(self._setup.learner.threads)},
            ),
        )
        try:
            result = trainer.fit()
            self.checkpoint = result.checkpoint.path if result.checkpoint else ""
            if result.error:
                self._error = result.error
        except BaseException as error:
            self._error = error
