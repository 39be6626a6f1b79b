"""What a run takes: processes, Ray's CPUs and GPUs, memory and disk, from its configuration and the sizes of its policy.

The only place for these numbers. Invariants: plain arithmetic, nothing is read or started; estimates are rounded up, and
what is not counted (activations, the index of a large corpus) is said where they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.model import ModelShape
from retrieval.config import legs_of

if TYPE_CHECKING:
    from cluster.evaluation.config import EvalConfig
    from cluster.schema import RunConfig
    from cluster.vllm.options import EngineConfig

GIB = 1 << 30
ENGINE_GIB = 1.2
"""What a sampler's processes hold besides weights and cache (measured on CPU, rounded up)."""
LEARNER_GIB = 0.5
"""What a learner process holds besides weights, gradients and moments."""
BASE_GIB = 2.0
"""Ray, the driver, a rollout worker and the retrieval actor together, without the object store."""
TRAIN_BYTES_PER_PARAMETER = 16
"""float32 weights, gradients and two moments."""
SAVED_BYTES_PER_PARAMETER = 12
"""float32 weights and two moments: what a checkpoint takes on disk, and at most in memory while it is written."""
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
    """What a run's actors ask Ray for, by resource."""
    fleet, train = config.fleet, config.train
    wanted = {
        "CPU": fleet.num_engines * fleet.num_cpus + train.num_workers * train.worker_cpus,
        "GPU": fleet.num_engines * fleet.num_gpus
        + train.num_workers * train.worker_gpus
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
    whole = gib(4 * shape.num_parameters)
    adapters = config.learner.lora.rank > 0
    trained = whole if adapters else gib(TRAIN_BYTES_PER_PARAMETER * shape.num_parameters)
    ranks = max(1, train.num_workers)
    name = "weights" if adapters else "weights, gradients, moments"
    learner = {name: trained / ranks}
    if config.learner.critic.kind == "model":
        learner["value model"] = trained / ranks
    if ranks > 1 and whole > sum(learner.values()):  # every rank reads a whole model before it is sharded
        learner = {"all weights while it loads": whole}
    if config.learner.loss.kl_coef > 0:
        learner["reference"] = whole
    if not train.worker_gpus:
        learner["the process itself"] = LEARNER_GIB
    return (
        engine_share(config, shape, gpu_gib),
        Share("learner", train.num_workers, train.worker_cpus, train.worker_gpus, learner),
    )


def engine_share(config: RunConfig | EvalConfig, shape: ModelShape, gpu_gib: float | None = None) -> Share:
    """The engines of a fleet."""
    fleet, engine = config.fleet, config.engine
    weights = gib(shape.num_parameters * itemsize(engine, on_cpu=not fleet.num_gpus))
    one = gib(kv_bytes_per_token(engine, shape, on_cpu=not fleet.num_gpus) * engine.max_model_len)
    if not fleet.num_gpus:
        cache = CPU_KV_GIB if engine.kv_cache_gb is None else engine.kv_cache_gb
        sampler = {"weights": weights, "KV cache": cache * engine.tensor_parallel, "the engine itself": ENGINE_GIB}
    elif engine.kv_cache_gb is not None:
        sampler = {"weights": weights, "KV cache": engine.kv_cache_gb * engine.tensor_parallel}
    elif gpu_gib is not None:
        room = engine.gpu_memory_utilization * gpu_gib * engine.tensor_parallel
        sampler = {"weights": weights, "KV cache": max(one, room - weights)}
    else:
        sampler = {"weights": weights, "KV cache, at least": one}
    return Share("sampler", fleet.num_engines, fleet.num_cpus, fleet.num_gpus, sampler)


def published_gib(config: RunConfig, shape: ModelShape) -> float:
    """Shared memory of published weights: those that engines read, and those before them."""
    return 2 * gib(shape.num_parameters * itemsize(config.engine, on_cpu=not config.fleet.num_gpus))


def host_gib(config: RunConfig, shape: ModelShape) -> float:
    """Memory of the machine that a run on one machine takes, its shared memory included: what is on GPUs is not in it."""
    both = shares(config, shape)
    here = sum(s.count * s.each_gib for s in both if not s.gpus)
    beside = sum(s.count * (ENGINE_GIB if s.actor == "sampler" else LEARNER_GIB) for s in both if s.gpus)
    return here + beside + published_gib(config, shape) + passing_gib(config, shape) + rest_gib(config)


def passing_gib(config: RunConfig, shape: ModelShape) -> float:
    """What is taken for a while: as learners load, or as a checkpoint is written, which do not happen at once."""
    return max(loading_gib(config, shape), saved_gib(config, shape))


def loading_gib(config: RunConfig, shape: ModelShape) -> float:
    """Learners on GPUs read the whole model into the machine's memory first, all at once; those on CPUs keep it there."""
    return gib(4 * shape.num_parameters) * config.train.num_workers if config.train.worker_gpus else 0.0


def rest_gib(config: RunConfig | EvalConfig) -> float:
    """Ray and all actors that ask it for nothing."""
    return BASE_GIB + config.ray.object_store_mb / 1024


def saved_gib(config: RunConfig, shape: ModelShape) -> float:
    """One checkpoint. The first learner alone gathers it: the weights, then the moments, then a value model with both."""
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


def served_kv_gib(engine: EngineConfig) -> int:
    """Cache of an engine that `vllm serve` runs on a CPU, which takes whole GiB."""
    return max(1, round(engine.kv_cache_gb or 1))


def itemsize(engine: EngineConfig, *, on_cpu: bool) -> int:
    """Bytes of one value in an engine."""
    return 4 if engine.dtype == "float32" or (engine.dtype == "auto" and on_cpu) else 2


def gib(num_bytes: float) -> float:
    return num_bytes / GIB
