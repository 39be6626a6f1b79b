"""The learner's loop inside Ray Train: pull a batch, take an optimiser step, publish, checkpoint, again.

Every rank runs `train_loop`. Invariants:
- All ranks take the same decisions from the same batch; rank 0 alone talks to the fleet and settles the ledger. All publish (`publisher.py`).
- A batch is settled only after its optimiser step; admission moves on only after its weights were published.
- Learner and ledger are saved together and go back together: whoever begins takes the newest checkpoint that is whole,
  and tells the buffer, which refuses whoever was there before. Checkpoints are this project's own (`agents.learning.checkpoint`),
  because they are verified when read and a damaged one is passed over; Ray Train restarts the workers.
- Every wait has a deadline. An error that a person must mend ends the run with its line; any other restarts the learner.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.learning.config import CriticConfig, LearnerConfig, LoraConfig
from cluster.errors import UserError, is_expected, one_line
from cluster.layout import Turns
from cluster.mirror import newest_name, pull_checkpoint, push_checkpoint
from cluster.nodecache import at_hand, once
from cluster.placement import RolePlacement
from cluster.runtime import environment
from cluster.storage import ObjectStore, sees_token
from cluster.turns import Belongings, LearnerTurns, find_device
from cluster.watchdog import Tally, WatchConfig

if TYPE_CHECKING:
    from cluster.fleet_config import FleetConfig
    from cluster.vllm.engine import EngineConfig

CALL_S = 900.0
"""Deadline of a call to the buffer or the fleet that moves no weights: later than that it is gone. Of others: `call_s`."""


@dataclass
class TrainConfig:
    """How long to train, and what to do on the way."""

    steps: int = 100
    """Optimiser batches."""
    max_minutes: float = 0.0
    """Wall-clock limit of training; 0: none."""
    max_sampled_tokens: int = 0
    """Training ends with the batch that reaches so many sampled tokens, those of discarded candidates included and those of dropped leases
    not; 0: no limit."""
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
    """Optimiser batches between checkpoints; the last one is always saved. 0: by time alone."""
    checkpoint_minutes: float = 10.0
    """Most minutes between checkpoints: what a killed learner may cost. 0: by `checkpoint_every` alone."""
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
    max_failures: int = 5
    """Restarts of the learner in a row, without an optimiser step between them, before the run stops."""
    batch_timeout_s: float = 1800.0
    """How long a run may go without an optimiser batch before it stops, saying where its episodes are."""

    wandb: bool = False
    """Write the run's metrics to Weights & Biases too (extra `wandb`)."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name in ("steps", "eval_tasks", "eval_attempts", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_minutes", "max_sampled_tokens"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be 0 (no limit) or more")
        if self.keep_checkpoints < 1:
            raise ValueError(
                f"train.keep_checkpoints is {self.keep_checkpoints}; it must be at least 1, so that a run can go on"
            )


@dataclass(frozen=True)
class Setup:
    """What `train_loop` needs, in one value that crosses processes."""

    model: str
    """Folder of the checkpoint training starts from."""
    train: TrainConfig
    learner: LearnerConfig
    buffer: Any
    fleet: Any
    """None: nothing is sampled (replay), so nothing is published."""
    segments: str
    """Folder for published weights, in memory where the machine has one."""
    checkpoints: str
    """Folder of the run's checkpoints."""
    turns: Turns | None = None
    """How learners and samplers take turns; None: both work at the same time."""
    place: RolePlacement = field(default_factory=RolePlacement)
    """Where learners may sit."""
    uri: str = ""
    """Where the run is copied to, checkpoints as soon as they are whole; empty where its folder is one that all nodes see."""
    token: str = ""
    """By which a node that joined later knows the folder of checkpoints; empty: it is not asked for."""
    call_s: float = CALL_S
    """Deadline of a call to the fleet that moves weights, or waits for engines."""


def call_s(fleet: FleetConfig, engine: EngineConfig) -> float:
    """What a fleet within its own deadlines may take for one call: a publish, or a turn's beginning, behind an engine that is being brought
    the weights."""
    from cluster.publishing import START_SLACK_S, deadlines, longest_s

    publish = longest_s(deadlines(fleet))
    sleep = engine.start_timeout_s + START_SLACK_S + fleet.publish_deadline_s
    return max(CALL_S, publish + max(publish, sleep))


def patient(watch: WatchConfig, fleet: FleetConfig) -> WatchConfig:
    """With `learner_s` no shorter than a publish may take: a learner that waits for slow engines is not stuck."""
    from cluster.publishing import deadlines, longest_s

    return replace(watch, learner_s=max(watch.learner_s, longest_s(deadlines(fleet))))


def train_loop(config: dict[str, Any]) -> None:
    """Runs in each Ray Train worker. `config["setup"]` is a Setup."""
    import ray

    setup: Setup = config["setup"]
    try:
        _check_storage(setup)
        _train(replace(setup, model=at_hand(setup.model)))
    except Exception as error:
        if not is_expected(error):
            raise  # this learner is lost; Ray Train starts another from the last checkpoint
        with contextlib.suppress(Exception):
            ray.get(setup.buffer.stop.remote(one_line(error)), timeout=CALL_S)


def _train(setup: Setup) -> None:
    import ray.train
    import ray.train.torch

    from agents.learning.checkpoint import load_checkpoint
    from agents.learning.critic import load_critic
    from agents.learning.learner import Learner
    from agents.learning.loading import load_sharded
    from agents.learning.lora import peft_config
    from agents.learning.model import load_model
    from agents.learning.scorer import ReferenceScorer
    from cluster.publisher import Publisher
    from cluster.vllm.adapters import AdapterWriter

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = _device(setup, context)  # before ranks meet: each must have its own
    turns = LearnerTurns(
        setup.fleet if setup.turns else None,
        device,
        rank=rank,
        offload=bool(setup.turns and setup.turns.offload),
        ask=(ask := partial(_ask, limit_s=setup.call_s)),
    )
    incarnation, folder = _begin(setup, rank, world)
    if rank == 0 and setup.fleet is not None:
        _ask(setup.fleet.learner_sits.remote(ray.util.get_current_placement_group()))
    turns.learn()  # engines leave before anything is loaded
    load = load_sharded if world > 1 else load_model  # of several ranks none holds a whole model, at no time
    model = load(setup.model, setup.learner, device)
    critic = None
    if setup.learner.critic.kind == "model":
        critic = (
            load_sharded(setup.model, setup.learner, device, critic=True)
            if world > 1
            else load_critic(setup.model, setup.learner, device)
        )
    learner = Learner(model, setup.learner, critic=critic)
    # The reference for the KL is the checkpoint training starts from; every rank scores its own samples.
    reference = None
    if setup.learner.loss.kl_coef > 0:
        frozen = replace(setup.learner, lora=LoraConfig(), critic=CriticConfig())
        most = setup.learner.max_tokens_per_microbatch
        reference = ReferenceScorer(load(setup.model, frozen, device), most, learner.context)
    step = int(load_checkpoint(folder, learner, verified=True)["step"]) if folder else 0
    turns.own(Belongings.of(learner, reference.model if reference else None))
    outgoing, writer = learner.weights, None
    if setup.learner.lora.publish == "adapter":
        outgoing = learner.adapters
        writer = AdapterWriter(
            setup.segments, peft_config(setup.learner.lora, setup.model), prefix=f"weights-{incarnation}"
        )
    publisher = Publisher(setup, incarnation, ask, rank, world, device, writer)
    turns.before_publish()
    publish_s = publisher.publish(outgoing, step)  # also at the very start: it proves the way to every engine
    turns.sample()
    began = saved_at = time.monotonic()
    checkpoint_s = 0.0
    while step < setup.train.steps:
        asked = time.monotonic()
        shared = learner.layout == "shared"
        together = setup.learner.context_parallel  # ranks that share rows train what each of them would have trained
        ranks = (rank // together * together, together)
        fetch = partial(_fetch, setup, incarnation, step, world, shared, ranks)
        batch = publisher.next_batch(fetch, outgoing, step, turns.turn)
        wait_s = time.monotonic() - asked
        turns.learn()
        samples = [s for part in batch.shards for s in part]
        metrics = learner.step(reference(samples) if reference else samples)
        step += 1
        if rank == 0:
            times = {
                "time/wait_s": wait_s, "time/publish_s": publish_s, "time/checkpoint_s": checkpoint_s,
                "time/elapsed_s": time.monotonic() - began,
            }  # fmt: skip
            _ask(setup.buffer.settle.remote(incarnation, step - 1, {**metrics, **times}))
        turns.before_publish()
        publish_s = publisher.publish(outgoing, step)
        checkpoint_s = 0.0
        if batch.last or _due(setup.train, step, saved_at, world):
            saved_at = time.monotonic()
            _save(setup, learner, incarnation, step, rank, last=batch.last)
            checkpoint_s = time.monotonic() - saved_at
        turns.sample()
        if batch.last:
            return


def _device(setup: Setup, context: Any) -> Any:
    """Of this rank: a GPU of its own, one that it shares with an engine, or none."""
    import ray.train.torch

    if setup.turns and setup.turns.on_gpu:
        return find_device(setup.fleet, context, _ask)
    return ray.train.torch.get_device() if setup.train.worker_gpus else "cpu"


def _begin(setup: Setup, rank: int, world: int) -> tuple[int, str]:
    """Incarnation and checkpoint folder (empty: from the start), the same on every rank."""
    import ray
    import torch.distributed as dist

    from agents.learning.checkpoint import newest_checkpoint, read_extra

    found: list[Any] = [0, ""]
    if setup.uri:  # the store decides: what a node has beyond it is of a learner that was lost
        named = [newest_name(f"{setup.uri}/checkpoints") if rank == 0 else ""]
        if world > 1:
            dist.broadcast_object_list(named, src=0)
        with once(setup.checkpoints):  # ranks of one node share a folder
            pull_checkpoint(f"{setup.uri}/checkpoints", Path(setup.checkpoints), named[0])
    if rank == 0:
        folder, lines = newest_checkpoint(setup.checkpoints)
        for line in lines:
            _ask(setup.buffer.event.remote(line))
        saved = read_extra(folder).get("buffer") if folder else None
        me = ray.get_runtime_context().current_actor
        found = [_ask(setup.buffer.enter.remote(saved, me)), str(folder or "")]
    if world > 1:
        dist.broadcast_object_list(found, src=0)  # nobody asks for a batch before the ledger went back
    return int(found[0]), str(found[1])


def _check_storage(setup: Setup) -> None:
    """Every rank's node must see the checkpoints that the run began with: one that joined later may have a folder of its own by that
    name, and training would begin anew in it. Raises UserError."""
    if setup.token and not setup.uri and not sees_token(setup.checkpoints, setup.token):
        import ray

        node, address = ray.get_runtime_context().get_node_id()[:8], ray.util.get_node_ip_address()
        raise UserError(
            f"a learner's node, {address} ({node}), does not see {setup.checkpoints} of this run; mount the run's storage on every node that may "
            "train, keep learners from the others (placement.learner.labels), or give storage_path as a URI"
        )


def _due(train: TrainConfig, step: int, saved_at: float, world: int) -> bool:
    """Whether a checkpoint is due. Clocks of ranks differ, so the first one's decides."""
    import torch.distributed as dist

    due = [bool(train.checkpoint_minutes) and time.monotonic() - saved_at >= 60 * train.checkpoint_minutes]
    if world > 1 and train.checkpoint_minutes:
        dist.broadcast_object_list(due, src=0)
    return due[0] or bool(train.checkpoint_every and step % train.checkpoint_every == 0)


def _save(setup: Setup, learner: Any, incarnation: int, step: int, rank: int, *, last: bool) -> None:
    """Every rank joins; the first one writes, or all do. What cannot be written ends the run, with the last checkpoint whole. One that an
    object store does not take is told, and counts as not saved, unless it is the `last`."""
    import ray.train

    from agents.learning.checkpoint import CheckpointError, checkpoint_name, prune_checkpoints, save_checkpoint

    began = time.monotonic()
    state = {"step": step, "buffer": _ask(setup.buffer.state.remote()) if rank == 0 else {}}
    try:
        save_checkpoint(Path(setup.checkpoints) / checkpoint_name(step), learner, setup.model, state)
    except Exception as error:
        # Of a sharded checkpoint every rank knows what went wrong on any; else the first one alone writes.
        if not _is_disk(error) or (rank != 0 and not setup.learner.sharded_checkpoints):
            raise  # another rank died, or something else is wrong: the learner starts again
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {setup.checkpoints}: {one_line(error)[:200]}; earlier ones are "
            "whole: free some space (or mend the folder) and go on with resume="
        ) from error
    if rank == 0:
        prune_checkpoints(setup.checkpoints, setup.train.keep_checkpoints)
        if _sent(setup, Path(setup.checkpoints) / checkpoint_name(step), last):
            _ask(setup.buffer.checkpointed.remote(incarnation, step, time.monotonic() - began))
    ray.train.report({"step": step})


def _sent(setup: Setup, folder: Path, last: bool) -> bool:
    """Whether a checkpoint is where it belongs. Raises UserError when the last one is not."""
    if setup.uri:
        try:
            push_checkpoint(folder, f"{setup.uri}/checkpoints", setup.train.keep_checkpoints)
        except UserError as error:
            if last:
                raise
            _ask(
                setup.buffer.event.remote(
                    f"{folder.name} was not copied to storage, the next one is tried: {one_line(error)}"
                )
            )
            return False
    return True


def _is_disk(error: Exception) -> bool:
    """Whether a file could not be written. safetensors and torch have errors of their own for that."""
    text = str(error)
    named = any(
        part in text for part in ("No space left", "code: 28", "PytorchStreamWriter", "quota", "Read-only file system")
    )
    return isinstance(error, OSError) or named


def _fetch(setup: Setup, incarnation: int, step: int, world: int, shared: bool, ranks: tuple[int, int]) -> Any:
    """The batch with this rank's part, or None when it is not full yet. The driver, which sees everything, decides when waiting has taken
    too long."""
    return _ask(setup.buffer.next_batch.remote(incarnation, step, world, shared=shared, ranks=ranks))


def _ask(reference: Any, limit_s: float = CALL_S) -> Any:
    import ray

    return ray.get(reference, timeout=limit_s)


class LearnerRun:
    """The Ray Train run in a thread of the driver, since `TorchTrainer.fit` blocks.

    Ray Train restarts workers that die; a controller of Ray Train that dies is started anew here.
    """

    def __init__(self, setup: Setup, run_dir: Path) -> None:
        self._setup = setup
        self._run_dir = run_dir
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._fit, name="learner", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """False once training has ended. Raises what it ended with, if that was an error."""
        alive = self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return alive

    def end(self) -> None:
        """No learner is started any more. To be called before Ray ends: Ray Train would start another one."""
        self._ended = True

    def _fit(self) -> None:
        import ray

        deaths = Tally(self._setup.train.max_failures)
        while True:
            try:
                error: BaseException | None = self._trainer().fit().error
            except ray.exceptions.RayActorError as death:  # of Ray Train's controller: its workers ended with it
                error = death
            except BaseException as other:
                self._error = other
                return
            if error is None or self._ended:
                return
            if deaths.exceeded():
                self._error = error
                return

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        train = self._setup.train
        place, gpus = self._setup.place, {"GPU": train.worker_gpus} if train.worker_gpus else {}
        store = ObjectStore(self._setup.uri) if self._setup.uri else None
        shared = (
            self._setup.turns is not None and self._setup.turns.on_gpu
        )  # and then the engines have asked Ray for the GPUs
        return TorchTrainer(
            train_loop,
            train_loop_config={"setup": self._setup},
            torch_config=TorchConfig(backend="nccl" if train.worker_gpus or shared else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=train.num_workers,
                use_gpu=train.worker_gpus > 0,
                resources_per_worker={"CPU": train.worker_cpus, **gpus, **place.resources},
                placement_strategy=place.strategy.upper(),
                label_selector=dict(place.labels) or None,
            ),
            run_config=RunConfig(
                name=f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000:06d}",
                storage_path=f"{store.path}/ray_train" if store else str(self._run_dir / "ray_train"),
                storage_filesystem=store.filesystem if store else None,
                # The buffer counts learners that begin without a step between them, and stops the run.
                failure_config=FailureConfig(max_failures=-1),
                worker_runtime_env={"env_vars": environment(self._setup.learner.threads)},
            ),
        )
