"""What does not fit onto GPUs, one line each: what, where, how to mend.

Invariants: plain arithmetic by `cluster.layout`, nothing is started; the change that a line names is one of which the same
arithmetic says that it is enough, the cheapest of those that are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.layout import Gpu, Moment, moments, one_node, refused, sampling_parts, seats
from cluster.model import ModelShape
from cluster.sizes import needs, shares_gpus
from cluster.tenants import judge_needs, judge_share, option

if TYPE_CHECKING:
    from cluster.schema import RunConfig

Change = Callable[["RunConfig"], "RunConfig"]
Mend = tuple[str, Change]
"""How it is said, and what it does."""
_ENOUGH = 1.0005
"""What an engine's share may be off by rounding."""


def misfits(config: RunConfig, shape: ModelShape, nodes: Sequence[Sequence[float]]) -> list[str]:
    """One line for each thing that does not fit onto these GPUs, with how to mend it. Empty: all fits."""
    gpus, left = seats(config, nodes)
    found = []
    if left:
        there = sum(len(n) for n in nodes)
        single = len(left) == 1
        kinds = " and ".join(sorted({name.partition("-")[0] + ("" if single else "s") for name in left}))
        mend = "lower fleet.num_engines or train.num_workers, set layout.kind=collocated, or use more GPUs"
        if config.engine.tensor_parallel > max((len(n) for n in nodes), default=0):
            mend = f"engine.tensor_parallel={config.engine.tensor_parallel} needs as many GPUs on one node"
        elif shares_gpus(config):
            mend = "lower fleet.num_engines and train.num_workers together, or use more GPUs"
        found.append(
            f"{len(left)} {kinds} {'has' if single else 'have'} no GPU to sit on ({there} GPUs, first {left[0]}); {mend}"
        )
    apart = one_node(config, {g.node for g in gpus if any(t.role == "sampler" for t in g.tenants)})
    if line := apart or ("" if left else refused(config, gpus)):
        found.append(line)
    told: set[tuple[str, bool]] = set()
    for gpu in gpus:
        roles = {t.role for t in gpu.tenants}
        who = " and ".join(sorted(roles))
        short = _sequence(config, shape, gpu.gib, nodes) if "sampler" in roles else ""
        lines = [short, _judge(config, gpu.gib) if "judge" in roles else ""]
        # Of the learner's moments the fullest is told: what mends it mends the others.
        for moment in sorted(moments(config, shape, gpu), key=lambda m: -m.gib):
            key = (who, moment.name == "sampling" or "learner" not in roles)
            if moment.gib <= gpu.gib or key in told or (short and key[1]):
                continue
            told.add(key)
            lines.append(_too_much(config, shape, gpu, moment, who, nodes))
        found += [line for line in lines if line and line not in found]
    return found


def _judge(config: RunConfig, gpu_gib: float) -> str:
    """Whether a judge's share holds its weights and a step, where its sizes are known: it does not start otherwise."""
    arguments, need = config.judge.engine_args, judge_needs(config)
    if (
        need is None
        or option(arguments, "--kv-cache-memory-bytes") is not None
        or need <= judge_share(arguments) * gpu_gib
    ):
        return ""
    room = judge_share(arguments) * gpu_gib
    return (
        f"a judge takes {need:.1f} GiB on a GPU for its weights and a step, --gpu-memory-utilization leaves it {room:.1f} of {gpu_gib:.1f}; "
        "raise that or --tensor-parallel-size (judge.engine_args, judge.num_gpus), or use GPUs with more memory"
    )


def _sequence(config: RunConfig, shape: ModelShape, gpu_gib: float, nodes: Sequence[Sequence[float]]) -> str:
    """Whether an engine's share holds its weights, a step, and one sequence: it does not start otherwise."""
    engine = config.engine
    if _starts(config, shape, gpu_gib):
        return ""
    room, need = engine.gpu_memory_utilization * gpu_gib, _least(config, shape)

    def holds(changed: RunConfig) -> bool:
        return _starts(changed, shape, gpu_gib)

    mend = _first(config, _engine_mends(config, shape), holds, nodes)
    return (
        f"a sampler takes {need:.1f} GiB on a GPU for its weights, a step and one sequence of {engine.max_model_len} tokens, "
        f"engine.gpu_memory_utilization={engine.gpu_memory_utilization:g} leaves it {room:.1f} of {gpu_gib:.1f}; "
        f"{mend or 'use GPUs with more memory'}"
    )


def _starts(config: RunConfig, shape: ModelShape, gpu_gib: float) -> bool:
    engine = config.engine
    return engine.kv_cache_gb is not None or _least(config, shape) <= engine.gpu_memory_utilization * gpu_gib * _ENOUGH


def _least(config: RunConfig, shape: ModelShape) -> float:
    """What an engine takes of a GPU at least: of no share at all, the cache is that of one sequence."""
    return sum(sampling_parts(config, shape, 0.0).values())


def _too_much(
    config: RunConfig, shape: ModelShape, gpu: Gpu, moment: Moment, who: str, nodes: Sequence[Sequence[float]]
) -> str:
    biggest = sorted(moment.named.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {size:.1f}" for name, size in biggest)
    sampling = moment.name == "sampling" or "learner" not in who
    mends = _engine_mends(config, shape) if sampling else _learner_mends(config)

    def holds(changed: RunConfig) -> bool:
        if "sampler" in who and not _starts(changed, shape, gpu.gib):
            return False
        beside = shares_gpus(config)  # then what mends the learner's turn need not mend the samplers'
        return all(
            m.gib <= gpu.gib
            for m in moments(changed, shape, gpu)
            if not beside or (m.name == "sampling") == (moment.name == "sampling")
        )

    mend = _first(config, [*_sharing_mends(config, moment, gpu), *mends], holds, nodes)
    subject = f"a {who}" if " and " not in who else f"a {who.replace(' and ', ' and a ')} on one GPU"
    verb = "take" if " and " in who else "takes"
    return (
        f"{subject} {verb} {moment.gib:.1f} GiB while {moment.name} ({parts}), a GPU has {gpu.gib:.1f}; "
        f"{mend or 'use GPUs with more memory, or train adapters (learner.lora.rank)'}"
    )


def _first(
    config: RunConfig, mends: Iterable[Mend], holds: Callable[[RunConfig], bool], nodes: Sequence[Sequence[float]]
) -> str:
    """The first change after which it fits, and how many GPUs that takes where these are too few."""
    for text, change in mends:
        changed = change(config)
        if holds(changed):
            wanted = needs(changed).get("GPU", 0)
            return f"{text}, on {wanted:g} GPUs" if wanted > sum(map(len, nodes)) else text
    return ""


def _set(section: str, **values: Any) -> Change:
    return lambda config: replace(config, **{section: replace(getattr(config, section), **values)})


def _then(*changes: Change) -> Change:
    def both(config: RunConfig) -> RunConfig:
        for change in changes:
            config = change(config)
        return config

    return both


def _learner_mends(config: RunConfig) -> Iterator[Mend]:
    """From the cheapest to the dearest."""
    learner, longest = config.learner, config.sampling.max_context
    saves = _set("learner", gradient_checkpointing=True)
    if not learner.gradient_checkpointing:
        yield "set learner.gradient_checkpointing=true", saves
    budget = learner.max_tokens_per_microbatch
    short = _set("learner", max_tokens_per_microbatch=longest)
    if budget > longest:
        while (budget := budget // 2) > longest:
            yield f"set learner.max_tokens_per_microbatch={budget}", _set("learner", max_tokens_per_microbatch=budget)
        yield f"set learner.max_tokens_per_microbatch={longest}", short
        yield (
            f"set learner.gradient_checkpointing=true and learner.max_tokens_per_microbatch={longest}",
            _then(saves, short),
        )
    gpus = config.fleet.num_engines * config.engine.tensor_parallel
    for ranks in (2, 4, 8, 16, 32, 64, 128, 256):
        if ranks <= config.train.num_workers:
            continue
        more = _then(_set("train", num_workers=ranks), saves)
        said = f"set train.num_workers={ranks}"
        if shares_gpus(config):
            engines = max(1, ranks // config.engine.tensor_parallel)
            if ranks <= gpus:
                continue
            more, said = _then(more, _set("fleet", num_engines=engines)), f"{said} and fleet.num_engines={engines}"
        yield said + ("" if learner.gradient_checkpointing else " and learner.gradient_checkpointing=true"), more
    for part in (2, 4, 8):
        if config.train.num_workers % part == 0 and part > learner.context_parallel:
            yield (
                f"set learner.context_parallel={part}",
                _then(_set("learner", context_parallel=part, layout="packed", attention="varlen"), saves),
            )


def _engine_mends(config: RunConfig, shape: ModelShape) -> Iterator[Mend]:
    engine = config.engine
    for share in (0.85, 0.9, 0.95):
        if share > engine.gpu_memory_utilization and not shares_gpus(config):
            yield f"set engine.gpu_memory_utilization={share:g}", _set("engine", gpu_memory_utilization=share)
    if config.sampling.max_context < engine.max_model_len:
        length = config.sampling.max_context
        yield f"set engine.max_model_len={length}", _set("engine", max_model_len=length)
    for devices in (2, 4, 8):
        heads = max(1, shape.num_kv_heads)
        if devices <= engine.tensor_parallel or (devices % heads and heads % devices):
            continue
        change = _then(_set("engine", tensor_parallel=devices), _set("fleet", num_gpus=float(devices)))
        said = f"set engine.tensor_parallel={devices} and fleet.num_gpus={devices}"
        if shares_gpus(config):  # the same GPUs, in fewer engines
            engines = config.train.num_workers // devices
            if engines * devices != config.train.num_workers:
                continue
            change, said = _then(change, _set("fleet", num_engines=engines)), f"{said} and fleet.num_engines={engines}"
        yield said, change


def _sharing_mends(config: RunConfig, moment: Moment, gpu: Gpu) -> Iterator[Mend]:
    """Of those who share a GPU: more room in turn, or a smaller share of each engine."""
    if shares_gpus(config) and not config.layout.offload:
        yield "set layout.offload=true", _set("layout", offload=True)
    if moment.name == "publishing":
        for size in (64, 16):
            if size < config.fleet.bucket_mb:
                yield f"set fleet.bucket_mb={size}", _set("fleet", bucket_mb=size)
    engines, engine = sum(t.role == "sampler" for t in gpu.tenants), config.engine
    if engines and engine.kv_cache_gb is None and (moment.name == "sampling" or not shares_gpus(config)):
        less = engine.gpu_memory_utilization - (moment.gib - gpu.gib) / engines / gpu.gib
        share = math.floor(100 * less) / 100
        if 0 < share < engine.gpu_memory_utilization:
            yield f"set engine.gpu_memory_utilization={share:g}", _set("engine", gpu_memory_utilization=share)
