"""What a run takes: processes, Ray's CPUs and GPUs, memory and disk, from its configuration and the sizes of its policy.

The only place for these numbers, with `cluster.memory`, which counts what one process holds. Invariants: plain arithmetic,
nothing is read or started; estimates are rounded up, and what is not counted (the index of a large corpus) is said where they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.handover import Handover, handover
from cluster.memory import GIB as GIB
from cluster.memory import (
    PROCESS_GIB,
    LearnerBytes,
    adapter_parameters,
    engine_bytes,
    largest_tensor,
    learner_bytes,
    total,
)
from cluster.model import ModelShape
from retrieval.config import legs_of

if TYPE_CHECKING:
    from cluster.evaluation.config import EvalConfig
    from cluster.schema import RunConfig
    from cluster.vllm.options import EngineConfig

ENGINE_GIB = 1.2
"""What a sampler's processes hold besides weights and cache (measured on CPU, rounded up)."""
LEARNER_GIB = 0.5
"""What a learner process holds besides tensors, on CPU or beside its GPU."""
BASE_GIB = 2.0
"""Ray, the driver, a rollout worker and the retrieval actor together, without the object store."""
SAVED_BYTES_PER_PARAMETER = 12
"""float32 weights and two moments: what a checkpoint takes on disk."""
WEIGHT_FILE_GIB = 4.0
"""Most of one weight file of a sharded checkpoint (`agents.learning.sharded.FILE_BYTES`)."""
CPU_KV_GIB = 0.5
"""Cache of an engine on CPU that is told nothing."""


@dataclass(frozen=True)
class Share:
    """One kind of actor that asks Ray for something, and the memory each of them takes in GiB."""

    actor: str
    count: int
    cpus: float
    gpus: float
    parts_gib: dict[str, float]
    """Memory by what fills it: of the GPUs it asks for, else of the machine."""

    @property
    def each_gib(self) -> float:
        return sum(self.parts_gib.values())


def needs(config: RunConfig) -> dict[str, float]:
    """What a run's actors ask Ray for before it can begin, by resource."""
    fleet, train = config.fleet, config.train
    engines = fleet.min_engines or fleet.num_engines
    wanted = {
        "CPU": engines * fleet.num_cpus + train.num_workers * train.worker_cpus,
        "GPU": engines * fleet.num_gpus
        + train.num_workers * train.worker_gpus * (not shares_gpus(config))
        + _retrieval_gpus(config)
        + _judge_gpus(config),
    }
    return {kind: amount for kind, amount in wanted.items() if amount}


def evaluation_needs(config: EvalConfig, *, judging: bool = False) -> dict[str, float]:
    """What an evaluation's actors ask Ray for while it plays, or while it judges."""
    fleet, plays = config.fleet, config.policy.kind == "checkpoint" and not judging
    gpus = _judge_gpus(config) if judging else _retrieval_gpus(config) + plays * fleet.num_engines * fleet.num_gpus
    wanted = {"CPU": plays * fleet.num_engines * fleet.num_cpus, "GPU": gpus}
    return {kind: amount for kind, amount in wanted.items() if amount}


def _retrieval_gpus(config: RunConfig | EvalConfig) -> float:
    spread, legs = config.service.topology, len(legs_of(config.retrieval))
    return (
        spread.encoders * spread.encoder_gpus
        + legs * config.retrieval.shards * spread.shard_replicas * spread.shard_gpus
    )


def _judge_gpus(config: RunConfig | EvalConfig) -> float:
    judge = config.judge
    return judge.engines * judge.num_gpus if judge.kind == "vllm" and not judge.replay else 0.0


def shares(config: RunConfig, shape: ModelShape, gpu_gib: float | None = None) -> tuple[Share, Share]:
    """Samplers and learners. `gpu_gib`: memory of one GPU, of which an engine takes its share; None: not known."""
    train = config.train
    learner = {name: gib(size) for name, size in learner_of(config, shape).training.items()}
    learner["the process itself"] = PROCESS_GIB if trains_on_gpu(config) else LEARNER_GIB
    return (
        engine_share(config, shape, gpu_gib),
        Share("learner", train.num_workers, train.worker_cpus, train.worker_gpus, learner),
    )


def engine_share(config: RunConfig | EvalConfig, shape: ModelShape, gpu_gib: float | None = None) -> Share:
    """The engines of a fleet."""
    fleet, engine = config.fleet, config.engine
    devices, on_cpu = engine.tensor_parallel, not fleet.num_gpus
    one = gib(kv_bytes_per_token(engine, shape, on_cpu=on_cpu) * engine.max_model_len)
    if on_cpu:
        weights = gib(shape.num_parameters * itemsize(engine, on_cpu=True))
        cache = CPU_KV_GIB if engine.kv_cache_gb is None else engine.kv_cache_gb
        sampler = {"weights": weights, "KV cache": cache * devices, "the engine itself": ENGINE_GIB}
    else:
        parts = engine_bytes(engine, shape, itemsize(engine, on_cpu=False))
        sampler = {name: devices * gib(size) for name, size in parts.items()}
        if engine.kv_cache_gb is not None:
            sampler["KV cache"] = engine.kv_cache_gb * devices
        elif gpu_gib is not None:
            room = engine.gpu_memory_utilization * gpu_gib * devices
            sampler["KV cache"] = max(one, room - sum(sampler.values()))
        else:
            sampler["KV cache, at least"] = one
    return Share("sampler", fleet.num_engines, fleet.num_cpus, fleet.num_gpus, sampler)


def learner_of(config: RunConfig, shape: ModelShape) -> LearnerBytes:
    """What one learner process holds. A sequence beyond the budget of a pass is a pass of its own."""
    tokens = max(config.learner.max_tokens_per_microbatch, config.sampling.max_context)
    ranks = config.train.num_workers
    return learner_bytes(config.learner, shape, ranks=ranks, tokens=tokens, on_gpu=trains_on_gpu(config))


def shares_gpus(config: RunConfig) -> bool:
    """Whether learners and samplers take turns on the same GPUs."""
    return bool(config.layout.kind == "collocated" and config.fleet.num_engines and config.fleet.num_gpus)


def trains_on_gpu(config: RunConfig) -> bool:
    """Whether learners have GPUs: of their own, or the samplers' in turns."""
    return bool(config.train.worker_gpus) or shares_gpus(config)


def transport_of(config: RunConfig, *, beside: bool = False) -> str:
    """How weights reach the engines, as far as the configuration tells. `beside`: learners and engines have some GPU in common."""
    if config.learner.lora.publish == "adapter":
        return "shm"
    if config.fleet.transport != "auto":
        return config.fleet.transport
    if not (config.fleet.num_gpus and trains_on_gpu(config)):
        return "shm"  # or relay: the same segments, and a copy of them on other nodes
    return "ipc" if beside or shares_gpus(config) else "nccl"


def handover_of(config: RunConfig, shape: ModelShape, *, beside: bool = False) -> Handover:
    """What a publish adds on either side."""
    engine, train = config.engine, config.train
    return handover(
        transport_of(config, beside=beside), shape, bucket_bytes=config.fleet.bucket_mb << 20,
        itemsize=itemsize(engine, on_cpu=not config.fleet.num_gpus), ranks=train.num_workers, devices=engine.tensor_parallel,
        adapters=adapter_parameters(config.learner.lora, shape) if config.learner.lora.publish == "adapter" else 0,
    )  # fmt: skip


def published_gib(config: RunConfig, shape: ModelShape) -> float:
    """Memory of the machine for weights on their way: in shared memory those that engines read and those before them, or the buckets of a
    broadcast between CPUs. What goes from GPU to GPU takes none."""
    kind, workers = transport_of(config), config.fleet.num_engines * config.engine.tensor_parallel
    if kind in ("shm", "relay"):
        adapters = adapter_parameters(config.learner.lora, shape) if config.learner.lora.publish == "adapter" else 0
        return 2 * gib((adapters or shape.num_parameters) * itemsize(config.engine, on_cpu=not config.fleet.num_gpus))
    return gib((1 + workers) * total(handover_of(config, shape).host))


def host_gib(config: RunConfig, shape: ModelShape) -> float:
    """Memory of the machine that a run on one machine takes, its shared memory included: what is on GPUs is not in it."""
    sampler, learner = shares(config, shape)
    here = 0.0 if sampler.gpus else sampler.count * sampler.each_gib
    here += sampler.count * ENGINE_GIB if sampler.gpus else 0.0
    here += learner.count * (LEARNER_GIB if trains_on_gpu(config) else learner.each_gib)
    there = offloaded_gib(config, shape) + published_gib(config, shape) + passing_gib(config, shape)
    return here + there + rest_gib(config)


def offloaded_gib(config: RunConfig, shape: ModelShape) -> float:
    """What learners on shared GPUs put into the machine's memory while samplers have these."""
    if not (shares_gpus(config) and config.layout.offload):
        return 0.0
    return config.train.num_workers * gib(total(learner_of(config, shape).kept))


def passing_gib(config: RunConfig, shape: ModelShape) -> float:
    """What is taken for a while: as learners load, or as a checkpoint is written, which do not happen at once."""
    return max(loading_gib(config, shape), saving_gib(config, shape))


def loading_gib(config: RunConfig, shape: ModelShape) -> float:
    """On the way to GPUs: one learner reads the whole model into the machine's memory, each of several its part, tensor by tensor."""
    if not trains_on_gpu(config):
        return 0.0
    ranks = config.train.num_workers
    return gib(4 * shape.num_parameters) if ranks == 1 else ranks * gib(4 * largest_tensor(shape))


def rest_gib(config: RunConfig | EvalConfig) -> float:
    """Ray and all actors that ask it for nothing."""
    return BASE_GIB + config.ray.object_store_mb / 1024


def saving_gib(config: RunConfig, shape: ModelShape) -> float:
    """While a checkpoint is written. The first learner alone gathers what is in it; of a sharded one each holds two weight files at a time,
    then its own moments as they are written, from GPUs by way of a copy."""
    saved = saved_gib(config, shape)
    if not config.learner.sharded_checkpoints:
        return saved
    weights = gib(4 * shape.num_parameters)
    files = min(2 * weights, 2 * WEIGHT_FILE_GIB * config.train.num_workers)
    return max(files, (2 if trains_on_gpu(config) else 1) * (saved - weights))


def saved_gib(config: RunConfig, shape: ModelShape) -> float:
    """One checkpoint on disk: the weights, the moments, and a value model with both."""
    if config.learner.lora.rank:  # of moments and a value model, those of adapters alone
        return gib(4 * shape.num_parameters)
    models = 2 if config.learner.critic.kind == "model" else 1
    return models * gib(SAVED_BYTES_PER_PARAMETER * shape.num_parameters)


def checkpoints_gib(config: RunConfig, shape: ModelShape) -> float:
    """Most disk the checkpoints take: those that are kept, and the one being written."""
    return (config.train.keep_checkpoints + 1) * saved_gib(config, shape)


def kv_bytes_per_token(engine: EngineConfig, shape: ModelShape, *, on_cpu: bool) -> int:
    """Bytes of keys and values of one token, on all devices of an engine together."""
    return shape.kv_values_per_token * itemsize(engine, on_cpu=on_cpu)


def itemsize(engine: EngineConfig, *, on_cpu: bool) -> int:
    """Bytes of one value in an engine."""
    return 4 if engine.dtype == "float32" or (engine.dtype == "auto" and on_cpu) else 2


def gib(num_bytes: float) -> float:
    return num_bytes / GIB
